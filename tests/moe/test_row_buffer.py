"""Room for the worst case or the mean: the results of counted rows, and no wait for the device."""

import dataclasses
from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dynmoe.moe.permute import order_rows
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank

pytestmark = pytest.mark.megatron

E, S, B, D = 6, 10, 3, 8
CAP = 4
MEASURED = DynMoEConfig(
    routing="top_p", threshold=0.6, max_experts_per_token=CAP, backend="torch_native"
)
WORST_CASE = dataclasses.replace(MEASURED, row_buffer="worst_case")
TARGET = DynMoEConfig(
    routing="dtop_p", target_experts_per_token=2, row_buffer="target", backend="torch_native"
)
# What makes the host wait for a device.
SYNCS = ("aten._local_scalar_dense", "aten.nonzero.", "aten.masked_select", "aten.is_nonzero")
# The number of rows; and on a CPU, which need not be told it, the look for them.
WAITS_FOR_COUNT = {"aten._local_scalar_dense.default": 1, "aten.nonzero.default": 1}


def layer_of(dynmoe: DynMoEConfig):
    torch.manual_seed(0)
    return one_rank.moe_layer(dynmoe, num_experts=E, hidden_size=D, moe_ffn_hidden_size=16)


def one_step(layer) -> dict[str, torch.Tensor]:
    hidden = torch.randn(S, B, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    output, _ = layer(hidden)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": output, "hidden": hidden.grad} | gradients


def poisoned_grouped_mm(grouped_mm):
    """grouped_mm that fills what no group covers with NaN: nobody promises zeros there."""

    def called(left, right, *, offs):
        result = grouped_mm(left, right, offs=offs)
        if result.dim() == 2:
            result[int(offs[-1]) :] = torch.nan
        return result

    return called


def test_results_are_those_of_counted_rows_whatever_the_unused_rows_hold():
    measured = one_step(layer_of(MEASURED))
    layer = layer_of(WORST_CASE)
    functional = torch.nn.functional
    with mock.patch.object(functional, "grouped_mm", poisoned_grouped_mm(functional.grouped_mm)):
        worst_case = one_step(layer)
    assert measured.keys() == worst_case.keys()
    assert {"router.weight", "experts.weight1", "experts.weight2"} <= measured.keys()
    for name, want in measured.items():
        assert torch.equal(worst_case[name], want), name


def test_as_many_rows_are_asked_for_as_are_routed(monkeypatch):
    """A CPU looks for itself; a device would leave out, in silence, what the number leaves out."""
    asked, routed = [], []

    def spy(routing_map, num_rows, **kwargs):
        asked.append(int(num_rows))
        routed.append(int(routing_map.sum()))
        return order_rows(routing_map, num_rows, **kwargs)

    monkeypatch.setattr("megatron_dynmoe.moe.dispatch.order_rows", spy)
    layer = layer_of(dataclasses.replace(MEASURED, threshold=0.8))
    one_step(layer)
    assert asked == routed != [S * B * layer.config.moe_router_topk]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_layer_that_needs_more_rows_than_there_is_room_for_says_so(monkeypatch, missing):
    """The rows that are left out are in no list: elsewhere they would be written past its end."""
    layer = layer_of(MEASURED)
    measured = one_step(layer)
    rows = int(layer.router.counters.sums.assignments.sum())
    layer = layer_of(MEASURED)
    layer.token_dispatcher.make_room((rows - missing) / (S * B), layer.router.counters)
    asked = []

    def spy(routing_map, num_rows, **kwargs):
        asked.append((int(routing_map.sum()), num_rows))
        return order_rows(routing_map, num_rows, **kwargs)

    monkeypatch.setattr("megatron_dynmoe.moe.dispatch.order_rows", spy)
    found = one_step(layer)
    assert layer.router.counters.sums.overflows == missing
    assert all(torch.isfinite(value).all() for value in found.values())
    ((listed, room),) = asked
    assert listed <= room <= rows
    if not missing:
        assert listed == rows
        for name, want in measured.items():
            assert torch.equal(found[name], want), name


@pytest.mark.parametrize("overflows", [0, 1])
def test_counts_of_an_overflowed_pass_move_nothing(overflows):
    """Not even on a rank without an optimizer, which commits before the step is run again."""
    layer = layer_of(TARGET)
    one_step(layer)
    before = layer.router.measured.item(), layer.router.threshold.item()
    layer.router.counters.sums.overflows.add_(overflows)
    with mock.patch("megatron_dynmoe.control.update.finished_iterations", return_value=0):
        layer.config.finalize_model_grads_func.finalize = lambda model: None
        layer.config.finalize_model_grads_func([layer])
    after = layer.router.measured.item(), layer.router.threshold.item()
    assert (after == before) is bool(overflows)


@pytest.mark.parametrize(
    ("dynmoe", "room", "waits"),
    [(MEASURED, None, WAITS_FOR_COUNT), (WORST_CASE, None, {}), (MEASURED, 2.5, {})],
    ids=["measured", "worst_case", "target"],
)
def test_the_host_waits_for_the_number_of_rows_or_never(monkeypatch, dynmoe, room, waits):
    monkeypatch.setenv("DYNMOE_KERNELS", "0")  # this and the next as on a device
    monkeypatch.setattr("megatron_dynmoe.moe.grouped_linear._are_on_host", lambda counts: False)
    layer = layer_of(dynmoe)
    if room is not None:
        layer.token_dispatcher.make_room(room, layer.router.counters)
    found = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found[str(function)] += str(function).startswith(SYNCS)
            return function(*args, **(kwargs or {}))

    with Counting():
        one_step(layer)
    assert +found == waits


@pytest.mark.parametrize("dynmoe", [WORST_CASE, TARGET], ids=["worst_case", "target"])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"moe_token_dispatcher_type": "allgather"}, "--moe-token-dispatcher-type is allgather"),
        ({"moe_ffn_hidden_size": 13}, "loop on this device"),
        ({"activation_func": torch.nn.functional.gelu}, "upstream's"),
    ],
)
def test_what_needs_the_number_on_the_host_is_refused(dynmoe, settings, reason):
    refusal = rf"row_buffer is '{dynmoe.row_buffer}'.*{reason}.*leave row_buffer"
    dynmoe = dataclasses.replace(dynmoe, backend="auto")
    with pytest.raises(ValueError, match=refusal):
        one_rank.moe_layer(dynmoe, num_experts=E, hidden_size=D, **settings)


def test_a_worst_case_without_a_cap_is_refused():
    with pytest.raises(ValueError, match="all 6 experts for every token: set max_experts_per_"):
        dataclasses.replace(WORST_CASE, max_experts_per_token=None).resolve(E)
