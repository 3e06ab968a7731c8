"""The threshold for a target on real text: what is measured, found, printed and written."""

import gzip
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dynmoe.cli import calibrate as command
from megatron_dynmoe.control import mean_experts_per_token
from megatron_dynmoe.layers.rules import LAYER_RULES
from megatron_dynmoe.storage.manifest import write_manifest
from megatron_dynmoe.use import calibrate as calibration
from megatron_dynmoe.use.calibrate import Calibration, Measurement, calibrate, measure, read_tokens
from megatron_dynmoe.use.load import load_config, load_model, load_tokenizer
from tests.helpers.tiny_export import BOOK, VOCAB_SIZE, export_tiny, make_tokenizer

NUM_TOKENS = 4096
MODELS: dict[str, dict[str, Any]] = {
    "top_p": {"routing": "top_p", "threshold": 0.5},
    "dtop_p": {"routing": "dtop_p", "threshold": 0.4, "theta": [1.3, None, 0.8]},
    "top_k": {"routing": "top_k", "num_experts_per_tok": 2, "weights": "raw"},
}
SPARSE = [True, False, True]


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> dict[str, Path]:
    folders = {}
    for name, settings in MODELS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        export_tiny(folders[name], tokenizer_model, **settings)
        write_manifest(folders[name])
    return folders


@pytest.fixture(scope="module")
def tokens_NS(folders: dict[str, Path]) -> Tensor:
    tokenizer = load_tokenizer(folders["top_p"])
    return read_tokens([str(BOOK)], tokenizer, num_tokens=NUM_TOKENS, sequence_length=64)


@pytest.fixture
def tool() -> Callable[..., None]:
    def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["calibrate_threshold.py", *map(str, flags)])
        command.main()

    return run


def measured_by_hand(folder: Path, tokens_NS: Tensor) -> list[float]:
    """Mean experts of each MoE layer, one sequence at a time, of what is in the folder."""
    model = load_model(folder, load_config(folder))
    with torch.no_grad():
        counts = [model(row.unsqueeze(0)).experts_per_token[:, 0] for row in tokens_NS]
    return torch.cat(counts, dim=1).double().mean(dim=1).tolist()


# Text


def test_documents_are_packed_as_in_training(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders["top_p"])
    texts = ["and so they were", "naïve 日本\n", "very good"]
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    stream = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    for name in ("a.jsonl", "a.jsonl.gz"):
        tokens_NS = read_tokens(
            [str(tmp_path / name)],
            tokenizer,
            num_tokens=10**6,
            sequence_length=4,
            text_key="body",
        )
        whole = len(stream) // 4 * 4
        assert tokens_NS.flatten().tolist() == stream[:whole]
    (tmp_path / "a.txt").write_text(texts[0])
    tokens_NS = read_tokens([str(tmp_path / "a.txt")], tokenizer, num_tokens=99, sequence_length=99)
    assert tokens_NS.tolist() == [[*tokenizer(texts[0])["input_ids"], 2]]
    # A folder, after another file: in the order in which they are named.
    (tmp_path / "folder").mkdir()
    with gzip.open(tmp_path / "folder" / "b.txt.gz", "wt") as file:
        file.write(texts[2])
    both = [str(tmp_path / "a.txt"), str(tmp_path / "folder")]
    tokens_NS = read_tokens(both, tokenizer, num_tokens=99, sequence_length=99)
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in texts[::2]]
    assert tokens_NS.tolist() == [ids[0] + ids[1]]


def test_no_more_tokens_than_asked_for(tokens_NS: Tensor) -> None:
    assert tokens_NS.shape == (NUM_TOKENS // 64, 64)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "missing.txt", "no such file"),
        (b"", "empty.txt", "there is no text"),
        (b"", "empty.jsonl", "there is no text"),
        (b"\xff", "latin.txt", "not valid UTF-8"),
        (b"text\n", "plain.jsonl", "line 1: not valid JSON"),
        (b'{"body": "x"}\n', "other.jsonl", "no field 'text'"),
        (b"\x1f\x8b", "broken.jsonl.gz", "cannot be read"),
    ],
)
def test_bad_data_is_named(
    folders: dict[str, Path], tmp_path: Path, content: bytes | None, name: str, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    tokenizer = load_tokenizer(folders["top_p"])
    with pytest.raises(ValueError, match=message) as error:
        read_tokens([str(tmp_path / name)], tokenizer, num_tokens=9, sequence_length=9)
    assert name in str(error.value)


# Measuring


def test_measures_loss_and_experts(folders: dict[str, Path], tokens_NS: Tensor) -> None:
    model = load_model(folders["dtop_p"], load_config(folders["dtop_p"]))
    tokens_NS = tokens_NS[:9]
    losses = []
    with torch.no_grad():
        for row in tokens_NS:
            log_probs = model(row.unsqueeze(0)).logits[0].double().log_softmax(-1)
            losses += [-log_probs[i, token].item() for i, token in enumerate(row[1:].tolist())]
    for batch_size in (1, 4, 64):
        measured = measure(model, tokens_NS, batch_size)
        assert measured.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        by_hand = measured_by_hand(folders["dtop_p"], tokens_NS)
        assert measured.experts_by_layer == pytest.approx(by_hand, abs=1e-9)
        assert measured.perplexity == pytest.approx(math.exp(measured.loss))
        assert measured.tokens == tokens_NS.numel()


def test_sample_has_the_probabilities_that_select(
    folders: dict[str, Path], tokens_NS: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all tokens sampled, the sample's means are the counted ones, theta included."""
    model = load_model(folders["dtop_p"], load_config(folders["dtop_p"]))
    measured = measure(model, tokens_NS, 16)
    for probs_TE, mean in zip(measured.probs_LTE, measured.experts_by_layer, strict=True):
        assert mean_experts_per_token(probs_TE, 0.4).item() == pytest.approx(mean, abs=1e-3)
    monkeypatch.setattr(calibration, "MAX_SAMPLED_PROBS", 1000)
    sample = measure(model, tokens_NS, 16).probs_LTE
    assert sample.shape[0] == 2 and 0 < sample.numel() <= 1100


# Searching


class Plant:
    """Layers whose probabilities depend on the thresholds of the layers before."""

    def __init__(self, num_layers: int = 4, feedback: float = 2.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits_LTE = torch.randn(num_layers, 3000, 8, generator=generator)
        self.feedback = feedback
        self.passes = 0

    def measure_at(self, threshold: Any, _label: str = "") -> Measurement:
        self.passes += 1
        num_layers = len(self.logits_LTE)
        per_layer = threshold if isinstance(threshold, list) else [threshold] * num_layers
        probs, means, scale = [], [], 1.0
        for logits_TE, value in zip(self.logits_LTE, per_layer, strict=True):
            probs_TE = (logits_TE * scale).softmax(-1)
            means.append(mean_experts_per_token(probs_TE, value).item())
            probs.append(probs_TE[::10])  # a sample
            scale = 1.0 + self.feedback / means[-1]
        return Measurement(0.0, means, 3000, torch.stack(probs))


@pytest.mark.parametrize("target", [1.0, 1.2, 2.0, 3.7, 7.5, 8.0])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_reaches_the_target_though_layers_feed_back(target: float, scope: str) -> None:
    plant = Plant()
    start = plant.measure_at(0.3)
    found = calibrate(plant.measure_at, start, target, scope=scope, sparse=[True] * 4)
    again = plant.measure_at(found.threshold)
    if scope == "layer":
        assert isinstance(found.threshold, list)
        assert again.experts_by_layer == pytest.approx([target] * 4, abs=0.01)
        assert again.experts_by_layer == pytest.approx([target] * 4, rel=0.005)
    else:
        assert isinstance(found.threshold, float)
        assert again.experts == pytest.approx(target, abs=0.01)
        assert again.experts == pytest.approx(target, rel=0.005)
    assert found.measurement.experts_by_layer == again.experts_by_layer
    assert plant.passes <= 12


def test_one_shot_would_miss() -> None:
    """Else the test above would show nothing."""
    plant = Plant()
    probs_LTE = plant.measure_at(0.3).probs_LTE
    one_shot = calibration.threshold_for_target(probs_LTE.flatten(0, 1), 2.0)
    assert abs(plant.measure_at(one_shot).experts - 2.0) > 0.1


def test_cap_counts() -> None:
    plant = Plant(feedback=0.0)

    def capped(threshold: Any, label: str = "") -> Measurement:
        measured = plant.measure_at(threshold, label)
        probs_LTE = (plant.logits_LTE).softmax(-1)
        means = [mean_experts_per_token(p, threshold, 2).item() for p in probs_LTE]
        return Measurement(0.0, means, 3000, measured.probs_LTE)

    found = calibrate(capped, capped(0.3), 1.9, cap=2, sparse=[True] * 4)
    assert capped(found.threshold).experts == pytest.approx(1.9, abs=0.0095)


def test_a_jump_over_the_target_is_refused() -> None:
    def measure_at(threshold: Any, _label: str = "") -> Measurement:
        probs_LTE = torch.full((1, 100, 4), 0.25)
        mean = mean_experts_per_token(probs_LTE[0], threshold).item()
        return Measurement(0.0, [mean], 100, probs_LTE)

    with pytest.raises(ValueError, match=r"no threshold gives 1.5 experts per token within 0.0075"):
        calibrate(measure_at, measure_at(0.1), 1.5, sparse=[True])


# The tool


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", MODELS)
def test_writes_a_threshold_that_gives_the_target(
    name: str,
    scope: str,
    folders: dict[str, Path],
    tokens_NS: Tensor,
    tool: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = folders[name], tmp_path / "calibrated"
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    flags = ["--model", source, "--data", BOOK, "--tokens", NUM_TOKENS, "--target", 2.5]
    flags += ["--scope", scope, "--sweep", "0.2,0.9", "--output", output]
    tool(monkeypatch, *flags)

    # 1. The target, measured anew
    means = measured_by_hand(output, tokens_NS)
    assert sum(means) / 2 == pytest.approx(2.5, abs=0.01)
    if scope == "layer":
        assert means == pytest.approx([2.5, 2.5], abs=0.01)

    # 2. The config: only what has to change
    old, new = json.loads(before["config.json"]), json.loads((output / "config.json").read_text())
    record = new.pop("calibration")
    changed = {key for key in old | new if old.get(key) != new.get(key)}
    assert changed == {"threshold", "target_experts_per_token"} | (
        {"routing", "num_experts_per_tok"} if name == "top_k" else set()
    )
    assert new["routing"] == ("top_p" if name == "top_k" else name)
    assert new["weights"] == old["weights"] and new["target_experts_per_token"] == 2.5
    if scope == "layer":
        assert [value is not None for value in new["threshold"]] == SPARSE
    assert record["mean_experts_per_token"] == pytest.approx(sum(means) / 2, abs=1e-6)
    expected = {"scope": scope, "data": BOOK.name, "tokens": NUM_TOKENS}
    assert expected.items() <= record.items() and record["loss"] > 0
    if name == "top_k":
        assert record["before"] == {"routing": "top_k", "num_experts_per_tok": 2}

    # 3. The folder: a full copy, its manifest right, the source as it was
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert {file.name for file in output.iterdir()} == set(before)
    for file in output.iterdir():
        assert not file.is_symlink()
        if file.name not in ("config.json", "manifest.json"):
            assert file.read_bytes() == before[file.name]
    manifest = json.loads((output / "manifest.json").read_text())["files"]
    for file_name, entry in manifest.items():
        data = (output / file_name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert [path.name for path in tmp_path.iterdir()] == ["calibrated"]

    # 4. The table
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    own = next(row for row in rows if "(own)" in row)
    assert "+0.0000" in own
    if name == "top_k":
        assert own[:3] == ["top-2", "(own)", "2.000"]
    assert any(row[-3:] == ["<-", "target", "2.5"] for row in rows)
    sweep = {row[1]: row[2] for row in rows if row[:1] == ["threshold"]}
    model = load_model(source, load_config(source))
    calibration.set_threshold(model.config, 0.9)
    assert float(sweep["0.9"]) == pytest.approx(measure(model, tokens_NS, 16).experts, abs=6e-4)


def test_cap_and_in_place(
    folders: dict[str, Path],
    tokens_NS: Tensor,
    tool: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for file in folders["top_p"].iterdir():
        os.link(file, tmp_path / file.name)
    flags = ["--model", tmp_path, "--data", BOOK, "--tokens", NUM_TOKENS, "--target", 1.8]
    flags += ["--max-experts-per-token", 2, "--sweep", "none", "--in-place"]
    tool(monkeypatch, *flags)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["inference_max_experts_per_token"] == 2
    means = measured_by_hand(tmp_path, tokens_NS)
    assert sum(means) / 2 == pytest.approx(1.8, abs=0.009)
    model = load_model(tmp_path, load_config(tmp_path))
    assert model(tokens_NS[:2]).experts_per_token.max() == 2
    # Renamed, not rewritten: what is linked to the old file keeps it.
    assert json.loads((folders["top_p"] / "config.json").read_text())["threshold"] == 0.5


def test_own_inference_threshold_gives_way(
    tokenizer_model: Path,
    tokens_NS: Tensor,
    tool: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export_tiny(tmp_path, tokenizer_model, threshold=0.5, inference_threshold=0.9)
    flags = ["--model", tmp_path, "--data", BOOK, "--tokens", NUM_TOKENS, "--target", 1.5]
    tool(monkeypatch, *flags, "--sweep", "none", "--in-place")
    assert sum(measured_by_hand(tmp_path, tokens_NS)) / 2 == pytest.approx(1.5, abs=0.0075)


def stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """What changes if a file is written, but not if it is read; its atime would."""
    found = {file.name: file.stat() for file in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def test_nothing_is_written_unless_asked(
    folders: dict[str, Path],
    tool: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = stamps(folders["top_p"])
    flags = ["--model", folders["top_p"], "--data", BOOK, "--tokens", 640, "--target", 2]
    tool(monkeypatch, *flags, "--sweep", "none")
    assert "nothing was written" in capsys.readouterr().out
    assert stamps(folders["top_p"]) == before


def test_mixtral_becomes_ours(
    folders: dict[str, Path],
    tokens_NS: Tensor,
    tool: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.6,
    )
    mixtral = transformers.MixtralForCausalLM(config).eval()
    source, output = tmp_path / "mixtral", tmp_path / "calibrated"
    mixtral.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((folders["top_p"] / name).read_bytes())
    flags = ["--model", source, "--data", BOOK, "--tokens", NUM_TOKENS, "--target", 2]
    with pytest.raises(SystemExit, match="2"):
        tool(monkeypatch, *flags, "--in-place")
    assert "--in-place: a folder of format mixtral" in capsys.readouterr().err
    tool(monkeypatch, *flags, "--sweep", "none", "--output", output)
    own = next(line for line in capsys.readouterr().out.splitlines() if "(own)" in line)
    with torch.no_grad():
        losses = [mixtral(row[None], labels=row[None]).loss.item() for row in tokens_NS]
    assert own.split()[2] == "2.000"
    assert float(own.split()[3]) == pytest.approx(sum(losses) / len(losses), abs=2e-4)
    assert sum(measured_by_hand(output, tokens_NS)) / 2 == pytest.approx(2.0, abs=0.01)
    assert json.loads((output / "config.json").read_text())["weights"] == "renormalized"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibrated", "mixtral"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "0.5"], "--target is 0.5.*use 1 to 8"),
        (["--target", "nan"], "--target is nan"),
        (["--target", "3", "--max-experts-per-token", "2"], "--target is 3.*use 1 to 2"),
        (["--target", "2", "--max-experts-per-token", "9"], "the model has 8 experts"),
        (["--target", "2", "--sequence-length", "65"], "the model has 64 positions"),
        (
            ["--target", "2", "--data", "missing.txt"],
            "--data is missing.txt: there is no such file",
        ),
        (["--target", "2", "--model", "missing"], "--model is missing: there is no such folder"),
        (
            ["--target", "2", "--output", "tests"],
            "--output: tests is not empty: name another folder$",
        ),
        (["--target", "2", "--output", "no/where"], "there is no folder no"),
    ],
)
def test_bad_flags_are_named(
    flags: list[str],
    message: str,
    folders: dict[str, Path],
    tool: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as error:
        tool(monkeypatch, "--model", folders["top_p"], "--data", BOOK, "--tokens", 64, *flags)
    said = capsys.readouterr().err.strip()
    assert error.value.code == 2 and re.search(message, said) and "\n" not in said


# Settings that a rule has beside those of all, with a value of each.
OF_RULES = {
    "threshold_decay": 0.99,
    "null_slots": 8,
    "null_kind": "zero",
    "control_law": "pi",
}


@pytest.mark.parametrize("goal", [["--target", "2"], ["--budgets", "1,2"]], ids=["one", "curve"])
@pytest.mark.parametrize("routing", LAYER_RULES)
def test_a_rule_without_a_threshold_for_all_layers_is_refused_in_one_line(
    routing: str,
    goal: list[str],
    tmp_path: Path,
    tokenizer_model: Path,
    tool: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule = LAYER_RULES[routing]
    state = {
        name: [[0.125] * length if sparse else None for sparse in SPARSE]
        for name, length in rule.lengths(8).items()
    }
    settings = {name: OF_RULES[name] for name in rule.settings}
    export_tiny(
        tmp_path,
        tokenizer_model,
        routing=routing,
        weights="raw",
        rule_settings=settings or None,
        router_state=state,
    )
    said = f"error: routing is '{routing}', which has no threshold to calibrate: give a model with"
    with pytest.raises(SystemExit, match=said) as error:
        tool(monkeypatch, "--model", tmp_path, "--data", BOOK, "--tokens", 64, *goal)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["1.5", "-0.1", "x", "nan"])
def test_bad_sweep_is_a_usage_error(
    value: str, folders: dict[str, Path], tool: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", folders["top_p"], "--data", BOOK, "--target", 2, f"--sweep={value}"]
    with pytest.raises(SystemExit) as error:
        tool(monkeypatch, *flags)
    assert error.value.code == 2


def test_failure_while_writing_leaves_nothing(
    folders: dict[str, Path],
    tool: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(calibration, "update_manifest", fail)
    flags = ["--model", folders["top_p"], "--data", BOOK, "--tokens", 640, "--target", 2]
    with pytest.raises(SystemExit, match="disk full"):
        tool(monkeypatch, *flags, "--sweep", "none", "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_calibration_is_deterministic(folders: dict[str, Path], tokens_NS: Tensor) -> None:
    def find() -> Calibration:
        model = load_model(folders["top_k"], load_config(folders["top_k"]))
        start = measure(model, tokens_NS, 16)

        def measure_at(threshold: Any, label: str) -> Measurement:
            calibration.set_threshold(model.config, threshold)
            return measure(model, tokens_NS, 16, label)

        return calibrate(measure_at, start, 2.0, sparse=SPARSE)

    first, second = find(), find()
    assert first.threshold == second.threshold
    assert first.measurement.loss == second.measurement.loss
