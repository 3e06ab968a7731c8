"""The selection benchmark on a few tokens, and where its logits come from."""

import csv
from functools import partial

import pytest
import torch

from benchmarks import logits, plot
from benchmarks.places import Apart, Here, Turns

pytestmark = pytest.mark.megatron


# As on a GPU, where every provider has its process.
@pytest.mark.parametrize("place", [Here, pytest.param(Apart, marks=pytest.mark.long)])
def test_it_runs_on_both_kinds_of_logits(monkeypatch, tmp_path, place):
    from benchmarks import select_experts

    monkeypatch.setattr(select_experts, "Turns", partial(Turns, place))
    limits = select_experts.ceilings.Ceilings(bytes_per_s=1e6, flops_per_s=1)
    monkeypatch.setattr(select_experts.ceilings, "of_this_machine", lambda dtype: limits)
    command = ["select_experts.py", "--experts", "16,256", "--tokens", "64", "--rounds", "3"]
    monkeypatch.setattr("sys.argv", [*command, "--output", str(tmp_path)])
    select_experts.main()
    with (tmp_path / "select.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = [row["workload"].rpartition(",")[0] for row in rows[::3]]
    assert cases == [
        "64 tokens, 16 experts, normal logits",
        "64 tokens, 256 experts, normal logits",
        "64 tokens, 16 experts, trained logits",
    ]
    for stock, readable, ours in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        names = [row["provider"] for row in (stock, readable, ours)]
        assert names == ["stock top-k", "ours, readable", "ours"]
        assert stock["median_ratio_to_stock"] == "1.000"
        experts = 16 if "256" in ours["workload"] else 2
        assert float(ours["mean_experts"]) == pytest.approx(experts, abs=0.05)
        elements = 64 * (256 if "256" in ours["workload"] else 16)
        assert float(ours["roofline_ms"]) == pytest.approx(22 * elements / 1e6 * 1e3, rel=1e-3)

    # The rows can be drawn.
    monkeypatch.setattr(
        "sys.argv", ["plot.py", "--results", str(tmp_path), "--images", str(tmp_path)]
    )
    plot.main()
    assert [path.name for path in tmp_path.glob("*.png")] == ["benchmark_select_cpu.png"]


def test_without_stock_the_others_have_rows_without_ratios(monkeypatch, tmp_path):
    from benchmarks import select_experts

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("too large")

    limits = select_experts.ceilings.Ceilings(bytes_per_s=1e6, flops_per_s=1)
    monkeypatch.setattr(select_experts.ceilings, "of_this_machine", lambda dtype: limits)
    monkeypatch.setattr(select_experts, "topk_routing_with_score_function", out_of_memory)
    command = ["select_experts.py", "--experts", "64", "--tokens", "8", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--output", str(tmp_path)])
    select_experts.main()
    with (tmp_path / "select.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert rows["stock top-k"]["failed"] == "OutOfMemoryError: too large"
    assert float(rows["ours"]["median_ms"]) > 0
    assert rows["ours"]["median_ratio_to_stock"] == ""


def test_trained_logits_are_repeated_where_more_are_asked_for():
    logits_TE = logits.trained_logits(20000)
    assert logits_TE.shape == (20000, 16)
    assert torch.equal(logits_TE[16384:], logits_TE[: 20000 - 16384])
    # Of a router with normalization.
    assert logits_TE.mean(dim=-1).abs().max() < 0.01


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"logits": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="one tensor"):
        logits.read_logits(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    for name in ("text.pt", "missing.pt"):
        with pytest.raises(ValueError, match=name):
            logits.read_logits(tmp_path / name)
