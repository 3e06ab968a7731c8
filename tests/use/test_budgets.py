"""Budgets on the command line: measured, written, asked for, and shown beside what was counted."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dynmoe.cli import calibrate, evaluate, generate
from megatron_dynmoe.conversion.convert import Target, to_hf
from megatron_dynmoe.huggingface.budgets_dynmoe import check_curve, threshold_at
from megatron_dynmoe.storage.manifest import check_manifest
from megatron_dynmoe.use import calibrate as calibration
from megatron_dynmoe.use.budgets import CLOSE_ENOUGH, MeasuredCurve, points_of, refine
from megatron_dynmoe.use.calibrate import Calibration, Measurement
from megatron_dynmoe.use.load import load_config, load_model, load_tokenizer
from tests.helpers.tiny_export import BOOK, export_tiny, make_tokenizer

BUDGETS = [1.0, 1.5, 2.5, 4.0]
TOKENS = ["--data", str(BOOK), "--tokens", "512"]
PROMPT = ["--prompt", "It is a truth", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder with a card and a manifest, and without a curve."""
    given, folder = tmp_path_factory.mktemp("given"), tmp_path_factory.mktemp("plain") / "model"
    export_tiny(given, make_tokenizer(given), threshold=0.6)
    to_hf(given, Target(folder))
    return folder


@pytest.fixture(scope="module")
def folder(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a curve."""
    folder = tmp_path_factory.mktemp("curve") / "model"
    budgets = ",".join(map(str, reversed(BUDGETS)))  # in any order
    calibrate.main(["--model", str(plain), *TOKENS, "--budgets", budgets, "--output", str(folder)])
    return folder


def copy_of(folder: Path, tmp_path: Path, **words: Any) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy, **words)
    return copy


def change(folder: Path, name: str = "config.json", **words: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | words))


def words_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def said(main: Callable[[list[str]], Any], *flags: Any, capsys: Any) -> str:
    """What a command that fails says, in one line."""
    with pytest.raises(SystemExit) as ended:
        main([str(flag) for flag in flags])
    code = ended.value.code
    text = code if isinstance(code, str) else capsys.readouterr().err
    assert code and "\n" not in text.strip()
    return text


def test_each_point_is_what_its_threshold_gives(plain: Path, folder: Path) -> None:
    curve = words_of(folder)["budget_curve"]
    asked = [point["experts_per_token"] for point in curve]
    assert set(BUDGETS) <= set(asked) and asked == sorted(set(asked))
    assert [point["threshold"] for point in curve] == sorted({p["threshold"] for p in curve})
    tokens_NS = calibration.read_tokens(
        [str(BOOK)], load_tokenizer(plain), num_tokens=512, sequence_length=64
    )
    counted = words_of(folder)["budget_calibration"]["mean_experts_per_token"]
    for point, mean in [*zip(curve, counted, strict=True)][::3]:
        config = load_config(plain)
        config.threshold = point["threshold"]
        model = load_model(plain, config)
        with torch.no_grad():
            outputs = [model(row[None], labels=row[None]) for row in tokens_NS]
        by_hand = torch.cat([output.experts_per_token for output in outputs], 2).double().mean()
        assert by_hand.item() == pytest.approx(mean, abs=1e-5)
        assert by_hand.item() == pytest.approx(point["experts_per_token"], abs=0.01)
        losses = [
            torch.nn.functional.cross_entropy(output.logits[0, :-1], row[1:]).item()
            for output, row in zip(outputs, tokens_NS, strict=True)
        ]
        assert point["loss"] == pytest.approx(sum(losses) / len(losses), abs=2e-5)


def measured_from(counts: Callable[[float], float]) -> Callable[..., Measurement]:
    """A model whose count depends on the threshold as this function says."""
    return lambda threshold, _label="": Measurement(
        1 - threshold, [counts(threshold)], 64, torch.empty(0)
    )


@pytest.mark.parametrize(
    ("counts", "passes"),
    [
        (lambda t: 1 + 3 * t, 3),  # a line: the middles are right at once
        (lambda t: 1 + 3 * max(0.0, t - 0.4) / 0.6, 15),  # a knee; to its left always 1
        (lambda t: 1 + 3 * t**3, 15),
        (lambda t: 4 ** (t**2), 15),
    ],
)
def test_between_the_points_the_count_is_what_was_asked_for(
    counts: Callable[[float], float], passes: int
) -> None:
    labels: list[str] = []

    def measure_at(threshold: float, label: str) -> Measurement:
        labels.append(label)
        return measured_from(counts)(threshold)

    def inverse(count: float) -> float:
        ends = [0.0, 1.0]
        for _ in range(60):
            middle = sum(ends) / 2
            ends[counts(middle) > count] = middle
        return ends[0] if count > 1 else 0.0

    given = [
        Calibration(count, "global", inverse(count), measured_from(counts)(inverse(count)))
        for count in (1.0, 1.5, 2.5, 4.0)
    ]
    found = refine(points_of(given), measure_at)
    assert 3 <= len(labels) <= passes
    assert found.note() is None
    curve = [point.to_json() for point in found.points]
    check_curve(curve, 4)
    for budget in torch.linspace(1, 4, 301).double().tolist():
        count = counts(threshold_at(curve, budget))
        assert count == pytest.approx(budget, rel=0.025)
    assert {1.0, 1.5, 2.5, 4.0} <= {point["experts_per_token"] for point in curve}
    assert [point["loss"] for point in curve] == [round(1 - p["threshold"], 6) for p in curve]


def test_what_the_passes_did_not_reach_is_said() -> None:
    """Of a count that rises so fast at first that halving a part hardly moves its end."""

    def counts(threshold: float) -> float:
        return 1 + 3 * math.sqrt(threshold)

    def refined(*budgets: float) -> MeasuredCurve:
        measure_at = measured_from(counts)
        thresholds = [((budget - 1) / 3) ** 2 for budget in budgets]
        given = [
            Calibration(budget, "global", threshold, measure_at(threshold))
            for budget, threshold in zip(budgets, thresholds, strict=True)
        ]
        return refine(points_of(given), measure_at)

    found = refined(1, 4)
    curve = [point.to_json() for point in found.points]
    worst = 0.0
    for budget in torch.linspace(1, 4, 3001).double().tolist():
        off = abs(counts(threshold_at(curve, budget)) / budget - 1)
        parts = [(low, high) for low, high in found.rough if low <= budget <= high]
        assert off <= max((high / low - 1 for low, high in parts), default=1.25 * CLOSE_ENOUGH)
        worst = max(worst, off)
    assert worst > 2 * CLOSE_ENOUGH

    note = found.note() or ""
    parts = [f"{low:.4g} to {high:.4g}" for low, high in found.rough]
    assert f"not enough from {', '.join(parts)} experts per token" in note
    most = max(high / low - 1 for low, high in found.rough)
    assert f"more than 2 % off what is asked for, and at most {100 * most:.0f} %." in note
    # What it says to do helps.
    suggested = float(note.partition("such as ")[2].partition(":")[0])
    assert any(low < suggested < high for low, high in found.rough)
    again = refined(1, suggested, 4)
    assert max(high / low - 1 for low, high in again.rough) < most


def test_only_the_curve_and_its_record_are_new(plain: Path, folder: Path) -> None:
    old, new = words_of(plain), words_of(folder)
    assert {name for name in new if new[name] != old.get(name)} == {
        "budget_curve",
        "budget_calibration",
    }
    assert new["threshold"] == 0.6 and new["budget_calibration"]["data"] == BOOK.name
    check_manifest(folder)
    card = (folder / "README.md").read_text()
    assert "Measured over 512 tokens of book.jsonl.gz" in card
    for point in new["budget_curve"]:
        row = (point["experts_per_token"], point["threshold"], point["loss"])
        assert "| {:g} | {:.6g} | {:.4f} |".format(*row) in card
    # Again is the same card: the section is replaced, not added.
    calibration.update_routing(folder, new)
    assert (folder / "README.md").read_text() == card


def test_the_table_shows_every_budget(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = words_of(plain)
    calibrate.main(["--model", str(plain), *TOKENS, "--budgets", "1,2"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "<- budget" in line]
    assert [row[-1] for row in rows] == ["1", "2"]
    assert rows[0][:3] == ["threshold", "0", "1.000"]
    assert float(rows[1][2]) == pytest.approx(2, abs=0.01)
    assert not any(line.startswith("threshold 0.1 ") for line in lines)  # no sweep
    assert "nothing was written" in lines[-1] and words_of(plain) == before


def test_the_command_says_so(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_dynmoe.use.budgets.EXTRA_POINTS", 3)
    command = ["--model", str(plain), *TOKENS, "--budgets"]
    calibrate.main([*command, "2,2.03"])  # so near that nothing between them is far off
    assert capsys.readouterr().err == ""
    calibrate.main([*command, "1,4"])
    said = capsys.readouterr().err
    assert said.startswith("note: --budgets: 3 passes between two budgets were not enough")
    assert said.count("\n") == 1


def test_generate_asks_and_shows_what_was_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def out(*flags: str, folder: Path = folder) -> str:
        with pytest.raises(SystemExit) as ended:
            generate.main(["--model", str(folder), *PROMPT, "--experts", "digits", *flags])
        assert ended.value.code == 0
        return capsys.readouterr().out

    curve = words_of(folder)["budget_curve"]
    ends = [(point["experts_per_token"], point["threshold"]) for point in curve[-2:]]
    halfway = tuple(sum(numbers) / 2 for numbers in zip(*ends, strict=True))
    for budget, threshold in (ends[1], halfway):
        asked, plain = out("--budget", f"{budget:.17g}"), out("--threshold", f"{threshold:.17g}")
        lines = asked.splitlines()
        row = next(line for line in lines if line.startswith("asked for"))
        assert row.split()[2:] == [f"{budget:.2f}"] * 2
        assert [line for line in lines if line != row] == plain.splitlines()
    assert "asked for" not in out()


def test_generation_config_asks_for_the_whole_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for what it counts after the end, and a flag goes before it."""
    copy = copy_of(folder, tmp_path)
    change(copy, "generation_config.json", experts_per_token=1)
    means = []
    for flags in ([], ["--num-beams", "2"], ["--budget", "4"], ["--threshold", "1"]):
        with pytest.raises(SystemExit):
            generate.main(["--model", str(copy), *PROMPT, *flags])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        means.append(next(line[1:] for line in lines if line[:1] == ["all"]))
        asked = [line[-1] for line in lines if line[:2] == ["asked", "for"]]
        assert asked == {"--budget": ["4.00"], "--threshold": []}.get("".join(flags[:1]), ["1.00"])
    assert means[:2] == [["1.00", "1.00"]] * 2
    assert all(float(mean) > 2.5 for mean in means[2]) and means[3] == ["8.00", "8.00"]


def test_evaluate_asks_and_reports(
    folder: Path,
    tmp_path: Path,
    offline: None,
    choice: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    thresholds = {p["experts_per_token"]: p["threshold"] for p in words_of(folder)["budget_curve"]}
    with_threshold, entries = copy_of(folder, tmp_path, inference_threshold=thresholds[1.5]), []
    for model, flags in ((folder, ["--budget", "1.5"]), (with_threshold, [])):
        output = tmp_path / f"{model.name}.json"
        common = ["--tasks", str(choice), "--limit", "3", "--output", str(output)]
        evaluate.main(["--model", str(model), *common, *flags])
        assert ("asked for: 1.5 experts per token" in capsys.readouterr().out) == bool(flags)
        report = json.loads(output.read_text())
        assert report["experts_asked_for"] == (1.5 if flags else None)
        entries.append(report["tasks"]["choice"])
    assert entries[0] == entries[1]
    # Before the tasks are looked for, whose data may have to be downloaded.
    text = said(evaluate.main, "--model", folder, "--tasks", "x", "--budget", 5, capsys=capsys)
    assert "--budget: experts_per_token is 5.0, and the model's budget_curve goes from 1 to" in text


def test_generate_refuses_what_the_curve_does_not_have(
    folder: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_to_four = copy_of(folder, tmp_path, inference_experts_per_token=4)
    for model, flags, words in (
        (folder, ["--budget", "4.5"], "is 4.5, and the model's budget_curve goes from 1 to 4: use"),
        (plain, ["--budget", "2"], "is 2.0, and the model has no budget_curve"),
        (folder, ["--budget", "nan"], "--budget is nan: use at least 1"),
        (folder, ["--budget", "0.5"], "--budget is 0.5: use at least 1"),
        (folder, ["--budget", "2", "--threshold", "0.5"], "is not allowed with --budget"),
        (
            *(folder, ["--budget", "4", "--max-experts-per-token", "2"]),
            "no token may use more than 2",
        ),
        (
            *(set_to_four, ["--max-experts-per-token", "2"]),
            "config.json's inference_experts_per_token: experts_per_token is 4, and no token may",
        ),
    ):
        assert words in said(generate.main, "--model", model, *PROMPT, *flags, capsys=capsys)


def test_calibrate_refuses_before_it_measures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def measure(*_: Any) -> None:
        raise AssertionError("it measured")

    monkeypatch.setattr(calibration, "measure", measure)
    set_to_one = copy_of(folder, tmp_path, inference_experts_per_token=1)
    for model, flags, words in (
        (folder, [], "give --target or --budgets"),
        (folder, ["--budgets", "1,2", "--scope", "layer"], "--scope layer is for --target"),
        (folder, ["--budgets", "0.5,2"], "--budgets is 0.5,2: use mean experts per token, from 1"),
        (folder, ["--budgets", "1,nan"], "--budgets is 1,nan"),
        (folder, ["--budgets", "1,x"], "--budgets is '1,x': give a list of numbers"),
        (folder, ["--budgets", "1,9"], "--budgets is 9: a token uses at least 1 expert and here"),
        (
            *(folder, ["--budgets", "1,3", "--max-experts-per-token", "2"]),
            "--budgets is 3: a token uses at least 1 expert and here at most 2",
        ),
        (
            *(set_to_one, ["--budgets", "2,3"]),
            "config.json asks for 1 experts per token (inference_experts_per_token), which no",
        ),
    ):
        text = said(calibrate.main, "--model", model, *TOKENS, *flags, capsys=capsys)
        assert words in text


def test_budgets_that_cannot_be_told_apart_are_refused() -> None:
    found = [
        Calibration(count, "global", 0.25, Measurement(5.0, [count], 64, torch.empty(0)))
        for count in (2.0, 2.005)
    ]
    said = "--budgets: 2 and 2.005 experts per token have the thresholds 0.25 and 0.25"
    with pytest.raises(ValueError, match=said):
        points_of(found)


def test_a_failure_while_writing_leaves_the_old_config(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    copy = copy_of(folder, tmp_path)
    before = {file.name: file.read_bytes() for file in copy.iterdir()}

    def fail(path: Path, _content: Any) -> None:
        path.write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(calibration, "write_json", fail)
    flags = ["--model", copy, *TOKENS, "--budgets", "1,2", "--in-place"]
    assert "disk full" in said(calibrate.main, *flags, capsys=capsys)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before


def test_another_cap_ends_a_curve_that_was_measured_without_it(
    folder: Path, tmp_path: Path
) -> None:
    copy = copy_of(folder, tmp_path)
    flags = ["--model", str(copy), *TOKENS, "--in-place", "--target", "1.5"]
    calibrate.main([*flags, "--sweep", "none"])
    assert words_of(copy)["budget_curve"] == words_of(folder)["budget_curve"]
    calibrate.main([*flags, "--sweep", "none", "--max-experts-per-token", "2"])
    assert words_of(copy)["budget_curve"] is None
    assert "### Budgets" not in (copy / "README.md").read_text()
    calibrate.main([*flags, "--max-experts-per-token", "3", "--budgets", "1,2.5"])
    model = load_model(copy, load_config(copy))
    assert model(torch.arange(64)[None] + 300, experts_per_token=2.5).experts_per_token.max() == 3


def test_a_top_k_model_gets_a_threshold_and_a_curve(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"routing": "top_k", "threshold": None, "num_experts_per_tok": 2}
    copy = copy_of(plain, tmp_path, **settings)
    flags = ["--model", str(copy), *TOKENS, "--in-place", "--budgets", "1,3"]
    assert "uses 2 experts, and a curve needs a model with a threshold" in said(
        calibrate.main, *flags, capsys=capsys
    )
    calibrate.main([*flags, "--target", "2"])
    model = load_model(copy, load_config(copy))
    model.set_budget(1)
    assert model(torch.arange(9)[None] + 300).experts_per_token.unique().tolist() == [1]
