"""What a dry run is asked for, and what it refuses before it starts."""

import signal
import subprocess
import sys
from collections import namedtuple

import pytest

from megatron_dynmoe.cli.plan import main
from megatron_dynmoe.dry_run import launch, machine
from megatron_dynmoe.planning.gpus import GPUS
from tests.helpers.commands import exit_code_of

pytestmark = pytest.mark.megatron
GPU = GPUS["h200-141g"]


@pytest.fixture
def requests(monkeypatch):
    """The requests that would be run."""
    asked = []
    monkeypatch.setattr(launch, "_run", lambda request, kernels: asked.append((request, kernels)))
    return asked


def request_of(requests, recipe, flags="", gpus=None, **options):
    run = launch.dry_run(recipe, flags.split(), gpus, GPU, **options)
    return run, *requests[-1]


def test_as_few_gpus_as_the_layout_takes(requests):
    run, request, _ = request_of(requests, "dtop_p_64e8a")
    assert (request.world_size, request.rank) == (8, 0)
    run, request, _ = request_of(requests, "dtop_p_16e", "--expert-model-parallel-size 4")
    assert run.layout.world_size == request.world_size == 8


def test_the_rank_is_one_of_the_fullest(requests):
    """The first pipeline rank holds two micro-batches; with a huge vocabulary, the last is full."""
    assert request_of(requests, "dtop_p_16e", gpus=16)[0].rank == 0
    run, request, _ = request_of(requests, "dtop_p_16e", "--vocab-size 1000000", gpus=16)
    assert (run.rank, run.stage, request.stage) == (8, 1, 1)
    flags = "--vocab-size 1000000 --use-tp-pp-dp-mapping"
    run, request, _ = request_of(requests, "dtop_p_16e", flags, gpus=16)
    assert (run.rank, request.stage) == (1, 1)


@pytest.mark.parametrize(
    ("recipe", "flags", "counts", "experts", "source"),
    [
        ("dtop_p_16e", "", "mean", 2, "the target"),
        ("dtop_p_16e", "", "cap", 16, "all experts"),
        ("dtop_p_16e", "--moe-dynamic-max-experts-per-token 4", "cap", 4, "the cap"),
        ("moe_dynamic_p04", "", "first", 5.9, "the first steps'"),
        ("moe_top2", "", "mean", 2, "top-k"),
        ("dense_374m", "", "mean", 0, "no experts"),
    ],
)
def test_whose_counts(requests, recipe, flags, counts, experts, source):
    run, request, _ = request_of(requests, recipe, flags, counts=counts)
    assert request.experts_per_token == pytest.approx(experts, abs=0.05)
    assert run.counts == source


def test_kernels_are_those_asked_for_or_those_of_the_environment(requests, monkeypatch):
    monkeypatch.delenv("DYNMOE_KERNELS", raising=False)
    assert request_of(requests, "smoke")[2] == "0"
    monkeypatch.setenv("DYNMOE_KERNELS", "1")
    assert request_of(requests, "smoke")[2] == "1"
    assert request_of(requests, "smoke", kernels="0")[2] == "0"


def test_a_file_of_flags_is_read_where_it_stands(requests, tmp_path):
    file = tmp_path / "my_run"
    file.write_text("--num-layers 8 # a comment\n--pipeline-model-parallel-size 2\n")
    run, request, _ = request_of(requests, "smoke", f"@{file} --num-layers 6")
    assert run.layout.pipeline == 2 and run.layout.num_layers == 6
    whole = tmp_path / "whole"
    whole.write_text("\n".join(request.words[:-2]))
    assert request_of(requests, f"@{whole}")[1].words == request.words[:-2]


def test_a_setting_that_the_formula_does_not_know_is_run_all_the_same(requests):
    run, _, _ = request_of(requests, "smoke", "--pipeline-model-parallel-layout Etttt|L")
    assert run.formula is None and "--pipeline-model-parallel-layout" in run.formula_note


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("smoke --dry-run --rank 1", 2, "--rank is 1: use 0 to 0."),
        ("smoke --dry-run --tokens 1e9", 2, "--tokens is given, but --dry-run looks at one step"),
        ("smoke --gpus 1 --gpu a100-40g --rank 0", 2, "--rank belongs to --dry-run"),
        ("smoke --gpus 1 --gpu a100-40g --kernels 1", 2, "--kernels belongs to --dry-run"),
        ("smoke --dry-run --imbalance 2", 2, "every GPU holds all experts"),
        ("dtop_p_64e8a --dry-run --imbalance 9", 2, "--imbalance is 9: use 0.01 to 8"),
        ("dtop_p_64e8a --dry-run --imbalance 2 --counts cap", 2, "use 0.01 to 1, at which all"),
        ("smoke --dry-run --counts cap --experts-per-token 3", 2, "beside --counts cap"),
        ("moe_top2 --dry-run --experts-per-token 3", 2, "3.0, but --moe-router-topk is 2: leave"),
        ("dense_374m --dry-run --experts-per-token 3", 2, "but there are none: leave it out"),
        ("smoke --dry-run --gpus 0", 2, "number of processes is 0"),
        ("smoke --dry-run --moe-dynamic-backend apex", 2, "--moe-dynamic-backend is 'apex': use"),
        ("smoke --dry-run --imbalance -1", 2, "--imbalance is -1: use at least 0.01."),
        ("smoke --dry-run --counts most", 2, "--counts is 'most': use one of"),
        ("dense_374m --dry-run --counts cap", 2, "the model has no experts"),
        ("smoke --dry-run --gpus 3 --tensor-model-parallel-size 2", 2, "number of processes is 3"),
        ("smoke --dry-run --moe-dynamic-backend transformer_engine", 2, "use torch_native"),
        ("smoke --dry-run --transformer-impl transformer_engine", 2, "leave it out"),
        (
            "smoke --dry-run --moe-token-dispatcher-type flex "
            "--moe-flex-dispatcher-backend hybridep",
            2,
            "--moe-flex-dispatcher-backend is hybridep, whose kernels nothing stands in for: use",
        ),
        (
            "smoke --dry-run --moe-token-dispatcher-type flex --tensor-model-parallel-size 2 "
            "--sequence-parallel",
            2,
            "flex: give --expert-tensor-parallel-size 1, or --moe-token-dispatcher-type alltoall.",
        ),
        ("smoke --dry-run --use-megatron-fsdp", 2, "--use-megatron-fsdp is given, and its code"),
        ("smoke --dry-run --fp8-format hybrid", 2, "--fp8-format is hybrid, and its code cannot"),
        ("smoke --dry-run --fp4-format e2m1", 2, "--fp4-format is e2m1, and its code cannot run"),
        (
            "smoke --dry-run --reset-attention-mask",
            2,
            "knows no tokens, and so no documents: leave",
        ),
        ("smoke --dry-run --moe-permute-fusion", 2, "is given, and its code cannot run without"),
        ("smoke --dry-run --cuda-graph-impl local", 2, "cannot run without a GPU: leave it out"),
        ("smoke --dry-run --optimizer-cpu-offload", 2, "cannot run without a GPU: leave it out"),
        ("smoke --dry-run --num-layer 2", 2, "did you mean --num-layers?"),
        ("smok --dry-run", 2, "did you mean smoke?"),
        ("@nothing --dry-run", 2, "there is no such file"),
    ],
)
def test_mistakes_are_told(requests, capsys, command, code, says):
    assert exit_code_of(main, command.split()) == code
    error = capsys.readouterr().err
    assert error.startswith("dynmoe plan: error: ") and says in error and error.count("\n") == 1
    assert not requests


def test_the_cpu_is_refused(requests, monkeypatch, capsys):
    monkeypatch.setenv("DYNMOE_DEVICE", "cpu")
    assert exit_code_of(main, ["smoke", "--dry-run"]) == 2
    assert "DYNMOE_DEVICE is 'cpu'" in capsys.readouterr().err


def test_too_little_memory_is_told_before_the_start(requests, monkeypatch, capsys):
    memory = namedtuple("memory", "available")(10**9)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)
    assert exit_code_of(main, ["smoke", "--dry-run"]) == 1
    assert "1.0 GB of this machine's memory are free, and a dry run" in capsys.readouterr().err


def test_too_few_addresses_are_told_before_torch_wants_them():
    """In a shell of its own: a limit cannot be taken back."""
    command = f"ulimit -v 2000000; exec {sys.executable} -m megatron_dynmoe plan smoke --dry-run"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "limits a process to 2.0 GB of addresses" in done.stderr
    assert "ulimit -v unlimited" in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_compiler_is_told_before_the_start(requests, monkeypatch, capsys):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert exit_code_of(main, ["smoke", "--dry-run"]) == 1
    assert "there is no C compiler" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "lines", "kind", "says"),
    [
        (1, ["noise", f"{launch.ERROR}it fails.", "more"], ChildProcessError, "it fails."),
        (2, [f"{launch.ERROR}there is no flag --x."], launch.UsageError, "there is no flag"),
        (-signal.SIGKILL, [], OSError, "ran out of memory"),
        (1, ["ImportError: libx.so: failed to map segment"], OSError, "ran out of memory"),
        (1, [f"{launch.ERROR}it fails with MemoryError: "], OSError, "ran out of memory"),
        (-signal.SIGSEGV, ["Fatal Python error"], OSError, "exit code -11 and said last: Fatal"),
        (0, [], OSError, "said last: nothing"),
    ],
)
def test_how_the_process_ended(code, lines, kind, says):
    error = launch._reason(code, lines)
    assert type(error) is kind and says in str(error)
