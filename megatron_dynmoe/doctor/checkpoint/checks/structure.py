"""Layers, experts and states of the optimizer against the saved arguments, and each other."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check
from megatron_dynmoe.doctor.checkpoint.checks.values import STATE, Place, Values
from megatron_dynmoe.doctor.checkpoint.reading.parts import (
    MOMENT,
    OPTIMIZER_STATE,
    WEIGHT,
    belongs_to_experts,
    is_dense,
    numbers,
)
from megatron_dynmoe.settings.hybrid_pattern import layers_of_kinds
from megatron_dynmoe.settings.upstream_flags import layers_with_experts

_NAME = "layers and experts"
_CONVERT = "take another iteration, or convert again from the source"
_OF_MODEL = "decoder."


def check_structure(values: Values, args: Namespace, folder: Path) -> Iterator[Check]:
    """Every layer and expert that the arguments speak of is there, and no other."""
    num_layers, num_experts = args.num_layers, getattr(args, "num_experts", None) or 0
    sparse = (False,) * num_layers
    if num_experts:
        sparse = layers_with_experts(args.moe_layer_freq, num_layers, "moe_layer_freq")
    expected = layers_of_kinds(getattr(args, "hybrid_layer_pattern", None), sparse)
    found = [
        *_layers(values, expected),
        *_experts(values, expected["experts"], num_experts),
        *_states(values),
    ]
    yield from (Check(_NAME, FAILED, f"{folder}: {text}", _CONVERT) for text in found)
    if not found:
        experts = f", {sum(sparse)} of them with {num_experts} experts" if num_experts else ""
        said = f"{num_layers} layers{experts}, as the saved arguments say"
        yield Check(_NAME, PASSED, said)


def check_optimizer(values: Values, args: Namespace, iteration: int) -> Check:
    """Whether the optimizer's state is there, and has moved."""
    has_state = any(kind == MOMENT for kind, _ in values.blocks)
    if not has_state and (iteration == 0 or getattr(args, "no_save_optim", None)):
        return Check("optimizer", PASSED, "none was saved")
    if not has_state:
        remedy = "to train on, give --no-load-optim, which begins the optimizer afresh"
        return Check("optimizer", WARNING, "no state of it was saved", remedy)
    if iteration > 0 and values.num_moments and not values.num_moving:
        found = f"all moments are 0 after {iteration} iterations"
        remedy = "right only if it began afresh at this step; else take another iteration"
        return Check("optimizer", WARNING, found, remedy)
    moved = f"{values.num_moving} of {values.num_moments} moments have moved"
    return Check("optimizer", PASSED, moved if values.num_moments else "it keeps no moments")


def _of_layers(values: Values) -> Iterator[tuple[str, Set[Place]]]:
    for (kind, row), blocks in values.blocks.items():
        if kind == WEIGHT and row.startswith(_OF_MODEL) and _has_layers(blocks):
            yield row, blocks.keys()


def _has_layers(places: Iterable[Place]) -> bool:
    return any(layer is not None for layer, _ in places)


def _layers(values: Values, expected: dict[str, set[int]]) -> Iterator[str]:
    missing: dict[str, list[str]] = defaultdict(list)
    surplus: dict[str, list[str]] = defaultdict(list)
    for row, places in _of_layers(values):
        kind = _kind(row)
        there = {layer for layer, _ in places if layer is not None}
        if lacking := expected[kind] - there:
            missing[numbers(lacking)].append(row)
        if more := there - expected[kind]:
            surplus[numbers(more)].append(row)
    for layers, rows in missing.items():
        yield f"{_some(rows)} of layer {layers} is missing, which the saved arguments ask for"
    for layers, rows in surplus.items():
        yield f"{_some(rows)} of layer {layers} is there, which the saved arguments know nothing of"


def _kind(row: str) -> str:
    """Which layers have a row; see :func:`layers_of_kinds`."""
    if belongs_to_experts(row):
        return "experts"
    if is_dense(row):
        return "dense"
    return "mlp" if "mlp" in row else "attention"


def _experts(values: Values, sparse: set[int], num_experts: int) -> Iterator[str]:
    missing: dict[tuple[str, str], set[int]] = defaultdict(set)
    has_experts = False
    for row, places in _of_layers(values):
        by_layer: dict[int, set[int]] = defaultdict(set)
        for layer, expert in places:
            if layer is not None and expert is not None:
                by_layer[layer].add(expert)
        has_experts |= bool(by_layer)
        for layer, experts in by_layer.items():
            if lacking := set(range(num_experts)) - experts:
                missing[row, f"expert {numbers(lacking)} is missing"].add(layer)
            if more := experts - set(range(num_experts)):
                missing[row, f"expert {numbers(more)} is one too many"].add(layer)
    for (row, what), layers in missing.items():
        yield f"{row} of layer {numbers(layers)}: {what}, num_experts is {num_experts}"
    if sparse and not has_experts:
        yield f"there is no tensor of any expert, and num_experts is {num_experts}"


def _states(values: Values) -> Iterator[str]:
    """Each parameter has a state in the optimizer, if the optimizer's states have their names."""
    places: dict[str, dict[str, Set[Place]]] = defaultdict(dict)
    for (kind, row), blocks in values.blocks.items():
        if kind == MOMENT and (found := OPTIMIZER_STATE.fullmatch(row)):
            places[found[2]][found[1]] = blocks.keys()
    weights = {row: blocks for (kind, row), blocks in values.blocks.items() if kind == WEIGHT}
    if not places.keys() & weights.keys():
        return
    without = []
    for row, blocks in weights.items():
        if row.endswith(STATE):
            continue
        if row not in places:
            without.append(row)
        for state, there in places.get(row, {}).items():
            if lacking := blocks.keys() - there:
                layers = numbers(layer for layer, _ in lacking if layer is not None)
                yield f"the optimizer has no {state} of {row}, layer {layers}"
    if without:
        yield f"the optimizer has no state of {_some(without)}"


def _some(rows: list[str]) -> str:
    return rows[0] if len(rows) == 1 else f"{rows[0]} (and {len(rows) - 1} other tensors)"
