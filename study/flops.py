"""The work in experts of a whole training: floating-point operations, forward and backward.

The mean number of experts on held-out text says what a trained model costs, not what its training
did: a count may fall or rise on the way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.runs.drawing import overlay
from megatron_dynmoe.runs.events import read_run
from megatron_dynmoe.settings.upstream_flags import layers_with_experts
from study.runs import HELD_OUT, Run

FLOPS = "expert_flops"  # in a row
_DYNAMIC = "--moe-dynamic-routing"


def measured(run: Run) -> float:
    """The FLOPs in experts of a finished run, by the count of every step.

    Shared experts and dense MLPs count, too, so that models with and without them compare.
    """
    resolved, _ = read_run(run.folder)
    drawn = overlay.read(run.folder, run.name)
    megatron = resolved["megatron"]
    if not megatron["num_experts"]:  # its MLPs stand for experts
        return float(drawn.expert_flops[-1])
    sparse = layers_with_experts(megatron["moe_layer_freq"], megatron["num_layers"])
    beside = overlay.mlp_flops(megatron, _width_beside(megatron, sparse))
    return float(drawn.expert_flops[-1] + drawn.tokens[-1] * beside)


def known(run: Run) -> float | None:
    """The same by arithmetic, if every token uses the same number of experts; else None."""
    flags = run.key["flags"]
    if _DYNAMIC in flags:
        return None
    megatron = _arguments(flags)
    sparse = [megatron["num_experts"] is not None] * megatron["num_layers"]
    if "--moe-layer-freq" in flags:  # in this study, of all layers but the first
        sparse[0] = False
    routed = megatron["moe_router_topk"] * (
        megatron["moe_ffn_hidden_size"] or megatron["ffn_hidden_size"]
    )
    width = sum(sparse) * routed + _width_beside(megatron, sparse)
    tokens = run.size.steps * run.size.tokens_per_step
    return tokens * overlay.mlp_flops(megatron, width)


def fill(rows: dict[str, dict[str, Any]], planned: Sequence[Run], folder: Path) -> list[str]:
    """Add the FLOPs to rows that lack them, by arithmetic or from runs that are still there.

    A run is that of a row if its held-out loss is the row's to the last digit, whatever code
    trained it.

    Args:
        folder: of the runs.

    Returns:
        The names of the rows that have them now.
    """
    filled = []
    for run in planned:
        row = rows.get(run.name)
        if row is None or FLOPS in row:
            continue
        found = known(run)
        if found is None:
            found = next(
                (
                    measured(dataclasses.replace(run, folder=other))
                    for other in sorted(folder.glob(f"{run.name}-*"))
                    if _held_out(other).items() <= row.items()
                ),
                None,
            )
        if found is not None:
            row[FLOPS] = found
            filled.append(run.name)
    return filled


def _held_out(folder: Path) -> dict[str, Any]:
    """What was measured of a run on held-out text."""
    try:
        return json.loads((folder / HELD_OUT).read_text())
    except FileNotFoundError:
        return {"validation_loss": None}  # no row's


def _width_beside(megatron: Mapping[str, Any], sparse: Sequence[bool]) -> int:
    """The hidden sizes of shared experts and dense MLPs, of all layers together."""
    shared = megatron.get("moe_shared_expert_intermediate_size") or 0
    return sum(shared if has_experts else megatron["ffn_hidden_size"] for has_experts in sparse)


def _arguments(flags: Sequence[str]) -> dict[str, Any]:
    """What counts of a training's flags; of one that is given twice the last one does."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("num-layers", "hidden-size", "ffn-hidden-size", "num-experts"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("moe-ffn-hidden-size", "moe-shared-expert-intermediate-size"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--moe-router-topk", type=int, default=0)
    parser.add_argument("--swiglu", action="store_true")
    return vars(parser.parse_known_args(flags)[0])
