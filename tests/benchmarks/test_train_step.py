"""The training benchmark: a tiny run, and how visits of separate processes come together."""

import csv
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import measure, text, train_step
from benchmarks.places import Failed
from benchmarks.training import BALANCE_LOSS, Routing, Step, flags_of_training, settings


@pytest.mark.slow
@pytest.mark.megatron
def test_it_runs_and_writes_its_rows(tmp_path):
    command = """benchmarks/train_step.py --model paper --backends torch_native
        --routings top_k dtop_p@1.5/4 dense --references hf_grouped_mm --settle 1 --rounds 2
        --num-layers 2 --hidden-size 32 --ffn-hidden-size 32 --num-attention-heads 2
        --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4"""
    subprocess.run(
        [sys.executable, *command.split(), "--output", str(tmp_path)],
        cwd=measure.ROOT,
        check=True,
        capture_output=True,
    )
    with (tmp_path / "train_step.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    names = [f"torch_native {routing}" for routing in ("top_k", "dtop_p@1.5/4", "dense")]
    theirs = "hf_grouped_mm top_k"
    ratios = [f"{name} / {names[0]}" for name in names[1:]]
    assert list(rows) == [*names, theirs, *ratios, *(f"{name} / {theirs}" for name in names)]
    top_k, dtop_p, dense = (rows[name] for name in names)
    assert float(rows[theirs]["experts_per_token"]) == 2 and rows[theirs]["routing_share"] == ""
    assert all(row["workload"].startswith("train: 2 layers, hidden 32") for row in rows.values())
    assert float(top_k["experts_per_token"]) == 2
    assert 1 < float(dtop_p["experts_per_token"]) < 2.2
    # Routing costs something, is not all, and dense has none. How much is not asked: of a step of
    # 0.1 s, in which a busy machine may leave any part waiting for its turn.
    assert 0 < float(top_k["routing_share"]) < 1
    assert 0 < float(dtop_p["routing_share"]) + float(dtop_p["control_share"]) < 1
    assert float(dtop_p["control_share"]) > 0
    assert float(dense["routing_share"]) == float(dense["control_share"]) == 0
    for row in (top_k, dtop_p, dense):
        of_ceiling = float(row["tflops_per_s"]) / float(row["ceiling_tflops_per_s"])
        # Two of four digits, each wrong by up to 1/2000 of itself, and one of three decimals.
        assert float(row["of_ceiling"]) == pytest.approx(of_ceiling, abs=1.1e-3 * of_ceiling + 5e-4)
    profile = (tmp_path / "train_step_profile.txt").read_text()
    assert profile.count("Self CPU time total") == 4


@pytest.mark.megatron
def test_the_reference_is_a_mixtral_that_learns():
    from transformers import MixtralForCausalLM

    from benchmarks.training import build

    args = SimpleNamespace(
        **{"world_size": 1, "seed": 3, "padded_vocab_size": 50, "hidden_size": 16, "num_layers": 2},
        **{"ffn_hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 16},
        **{"layernorm_epsilon": 1e-5, "num_experts": 4, "params_dtype": torch.float32},
        **{"weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8},
        **{"lr": 1e-2, "min_lr": 1e-3, "lr_warmup_iters": 0, "train_iters": 10, "clip_grad": 1.0},
    )
    text = torch.arange(36).view(2, 2, 9) % 50  # two micro-batches of two sequences
    batch = [{"tokens": part[:, :-1], "labels": part[:, 1:].contiguous()} for part in text]
    reference = build(args, [batch] * 5, "hf_eager", "top_k")
    assert isinstance(reference.model, MixtralForCausalLM)
    losses = []
    for _ in range(5):
        with torch.no_grad():
            logits = torch.cat([reference.model(part["tokens"]).logits for part in batch])
        labels = text[..., 1:].flatten()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels).item())
        reference.step()
    assert losses == sorted(losses, reverse=True)
    assert reference.model.config.router_aux_loss_coef == pytest.approx(1e-2)
    with pytest.raises(ValueError, match="hf_eager routes by top_k"):
        build(args, [], "hf_eager", "dtop_p")


@pytest.fixture
def no_rank(monkeypatch):
    """Other tests of this process may have said that it is a rank."""
    monkeypatch.delenv("RANK", raising=False)


def measured(steps: list[Step]) -> train_step.Measured:
    return train_step.Measured("train: tiny", 64, 1e12, 2e9, steps, 0.01, 0.001, "", 1.5)


def test_visits_take_turns_and_their_steps_come_together(monkeypatch, tmp_path, no_rank):
    visited, written = [], []

    def rows():
        with (tmp_path / "train_step.csv").open(newline="") as file:
            return [*csv.DictReader(file)]

    def one_visit(name, options, extra, seconds, no_profile):
        written.append(len(rows()) if visited else 0)
        visited.append((name, no_profile))
        assert extra == ["--num-layers", "1"]
        if name == "torch_native dense":
            raise Failed("CompilationError: no such type")
        return measured([Step(2.0 if "top_k" in name else 1.0, 1.0, 2.0)] * 3)

    monkeypatch.setattr(train_step, "one_visit", one_visit)
    command = ["train_step.py", "--apart", "--backends", "torch_native", "--num-layers", "1"]
    command += ["--routings", "top_k", "dense", "dtop_p", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    train_step.main()
    names = [f"torch_native {routing}" for routing in ("top_k", "dense", "dtop_p")]
    # The one that fails is not visited again.
    assert visited == [*((name, False) for name in names), (names[0], True), (names[2], True)]
    # Whatever ends the next visit, this one's rows are there.
    assert written == [0, 1, 2, 4, 4]
    top_k, dense, dtop_p, ratio = rows()
    assert (top_k["rounds"], dtop_p["rounds"]) == ("6", "6")
    assert dense["failed"] == "CompilationError: no such type"
    assert dtop_p["of_ceiling"] == "0.002"
    assert ratio["speed_ratio"] == "2.000 [2.000, 2.000]"
    assert (tmp_path / "train_step_profile.txt").read_text().count("train: tiny") == 2


@pytest.mark.long
@pytest.mark.megatron
def test_visits_are_processes_and_one_that_cannot_run_is_named(tmp_path):
    """Seventeen of sixteen experts are refused in its process."""
    command = """benchmarks/train_step.py --model paper --backends torch_native --apart --visits 2
        --routings top_k@17 dtop_p --settle 1 --rounds 2
        --num-layers 2 --hidden-size 32 --ffn-hidden-size 32 --num-attention-heads 2
        --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4"""
    done = subprocess.run(
        [sys.executable, *command.split(), "--output", str(tmp_path)],
        cwd=measure.ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    with (tmp_path / "train_step.csv").open(newline="") as file:
        top_k, dtop_p = csv.DictReader(file)
    assert top_k["provider"] == "torch_native top_k@17"
    assert top_k["failed"]
    assert top_k["failed"] in done.stdout
    assert "in topk_routing_with_score_function" in done.stdout  # the end of its traceback
    assert (dtop_p["rounds"], dtop_p["failed"]) == ("4", "")
    assert "one model at a time" in dtop_p["workload"]


def test_no_visit_begins_that_would_pass_the_time(monkeypatch, capsys, no_rank):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(train_step.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(train_step, "one_visit", lambda *_, **__: measured([Step(1.0, 1.0, 2.0)]))
    options = train_step.parser().parse_args(["--seconds-budget", "55", "--visits", "2"])
    rows = measure.Rows(None, "torch")
    options.no_append = True
    train_step.visit_apart(["a x", "b x"], options, [], rows)
    assert [(row["provider"], row["rounds"]) for row in rows.new] == [("a x", "1"), ("b x", "1")]
    assert "a x gets no visit 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("top_k", ("top_k", 2, None)),
        ("dtop_p@1.82", ("dtop_p", 1.82, None)),
        ("dtop_p/4", ("dtop_p", 2, 4)),
        ("dense@4", ("dense", 4, None)),
    ],
)
def test_routings_of_the_command_line(given, parsed):
    assert Routing.parse(given) == parsed
    assert str(Routing.parse(given)) == given


@pytest.mark.parametrize("given", ["top_p", "top_k@1.5", "dtop_p@0.5", "dense@x", "top_k/4"])
def test_other_routings_are_refused(given):
    with pytest.raises(ValueError):
        Routing.parse(given)


def test_words_are_tokens_of_the_vocabulary(monkeypatch, tmp_path):
    documents = ["a a a b, b", "", "c d e f g h i j k l m n o p q"]
    monkeypatch.setattr(text, "corpus", lambda: documents)
    monkeypatch.setattr(text.measure, "ROOT", tmp_path)
    prefix = text.words_as_tokens(16)
    tokens = np.fromfile(prefix.with_suffix(".bin"), np.uint16).tolist()
    # The most frequent words come first; the last id ends each document, the empty one too.
    assert tokens[:8] == [0, 0, 0, 1, 2, 1, 15, 15]
    # 14 words have ids of their own, the others share what is left.
    assert tokens[8:] == [*range(3, 14), 14, 14, 14, 14, 15]
    assert text.words_as_tokens(16) == prefix


@pytest.mark.megatron
@pytest.mark.parametrize("text", ["dtop_p@1.82", "dtop_p/4", "top_k"])
def test_a_command_line_trains_what_the_benchmark_builds(text):
    from megatron_dynmoe.jobs.parse import read_args
    from megatron_dynmoe.settings.arguments import resolved_from_args

    routing = Routing.parse(text)
    args = read_args(flags_of_training("paper", routing, "torch_native"))
    assert resolved_from_args(args, 16) == settings(routing, "torch_native").resolve(16)
    assert (args.num_layers, args.vocab_size, args.bf16) == (24, 32000, True)
    if text == "top_k":
        assert args.moe_router_topk == 2
        assert args.moe_router_load_balancing_type == [BALANCE_LOSS[0]]
        assert args.moe_aux_loss_coeff == [BALANCE_LOSS[1]]
