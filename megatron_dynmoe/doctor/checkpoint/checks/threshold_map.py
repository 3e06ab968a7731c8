"""The map of a target that is drawn, against its bounds, its order, and the law that moved it."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_dynmoe.control.pi_map import MapController
from megatron_dynmoe.control.settle import settle
from megatron_dynmoe.conversion.names import ROUTER_MAP
from megatron_dynmoe.doctor.checkpoint.checks.progress import has_trained
from megatron_dynmoe.settings.config import DynMoEConfig

# The law is computed in float32 from numbers that were rounded to it.
_ROUNDING = 2e-6


def check_map(
    scalars: Mapping[str, Mapping[int, float]],
    dynmoe: DynMoEConfig,
    args: Namespace,
    iteration: int,
) -> Iterator[str]:
    """What is wrong with the maps of the routers, in words.

    Args:
        scalars: the routers' state, by name and layer.
        dynmoe: the run's settings, with its seed, and a target that is drawn.
    """
    sizes = SimpleNamespace(
        num_moe_experts=args.num_experts,
        hidden_size=args.hidden_size,
        init_method_std=args.init_method_std,
    )
    dynmoe, law = settle(dynmoe.resolve(args.num_experts), sizes)
    assert dynmoe.drawn_target is not None and isinstance(law, MapController)
    layers = sorted(scalars["threshold"])
    maps: dict[str, Tensor] = {}
    for name in ROUTER_MAP:
        rows = [scalars.get(f"{name}[{knot}]", {}) for knot in range(len(law.knots))]
        for layer in layers:
            values = [row.get(layer, math.nan) for row in rows]
            if not all(map(math.isfinite, values)):
                yield f"{name} of layer {layer} is missing, or not finite"
                return
        maps[name] = torch.tensor([[row[layer] for row in rows] for layer in layers])
    targets, map_LK, integrals_LK = (maps[name] for name in ROUTER_MAP)
    if not torch.equal(targets, torch.tensor([law.knots] * len(layers))):
        yield f"knot_targets of layer {layers[0]} are not those of {dynmoe.drawn_target}"
        return
    low, high = dynmoe.control.min_threshold, dynmoe.control.max_threshold
    for layer, thresholds_K in zip(layers, map_LK, strict=True):
        in_order = bool((law.direction * thresholds_K.diff() >= 0).all())
        if not in_order or thresholds_K.min() < low or thresholds_K.max() > high:
            shown = ", ".join(f"{threshold:g}" for threshold in thresholds_K)
            yield (
                f"knot_thresholds of layer {layer} are {shown}: they have to be in order, within "
                f"{low:g} to {high:g}"
            )
            return
    for name, values_LK in (("threshold", map_LK), ("integral", integrals_LK)):
        at_mean = law.at_mean_target(values_LK)
        saved = torch.tensor([scalars[name][layer] for layer in layers])
        if not torch.allclose(at_mean, saved, rtol=1e-6, atol=_ROUNDING):
            yield f"{name} is not that of the knots at the mean target {dynmoe.drawn_target.mean:g}"
            return
    if not has_trained(args, iteration) or args.fp16:
        return  # nothing was measured yet; or a skipped step may have kept an earlier target
    measured_L = torch.tensor([scalars["measured"][layer] for layer in layers], dtype=torch.float64)
    if dynmoe.scope == "global":
        measured_L = measured_L.mean().expand(len(layers))
    expected_LK = law.map_after(measured_L, dynmoe.drawn_target.at(iteration - 1), integrals_LK)
    if not torch.allclose(expected_LK, map_LK, rtol=0, atol=_ROUNDING):
        worst = int((expected_LK - map_LK).abs().amax(dim=-1).argmax())
        yield (
            f"knot_thresholds of layer {layers[worst]} are not those that the controller's law "
            "gives for its integrals and measured count: they are not of one step"
        )
