"""What a training needs beside its model: hooks, reports, and lines in the log."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from megatron_dynmoe.backends import choice, transformer_engine
from megatron_dynmoe.control.pi_map import MapController
from megatron_dynmoe.control.settle import MIN_GAIN_MARGIN, settled_gain_margin
from megatron_dynmoe.control.update import GlobalBatchUpdate
from megatron_dynmoe.model.settled import Settled
from megatron_dynmoe.planning.startup import memory_line
from megatron_dynmoe.runs.metrics import install_metrics_tracker

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class SettledUpdate(GlobalBatchUpdate):
    """The update of a prepared training, from which the next model chunk reads the settings."""

    def __init__(self, settled: Settled, finalize: Callable[..., None] | None = None) -> None:
        assert settled.rule is not None
        super().__init__(settled.dynmoe, settled.rule, settled.controller, finalize)
        self.settled = settled


def prepare_training(
    settled: Settled, transformer: TransformerConfig, args: Namespace | None = None
) -> None:
    """Make upstream's config agree with the settings, and hook in the update of a global batch.

    Args:
        settled: the run's settings.
        transformer: upstream's config, which is changed: its implementation, grouped experts under
            Transformer Engine, routing in fp32, and the hook that ends a global batch.
        args: Megatron's arguments. The resolved settings are added to them, and so get into
            checkpoints. None in a user's own training loop.
    """
    transformer.transformer_impl = settled.backend.implementation
    if settled.rule is None:
        return
    if settled.backend.backend == "transformer_engine":
        transformer_engine.group_experts(transformer)
    transformer.moe_router_dtype = "fp32"
    transformer.finalize_model_grads_func = SettledUpdate(
        settled, transformer.finalize_model_grads_func
    )
    install_metrics_tracker(settled.dynmoe)
    if args is not None:
        # Megatron saves its arguments with the model, but these lack settings from a YAML file.
        args.moe_dynamic_settings = settled.dynmoe.to_dict()


def describe(
    settled: Settled, transformer: TransformerConfig, args: Namespace | None = None
) -> Iterator[str]:
    """Yield log lines that say what was settled; arguments as for :func:`prepare_training`."""
    yield choice.describe(settled.backend, transformer)
    if settled.rule is None:
        return
    if args is not None:
        yield memory_line(args, settled.dynmoe, settled.backend)
    settings = ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settled.dynmoe.to_dict().items()
    )
    yield f"> dynamic routing: {settings}"
    controller = settled.controller
    if isinstance(controller, MapController):
        of_knots = ", ".join(
            f"{threshold:.4g} for {knot:.3g}"
            for knot, threshold in zip(controller.knots, controller.initial_map, strict=True)
        )
        yield f"> targets are drawn for each global batch; first thresholds: {of_knots}"
        return
    if controller is None:
        return
    margin = settled_gain_margin(settled.dynmoe, controller, transformer)
    if margin < 0.999 * MIN_GAIN_MARGIN:  # computed gains may have exactly this margin
        yield (
            f"WARNING: proportional_gain {controller.proportional_gain:.4g} and integral_gain "
            f"{controller.integral_gain:.4g} become unstable once the count responds {margin:.2g} "
            f"times as strongly as at the start; ask for {MIN_GAIN_MARGIN:g} or more, or use auto."
        )
