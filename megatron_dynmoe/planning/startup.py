"""The check when a training starts: can the routing, at its worst, exceed the device's memory?"""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_dynmoe.planning.layout import Layout
from megatron_dynmoe.planning.memory import MemoryModel
from megatron_dynmoe.settings.config import DynMoEConfig

if TYPE_CHECKING:
    from megatron_dynmoe.backends.choice import BackEnd


def memory_line(args: Namespace, dynmoe: DynMoEConfig, plan: BackEnd) -> str:
    """Compare the most memory that a run can need on its fullest device with this device's memory.

    The report warns and does not stop the run. Its bound assumes that all tokens of all ranks go to
    the same device, in all layers at once. No trained router comes near that.

    Args:
        args: Megatron's validated arguments.
        dynmoe: resolved settings of dynamic routing.
        plan: the model's back end.

    Returns:
        A line for the log.
    """
    if plan.backend != "torch_native" or plan.kept:
        return "> memory: its bound is known only if torch_native runs all parts of a layer"
    import torch

    from megatron_dynmoe.backends import cpu

    device_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if cpu.is_installed():  # the processes of this machine share its memory
        device_bytes //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Megatron has validated the arguments: the split of layers is settled, whoever asked for it.
    chunks = args.virtual_pipeline_model_parallel_size or 1
    layout = dataclasses.replace(
        Layout.from_args(args), stages_per_rank=chunks, has_own_split=False
    )
    try:
        model = MemoryModel.from_args(args, layout, dynmoe)
    except ValueError as error:
        return f"> memory: its bound is not known: {error}"
    return describe_bound(model, dynmoe.max_experts_per_token, device_bytes)


def describe_bound(model: MemoryModel, cap: int | None, device_bytes: int) -> str:
    """Write the line of :func:`memory_line`."""
    most = model.worst_case(cap)[1].total
    sizes = f"{most / 1e9:.2f} GB of {device_bytes / 1e9:.2f} GB"
    if most <= device_bytes:
        return f"> memory: at most {sizes}, whatever the routing"
    fitting = model.cap_that_fits(device_bytes)
    setting = (
        "no max_experts_per_token is set" if cap is None else f"max_experts_per_token is {cap}"
    )
    remedy = (
        f"{fitting} is the largest with which it always fits"
        if fitting is not None
        else "no value rules it out: try a lower --micro-batch-size or --recompute-granularity full"
    )
    return f"WARNING: {setting}, with which a step can need {sizes} at worst; {remedy}."
