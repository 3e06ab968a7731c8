"""Whether kernels that are right agree, and whether one that is wrong is seen."""

import os

import pytest
import torch

from benchmarks import layer_providers
from benchmarks.gpu_first import agree
from benchmarks.gpu_first.outcome import rows_of
from benchmarks.layer_providers import Workload
from megatron_dynmoe import kernels
from tests.moe import one_rank

pytestmark = pytest.mark.megatron

TINY = Workload(hidden=64, ffn=32, experts=16, mean=2, sequence=24, sequences=2)


@pytest.fixture
def run(monkeypatch, tmp_path):
    for name in ("DYNMOE_KERNELS", "RANK"):  # which it sets
        monkeypatch.setitem(os.environ, name, "0")
    one_rank.world_of_one()
    monkeypatch.setattr(layer_providers.Workload, "scaled_down", lambda self: TINY)

    def run() -> list[dict[str, str]]:
        arguments = ["agree", "--workloads", "a", "--output", str(tmp_path)]
        monkeypatch.setattr("sys.argv", arguments)
        agree.main()
        return rows_of(tmp_path)

    yield run
    one_rank.forget_global_state()


def test_kernels_that_are_right_agree(run):
    rows = run()
    assert {row["agrees"] for row in rows} == {"yes"}
    names = {row["quantity"] for row in rows}
    assert names >= {"experts", "output", "input's gradient", "gradient of experts.weight1"}
    errors = [float(row["error_plain"]) for row in rows if row["error_plain"]]
    assert all(0 < error < 0.1 for error in errors)  # of bf16 against float32


def test_a_wrong_kernel_is_seen(run, monkeypatch, tmp_path):
    right = kernels.choose_route

    def choose(logits_TE):
        route = right(logits_TE)
        if os.environ["DYNMOE_KERNELS"] == "0":
            return route

        def wrong(*args, **kwargs):
            routed = route(*args, **kwargs)
            return routed._replace(weights_TE=routed.weights_TE * 1.02)

        return wrong

    monkeypatch.setattr(kernels, "choose_route", choose)
    with pytest.raises(SystemExit, match=r"differ, first layer a, 48 tokens: output, 0\.02"):
        run()
    found = {row["quantity"]: row["agrees"] for row in rows_of(tmp_path)}
    assert found["experts"] == "yes" and found["output"] == "no"


def test_a_kernel_that_does_not_compile_is_a_row(run, monkeypatch, tmp_path):
    def broken(*args):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(agree, "make_provider", broken)
    with pytest.raises(SystemExit, match="1 of 1 differ, first layer a, 48 tokens: OutOfMemory"):
        run()
    (row,) = rows_of(tmp_path)
    assert row["failed"] == "OutOfMemoryError: too large"
