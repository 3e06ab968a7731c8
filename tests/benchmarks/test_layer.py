"""The layer benchmark: that its providers do the same work, and as much as its roofline says."""

import csv
import os
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import layer, layer_providers
from benchmarks.layer_providers import DENSE, OURS, STOCK, Workload
from benchmarks.logits import trained_logits
from benchmarks.places import Apart, Here, Turns
from tests.moe import one_rank

pytestmark = pytest.mark.megatron

TINY = Workload(hidden=64, ffn=32, experts=16, mean=2, sequence=24, sequences=2)


@pytest.fixture(autouse=True)
def megatron(monkeypatch):
    for name in ("DYNMOE_KERNELS", "RANK"):  # which the benchmark sets
        monkeypatch.setitem(os.environ, name, "0")
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()


@pytest.fixture
def providers():
    factories = layer_providers.factories(TINY, None, torch.float32)
    return {name: make(*arguments) for name, (make, *arguments) in factories.items()}


def test_routing_is_that_of_the_logits_and_the_mean_is_measured(providers):
    assert providers[OURS].experts_per_token == pytest.approx(TINY.mean, abs=1 / TINY.tokens)
    logits_TE = trained_logits(TINY.tokens)
    for name in (OURS, STOCK):
        provider = providers[name]
        gate_TE = provider.layer.router.gating(provider.hidden_SBD).view_as(logits_TE)
        torch.testing.assert_close(gate_TE, logits_TE)


def test_ours_and_the_plain_reference_compute_the_same(providers):
    ours, reference = providers[OURS], providers["plain reference"]
    for provider in (ours, reference):
        provider.clear()
        provider.forward()
        provider.backward()
    torch.testing.assert_close(ours.output, reference.output)
    torch.testing.assert_close(ours.hidden_SBD.grad, reference.hidden_SBD.grad)


@pytest.mark.parametrize("name", ["plain reference", STOCK, DENSE])
def test_the_counted_flops_are_those_of_the_formula(providers, name):
    provider = providers[name]
    provider.clear()
    with FlopCounterMode(display=False) as counter:
        provider.forward()
        provider.backward()
    expected = TINY.flops(provider.experts_per_token, dense=name == DENSE)
    assert counter.get_total_flops() == pytest.approx(expected)


def test_least_bytes_are_those_of_weights_and_activations():
    # By hand: weights 16 x 3 x 64 x 32, thrice; 48 tokens of 64, five times; 4 bytes each.
    assert TINY.least_bytes(4) == 4 * (3 * 98304 + 5 * 3072)
    assert TINY.least_bytes(4, dense=True) == 4 * (3 * 12288 + 5 * 3072)


# As on a GPU, where every provider has its process.
@pytest.mark.parametrize("place", [Here, pytest.param(Apart, marks=pytest.mark.long)])
def test_it_runs_and_writes_its_rows(monkeypatch, tmp_path, place):
    monkeypatch.setattr(layer, "Turns", partial(Turns, place))
    limits = layer.ceilings.Ceilings(bytes_per_s=1e12, flops_per_s=1e9)
    monkeypatch.setattr(layer.ceilings, "of_this_machine", lambda dtype: limits)
    monkeypatch.setattr(Workload, "scaled_down", lambda self: TINY)
    command = ["layer.py", "--workloads", "a", "--rounds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--threads", str(torch.get_num_threads())])
    layer.main()
    with (tmp_path / "layer.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    others = {"ours, worst-case rows", "plain reference", "stock top-k, torch_native"}
    assert {OURS, STOCK, DENSE, *others} == set(rows)
    assert rows[STOCK]["speed_ratio"] == "1.000 [1.000, 1.000]"
    assert "trained logits" in rows[OURS]["workload"]
    for row in rows.values():
        seconds = float(row["both_ms"]) / 1e3
        flops = TINY.flops(2, dense=row["provider"] == DENSE)
        assert float(row["of_ceiling"]) == pytest.approx(flops / seconds / 1e9, rel=0.03, abs=1e-3)
        assert float(row["roofline_ms"]) == pytest.approx(flops / 1e9 * 1e3, rel=0.03)
        assert 0 < float(row["held_mb"]) < float(row["peak_mb"])
    assert "aten::" in (tmp_path / "layer_profile.txt").read_text()
