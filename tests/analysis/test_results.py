"""The whole command: what it writes, merges and refuses."""

import base64
import json
import math
import re
import shutil
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dynmoe.analysis.counting.counts import RoutingCounts, Shape
from megatron_dynmoe.analysis.counting.windows import TextFile, read_windows
from megatron_dynmoe.analysis.results import figures
from megatron_dynmoe.cli import analyze as analyze_command
from megatron_dynmoe.storage.manifest import write_manifest
from megatron_dynmoe.use.load import load_tokenizer
from tests.helpers.commands import exit_code_of
from tests.helpers.tiny_export import export_tiny

main = partial(exit_code_of, analyze_command.main)


pytestmark = pytest.mark.slow  # each worker would make the folder of results

SWEEP = "0.2,0.8"


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory, exported: Path, texts: dict[str, Path]
) -> Path:
    return analyze(tmp_path_factory.mktemp("report") / "both", exported, *texts.values())


def analyze(output: Path, model: Path, *data: Path, flags: tuple[str, ...] = ()) -> Path:
    command = ["--model", model, "--data", *data, "--output", output, "--sequence-length", 32]
    command += ["--sweep", SWEEP, "--sweep-tokens", 256, "--min-count", 5, *flags]
    assert main([str(word) for word in command]) == 0
    return output


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the figures out, which take most of the time."""
    monkeypatch.setattr("megatron_dynmoe.analysis.results.figures.draw_all", lambda *_: {})


def content(report: Path) -> dict[str, Any]:
    return json.loads((report / "routing.json").read_text())


def test_all_files_are_there(report: Path) -> None:
    names = sorted(path.name for path in report.iterdir())
    assert names == ["figures", "index.html", "routing.json"]
    figures = {path.name for path in (report / "figures").iterdir()}
    assert {"layers.png", "layers.svg", "sweep.png", "together.svg", "groups.svg"} <= figures
    assert {"budgets.png", "budgets.svg"} <= figures
    for path in (report / "figures").glob("*.svg"):
        xml.etree.ElementTree.parse(path)
    for path in (report / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_else(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert "{{" not in page
    for outside in ("@import", '<link rel="stylesheet', "fetch("):
        assert outside not in page
    images = re.findall(r'<img alt="[^"]+" src="data:image/svg\+xml;base64,([^"]+)">', page)
    assert page.count("src=") == page.count("<figure ") == len(images) == 11
    saved = {path.read_bytes() for path in (report / "figures").glob("*.svg")}
    assert {base64.b64decode(image) for image in images} == saved


def test_the_numbers_hang_together(report: Path) -> None:
    found = content(report)
    assert found["model"]["moe_layers"] == [1, 3]
    statistics = found["statistics"]
    means = [row["experts_per_token"]["mean"] for row in statistics["layers"]]
    overall = statistics["all"]["experts_per_token"]["mean"]
    assert overall == pytest.approx(sum(means) / 2)
    tokens = {name: row["tokens"] for name, row in statistics["groups"].items()}
    assert list(tokens) == ["prose", "figures"]
    assert sum(tokens.values()) == statistics["all"]["tokens"]
    assert statistics["all"]["loss"] == pytest.approx(
        sum(
            row["loss"] * found["groups"][name]["predicted"]
            for name, row in statistics["groups"].items()
        )
        / sum(group["predicted"] for group in found["groups"].values())
    )
    assert [point["threshold"] for point in found["sweep"]["points"]] == [0.2, 0.8]
    assert found["samples"]["figures"][0]["text"].startswith("0")
    assert not any("{" in note for note in found["notes"])


@pytest.mark.slow
def test_again_is_the_same_to_the_byte(
    report: Path, tmp_path: Path, exported: Path, texts: dict[str, Path]
) -> None:
    again = analyze(tmp_path / "again", exported, *texts.values())
    for path in report.rglob("*.*"):
        assert (again / path.relative_to(report)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.usefixtures("undrawn")
def test_reports_of_parts_merge_into_the_whole(
    report: Path, tmp_path: Path, exported: Path, texts: dict[str, Path]
) -> None:
    parts = [analyze(tmp_path / name, exported, path) for name, path in texts.items()]
    files = [str(part / "routing.json") for part in parts]
    assert main(["--merge", *files, "--output", str(tmp_path / "m"), "--min-count", "5"]) == 0
    merged, whole = content(tmp_path / "m"), content(report)
    assert merged["groups"] == whole["groups"]
    assert merged["token_texts"] == whole["token_texts"]
    assert (tmp_path / "m" / "index.html").exists()


def test_tokens_without_an_expert_count_as_none(
    tmp_path: Path,
    tokenizer_model: Path,
    texts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rule that leaves tokens without one: some in the first layer, and all in the last."""
    nulls = tmp_path / "nulls"
    model = export_tiny(
        nulls,
        tokenizer_model,
        routing="null_experts",
        max_experts_per_token=3,
        rule_settings={"null_slots": 8, "null_kind": "zero"},
        router_state={"share": [[0.25], None, [0.25]], "null_bias": [[3.0], None, [50.0]]},
    )
    whole = content(analyze(tmp_path / "whole", nulls, *texts.values()))
    shape = Shape(**whole["shape"])
    histogram = Counter[int]()
    for name, path in texts.items():
        windows = read_windows([TextFile(path, name)], load_tokenizer(nulls), 32)
        for window in windows:
            with torch.no_grad():
                counts_LT = model(torch.tensor([window.tokens])).experts_per_token[:, 0]
            assert not counts_LT[1].any()
            histogram.update(counts_LT[0].tolist())
    tokens = sum(histogram.values())
    assert set(histogram) == {0, 1, 2, 3} and histogram[0] > tokens / 10
    counted = RoutingCounts(shape)
    for group in whole["groups"].values():
        counted += RoutingCounts.from_json(shape, group)
    assert {k: n for k, n in enumerate(counted.experts_LK[0]) if n} == dict(histogram)
    assert counted.experts_LK[1].tolist() == [tokens] + [0] * 8

    statistics = whole["statistics"]
    mean = sum(number * times for number, times in histogram.items()) / tokens
    first, last = statistics["layers"]
    assert first["experts_per_token"]["mean"] == pytest.approx(mean)
    assert first["experts_per_token"]["min"] == 0
    assert statistics["all"]["experts_per_token"]["mean"] == pytest.approx(mean / 2)
    assert set(last["experts_per_token"].values()) == {0}
    assert last["unused_experts"] == list(range(8)) and last["load_max_over_mean"] is None
    assert all(row["load_over_mean"] is None for row in statistics["experts"][8:])

    without = (histogram[0] + tokens) / (2 * tokens)
    assert f"{100 * without:.1f} % have none" in (tmp_path / "whole" / "index.html").read_text()

    monkeypatch.setattr(figures, "draw_all", lambda *_: {})
    parts = [analyze(tmp_path / name, nulls, path) for name, path in texts.items()]
    files = [str(part / "routing.json") for part in parts]
    assert main(["--merge", *files, "--output", str(tmp_path / "m"), "--min-count", "5"]) == 0
    merged = content(tmp_path / "m")
    assert merged["groups"] == whole["groups"] and merged["statistics"] == statistics


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": {}}, "it has no groups"),
        ({"model": None}, "incomplete or damaged"),
        ({}, "would count twice"),
    ],
)
def test_bad_measurements_do_not_merge(
    report: Path, tmp_path: Path, capsys: Any, change: dict[str, Any], message: str
) -> None:
    changed = {k: v for k, v in (content(report) | change).items() if v is not None}
    (tmp_path / "other.json").write_text(json.dumps(changed))
    files = [str(tmp_path / "other.json"), str(report / "routing.json")]
    if change:
        files.pop()
    assert main(["--merge", *files, "--output", str(tmp_path / "m")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_other_models_do_not_merge(
    report: Path, tmp_path: Path, tokenizer_model: Path, texts: dict[str, Path], capsys: Any
) -> None:
    export_tiny(tmp_path / "other", tokenizer_model, routing="top_p", threshold=0.3)
    other = analyze(tmp_path / "report", tmp_path / "other", texts["prose"])
    files = [str(folder / "routing.json") for folder in (report, other)]
    assert main(["--merge", *files, "--output", str(tmp_path / "m")]) == 1
    assert "only measurements of one model" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.usefixtures("undrawn")
def test_another_state_of_the_same_training_does_not_merge(
    report: Path,
    tmp_path: Path,
    exported: Path,
    tokenizer_model: Path,
    texts: dict[str, Path],
    capsys: Any,
) -> None:
    later = tmp_path / exported.parent.name / exported.name
    export_tiny(later, tokenizer_model, seed=1, routing="top_p", threshold=[0.5, None, 0.7])
    files = [report, analyze(tmp_path / "report", later, texts["prose"])]
    command = ["--merge", *(folder / "routing.json" for folder in files)]
    assert main([str(word) for word in [*command, "--output", tmp_path / "m"]]) == 1
    assert "its model is routers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "star"),
    [
        ({}, "as trained"),
        ({"inference_threshold": 0.6}, "as set for inference"),
        ({"inference_experts_per_token": 2}, "as set for inference"),
        ({"inference_max_experts_per_token": 2}, "as set for inference"),
        ({"calibration": {"target_experts_per_token": 2}}, "as set for inference"),
    ],
)
def test_the_star_says_whose_threshold_it_marks(
    tmp_path: Path,
    exported: Path,
    texts: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    star: str,
) -> None:
    alts: list[str] = []

    def draw(content: dict[str, Any], *_: Any) -> dict[str, Any]:
        alts.append(figures._sweep(content["sweep"])[2])
        return {}

    monkeypatch.setattr(figures, "draw_all", draw)
    model = tmp_path / "model"
    shutil.copytree(exported, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    found = content(analyze(tmp_path / "report", model, texts["figures"]))
    assert found["sweep"]["as_trained"] == (star == "as trained")
    assert star in alts[0] or "threshold 0.6" in alts[0]


def test_a_curve_is_drawn_with_and_without_losses() -> None:
    curve = [
        {"experts_per_token": 1.0, "threshold": 0.125, "loss": None},
        {"experts_per_token": 2.5, "threshold": 0.25, "loss": None},
    ]
    for loss, panels, said in ((None, 1, ""), (4.5, 2, ", loss 4.500")):
        figure, title, alt = figures._budgets([point | {"loss": loss} for point in curve])
        assert len(figure.axes) == panels and title == "Budgets"
        assert alt == (f"1 experts: threshold 0.125{said}; 2.5 experts: threshold 0.25{said}")


def test_groups_that_are_not_drawn_are_said(report: Path) -> None:
    counts = RoutingCounts.from_json(
        Shape(**content(report)["shape"]), content(report)["groups"]["prose"]
    )
    for number, title in ((2, "kind of text"), (13, "(the 12 largest groups of 13)")):
        groups = {f"g{i}": counts for i in range(number)}
        assert figures._specialization(groups, [1, 3])[1].endswith(title)


@pytest.mark.slow
def test_top_k_has_nothing_to_compare(
    tmp_path: Path, tokenizer_model: Path, texts: dict[str, Path], capsys: Any
) -> None:
    export_tiny(
        tmp_path / "model", tokenizer_model, routing="top_k", num_experts_per_tok=2, weights="raw"
    )
    found = content(analyze(tmp_path / "report", tmp_path / "model", *texts.values()))
    assert found["statistics"]["all"]["experts_per_token"]["mean"] == 2
    assert found["statistics"]["all"]["rank_correlation"]["own_loss"]["value"] is None
    assert found["sweep"]["own"]["experts"] == 2 != found["sweep"]["points"][0]["experts"]
    assert "uses 2 experts in every layer" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_group_shorter_than_a_window_is_marked(
    tmp_path: Path, exported: Path, texts: dict[str, Path], capsys: Any
) -> None:
    (tmp_path / "short.txt").write_text("a house")
    analyze(tmp_path / "report", exported, texts["prose"], tmp_path / "short.txt")
    assert "short has 5 tokens, fewer than 32" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_questions_that_say_nothing_are_marked(
    tmp_path: Path, exported: Path, texts: dict[str, Path], capsys: Any
) -> None:
    (tmp_path / "one.txt").write_text("a")
    flags = ("--separate-documents",)
    analyze(tmp_path / "report", exported, texts["prose"], tmp_path / "one.txt", flags=flags)
    said = capsys.readouterr().err
    assert "one has 1 token, fewer than 100" in said
    assert "one has no token that follows another, and so no loss" in said


@pytest.mark.usefixtures("undrawn")
def test_skipped_records_are_said(
    tmp_path: Path, exported: Path, texts: dict[str, Path], capsys: Any
) -> None:
    (tmp_path / "a.jsonl").write_text(texts["prose"].read_text() + "{\n")
    analyze(tmp_path / "report", exported, tmp_path / "a.jsonl", flags=("--on-error", "skip"))
    assert "1 record that could not be read: left out" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_another_tokenizer_is_refused_or_marked(
    tmp_path: Path, exported: Path, texts: dict[str, Path], capsys: Any
) -> None:
    """Of the same size, and, where the model brings none to compare with, of half of it."""
    from megatron_dynmoe.conversion.hugging_face.tokenizer import export_tokenizer
    from megatron_dynmoe.data.train_tokenizer import train_tokenizer

    other, small = tmp_path / "other", tmp_path / "small"
    shutil.copytree(exported, other, ignore=shutil.ignore_patterns("*.safetensors"))
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    pieces = vocabulary["model"]["vocab"]
    vocabulary["model"]["vocab"] = {
        piece: 859 - i if i >= 260 else i for piece, i in pieces.items()
    }
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    small.mkdir()
    shutil.copy(exported / "config.json", small)
    export_tokenizer(train_tokenizer([str(texts["prose"])], str(tmp_path / "t"), 300), small)

    command = ["--model", exported, "--data", texts["prose"], "--tokenizer", other]
    assert main([str(word) for word in [*command, "--output", tmp_path / "report"]]) == 2
    assert "is not the model's" in capsys.readouterr().err
    analyze(tmp_path / "r1", exported, texts["prose"], flags=("--tokenizer", str(exported)))
    without = tmp_path / "without"
    shutil.copytree(exported, without, ignore=shutil.ignore_patterns("token*"))
    flags = ("--tokenizer", str(small))
    analyze(tmp_path / "r2", without, texts["prose"], flags=flags)
    assert "The tokenizer has 300 tokens and the model 608" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_an_exchanged_tokenizer_is_marked(
    tmp_path: Path, exported: Path, texts: dict[str, Path], capsys: Any
) -> None:
    shutil.copytree(exported, tmp_path / "model")
    write_manifest(tmp_path / "model")
    analyze(tmp_path / "r1", tmp_path / "model", texts["prose"])
    assert "changed after" not in capsys.readouterr().err
    vocabulary = tmp_path / "model" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text() + " ")
    analyze(tmp_path / "r2", tmp_path / "model", texts["prose"])
    assert "tokenizer.json changed after the model was exported" in capsys.readouterr().err


def test_a_loss_worse_than_guessing_is_marked(report: Path) -> None:
    found = content(report)  # random weights, large ones
    assert found["statistics"]["all"]["loss"] > math.log(found["model"]["vocab_size"])
    assert any("worse than guessing" in note for note in found["notes"])


@pytest.mark.usefixtures("undrawn")
def test_a_source_field_makes_groups(
    tmp_path: Path, exported: Path, texts: dict[str, Path]
) -> None:
    flags = ("--source-key", "source", "--separate-documents")
    found = content(analyze(tmp_path / "report", exported, texts["prose"], flags=flags))
    assert set(found["groups"]) == {"s0", "s1"}


def _dense(folder: Path, tokenizer: Path) -> None:
    export_tiny(folder, tokenizer, mlp_layer_types=["dense"] * 3)


def _small_vocabulary(folder: Path, tokenizer: Path) -> None:
    export_tiny(folder, tokenizer, vocab_size=300, routing="top_p", threshold=0.5)


def _without_tokenizer(folder: Path, tokenizer: Path) -> None:
    export_tiny(folder, tokenizer, routing="top_p", threshold=0.5)
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _nan(folder: Path, tokenizer: Path) -> None:
    export_tiny(folder, tokenizer, routing="top_p", threshold=0.5)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.router.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _gpt2(folder: Path, tokenizer: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def _no_model(folder: Path, tokenizer: Path) -> None:
    folder.mkdir()


def _nothing(folder: Path, tokenizer: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (_dense, 1, "no layer with experts"),
        (_small_vocabulary, 1, "another model's tokenizer"),
        (_without_tokenizer, 2, "--tokenizer"),
        (_nan, 1, "router of layer 1 gives NaN"),
        (_gpt2, 1, "model_type is 'gpt2' and architectures None: the formats that"),
        (_nothing, 2, "there is no such folder"),
        (_no_model, 2, "neither an exported model (config.json) nor the checkpoints"),
    ],
)
def test_bad_models_are_refused(
    tmp_path: Path,
    tokenizer_model: Path,
    texts: dict[str, Path],
    capsys: Any,
    make: Callable[[Path, Path], None],
    code: int,
    message: str,
) -> None:
    make(tmp_path / "model", tokenizer_model)
    output = tmp_path / "report"
    command = ["--model", tmp_path / "model", "--data", texts["prose"], "--output", output]
    assert main([str(word) for word in command]) == code
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("", [], "holds no text"),
        ("a house", [], "less than one window of 64"),
        ("a house", ["--sequence-length", "65"], "the model has 64 positions"),
        ("a house", ["--tokens", "20"], "--tokens lets 20 tokens be read, less than one window"),
    ],
)
def test_too_little_text_is_refused(
    tmp_path: Path, exported: Path, capsys: Any, text: str, flags: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text(text)
    command = ["--model", str(exported), "--data", str(tmp_path / "a.txt"), *flags]
    code = 2 if flags else 1  # too little text is no misuse, but such a flag is
    assert main([*command, "--output", str(tmp_path / "report")]) == code
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_not_replaced_by_accident(
    report: Path, tmp_path: Path, exported: Path, texts: dict[str, Path], capsys: Any
) -> None:
    shutil.copytree(report, tmp_path / "r")
    flags = ["--merge", str(report / "routing.json"), "--output", str(tmp_path / "r")]
    assert main(flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*flags, "--overwrite", "--min-count", "5"]) == 0


def test_nothing_that_is_read_is_replaced(
    tmp_path: Path, exported: Path, texts: dict[str, Path], capsys: Any
) -> None:
    model, text = tmp_path / "run" / "model", tmp_path / "texts" / "prose.jsonl"
    shutil.copytree(exported, model)
    text.parent.mkdir()
    shutil.copy(texts["prose"], text)
    for output, read in ((model, model), (model.parent, model), (text.parent, text)):
        command = ["--model", model, "--data", text, "--output", output, "--overwrite"]
        assert main([str(word) for word in command]) == 2
        assert f"{output} is or holds {read}, which is read" in capsys.readouterr().err
    assert (model / "model.safetensors").is_file() and text.is_file()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_read(
    tmp_path: Path, exported: Path, texts: dict[str, Path], capsys: Any
) -> None:
    output = texts["prose"] / "below" / "report"
    command = ["--model", tmp_path / "none", "--data", texts["prose"], "--output", output]
    assert main([str(word) for word in command]) == 2
    assert f"{texts['prose']} is a file: name a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_hostile_names_do_not_reach_the_terminal(
    tmp_path: Path, exported: Path, texts: dict[str, Path], capsys: Any
) -> None:
    names = ("", "\x1b[2Jgone\nand on", "long" * 99)
    text = json.loads(texts["prose"].read_text().splitlines()[0])["text"]
    records = "".join(json.dumps({"text": text, "source": name}) + "\n" for name in names)
    (tmp_path / "a.jsonl").write_text(records)
    flags = ("--source-key", "source")
    found = content(analyze(tmp_path / "report", exported, tmp_path / "a.jsonl", flags=flags))
    assert list(found["groups"]) == ["(empty)", *names[1:]]
    said = capsys.readouterr()
    rows = said.out.splitlines()
    for text in (said.out, said.err):
        assert "\x1b" not in text
    assert any(row.startswith("\ufffd[2Jgone and on ") for row in rows)
    assert max(map(len, rows[: len(names) + 4])) < 100


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--model", "m"],
        ["--merge", "a.json", "--model", "m"],
        ["--model", "m", "--group", "a=b", "--source-key", "k"],
        ["--model", "m", "--group", "file"],
        ["--model", "m", "--data", "f", "--sweep", "2"],
    ],
)
def test_usage(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        analyze_command.main(flags)
    assert stopped.value.code == 2
