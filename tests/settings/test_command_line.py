"""What every command says of a command line that it cannot read: one line, and exit code 2."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron_dynmoe.settings.messages.command_line import CommandParser, in_one_line

REPOSITORY = Path(__file__).resolve().parents[2]

# Each command with a misspelled flag of its own, and the flag that was meant.
MISSPELLED = {
    "tools/analyze_routing.py": ("--modle x", "--model"),
    "tools/calibrate_threshold.py": ("--modle x", "--model"),
    "tools/convert_checkpoint.py": ("to-hf --laod x --output y", "--load"),
    "tools/evaluate.py": ("--model x --taks y", "--tasks"),
    "tools/generate_docs.py": ("--hlep", "--help"),
    "tools/plan_run.py": ("smoke --gpsu 8 --gpu h200-141g", "--gpus"),
    "tools/plot_run.py": ("runs/x --outptu y.png", "--output"),
    "tools/preprocess_data.py": ("--inptu x --output-prefix y", "--input"),
    "tools/report_run.py": ("runs/x --hlep", "--help"),
    "tools/show_progress.py": ("--hlep", "--help"),
    "tools/train_tokenizer.py": ("--input x --output y --vocab-szie 300", "--vocab-size"),
    "tools/try_megatron.py": ("0.19.2 --prats names", "--parts"),
    "benchmarks/busiest_rank.py": ("draw --rouitng top_k", "--routing"),
    "benchmarks/collect_logits.py": ("--modle x --output y", "--model"),
    "benchmarks/controller_step_response.py": ("--figrue x", "--figure"),
    "benchmarks/convert_checkpoint.py": ("--layres 2", "--layers"),
    "benchmarks/documents.py": ("--ruonds 2", "--rounds"),
    "benchmarks/controller_in_training.py": ("--olny dtop_p-16-2-1024", "--only"),
    "benchmarks/controller_transfer.py": ("--hlep", "--help"),
    "benchmarks/drawn_target.py": ("--hlep", "--help"),
    "benchmarks/kernel_rooflines.py": ("--hlep", "--help"),
    "benchmarks/dry_runs.py": ("--onyl smoke", "--only"),
    "benchmarks/exported.py": ("--shpae small", "--shape"),
    "benchmarks/layer.py": ("--ruonds 2", "--rounds"),
    "benchmarks/plot.py": ("--imgaes x", "--images"),
    "benchmarks/preprocess.py": ("--tokeniser-model x", "--tokenizer-model"),
    "benchmarks/row_buffer.py": ("--naem x -- y", "--name"),
    "benchmarks/select_experts.py": ("--outptu x", "--output"),
    "benchmarks/upcycling.py": ("--stesp 5", "--steps"),
    "benchmarks/vllm_padding.py": ("--model x --ruonds 3", "--rounds"),
    "-m study": ("--lsit", "--list"),
    "-m megatron_dynmoe": ("attempt begin --wrold-size 2 smoke", "--world-size"),
    "-m megatron_dynmoe.doctor": ("--timeuot 3", "--timeout"),
    "-m megatron_dynmoe.generate": ("--model x --promt y", "--prompt"),
    "-m tests.fuzz": ("--csaes 2", "--cases"),
    "-m tests.mutations": ("--hlep", "--help"),
    "-m tests.faults.soak": ("--mintues 2", "--minutes"),
    # The last, because it sets up Megatron, whose flags it takes as well.
    "benchmarks/train_step.py": ("--hiden-size 2", "--hidden-size"),
}
# One process for all, because PyTorch and Megatron take seconds to import.
WALK = """
import contextlib, io, json, runpy, shlex, sys
found = {}
for command, words in json.loads(sys.argv[1]).items():
    said, code = io.StringIO(), None
    sys.argv = [command, *shlex.split(words)]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            if command.startswith("-m "):
                runpy.run_module(command[3:], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(command, run_name="__main__")
        except SystemExit as end:
            code = end.code
    found[command] = code, said.getvalue()
print(json.dumps(found))
"""


def commands() -> set[str]:
    """Every file that is started by hand and has flags of its own."""
    scripts = [*REPOSITORY.glob("tools/*.py"), *REPOSITORY.glob("benchmarks/*.py")]
    return {
        str(path.relative_to(REPOSITORY))
        for path in scripts
        if path.parent.name == "tools" or '__name__ == "__main__"' in path.read_text()
    }


@pytest.mark.megatron
@pytest.mark.slow
def test_every_command_answers_a_misspelled_flag_in_one_line() -> None:
    assert commands() == {name for name in MISSPELLED if not name.startswith("-m ")}
    words = {command: words for command, (words, _) in MISSPELLED.items()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WALK, json.dumps(words)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    wrong = {
        command: (code, said)
        for command, (code, said) in found.items()
        if code != 2
        or not said.endswith(f"did you mean {MISSPELLED[command][1]}?\n")
        or "usage:" in said
    }
    assert not wrong


def parser() -> CommandParser:
    made = CommandParser(prog="tool.py")
    made.add_argument("--layers", type=int, required=True)
    made.add_argument("--rate", "--learning-rate", type=float)
    made.add_argument("--kind", choices=("top_k", "top_p"))
    one_of = made.add_mutually_exclusive_group()
    one_of.add_argument("--quiet", action="store_true")
    one_of.add_argument("--verbose", action="store_true")
    return made


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "required and not given: --layers."),
        ("--layres 2", "there is no flag --layres: did you mean --layers?"),
        ("--layers 2 --xyzzy", "there is no flag --xyzzy: look for it in --help."),
        ("--layers 2 -kind top_k", "there is no flag -kind: did you mean --kind?"),
        ("--layers 2 three", "three belongs to no flag: --layers before it takes no more values."),
        ("--layers two", "--layers is 'two': give a whole number."),
        ("--layers 1e6", "--layers is '1e6': give a whole number."),
        ("--layers 2 --rate 2,5", "--learning-rate is '2,5': give a number."),
        ("--layers 2 --kind top_q", "--kind is 'top_q': use one of 'top_k', 'top_p'."),
        ("--layers 2 --lay 3", "there is no flag --lay: did you mean --layers?"),
        ("--layers", "--layers has another number of values: it takes one argument."),
        ("--layers 2 --quiet=1", "--quiet takes no value: leave out '1'."),
        (
            "--layers 2 --quiet --verbose",
            "--verbose is not allowed with --quiet: give one of them.",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: str, says: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"tool.py: error: {says}\n"


def test_one_of_two_flags_is_asked_for(capsys) -> None:
    made = CommandParser(prog="tool.py")
    one_of = made.add_mutually_exclusive_group(required=True)
    one_of.add_argument("--model")
    one_of.add_argument("--load")
    with pytest.raises(SystemExit):
        made.parse_args([])
    assert capsys.readouterr().err == "tool.py: error: give --load or --model.\n"


def test_a_flag_of_a_subcommand_is_found_among_its_own(capsys) -> None:
    made = CommandParser(prog="tool.py")
    commands = made.add_subparsers(required=True)
    commands.add_parser("load").add_argument("--folder")
    commands.add_parser("save").add_argument("--folders")
    with pytest.raises(SystemExit):
        made.parse_args(["load", "--foldes", "x"])
    assert "did you mean --folder?" in capsys.readouterr().err


def test_what_is_not_argparses_stays_as_it_is() -> None:
    assert in_one_line(ArgumentParser(), "--a/b: is no file") == "--a/b: is no file"
