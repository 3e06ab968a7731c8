"""How a run is spread over processes, read from its flags, and whether that can work.

This is pure arithmetic and needs no torch. The launch scripts and the planner use it, so that a run
with an impossible layout stops before it gets a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dynmoe.settings.hybrid_pattern import PIPE
from megatron_dynmoe.settings.messages.refusals import FlagError
from megatron_dynmoe.settings.messages.words import values_of, whole_number


@dataclass(frozen=True)
class Layout:
    """Sizes of a run from its flags, with Megatron's defaults for those that are not given.

    Attributes:
        world_size: number of processes, one per GPU.
        tensor, pipeline, context, expert, expert_tensor: parallel sizes. Expert tensor parallelism
            equals tensor parallelism unless it is given.
        stages_per_rank: number of virtual pipeline stages on each pipeline rank.
        num_experts: experts of an MoE layer; 0 for a dense model.
        micro_batch, global_batch: numbers of sequences.
        has_own_split: whether flags place the layers on pipeline stages explicitly.
    """

    world_size: int
    num_layers: int
    num_attention_heads: int
    num_experts: int
    seq_length: int
    micro_batch: int
    global_batch: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int
    stages_per_rank: int
    sequence_parallel: bool
    has_own_split: bool

    @classmethod
    def from_flags(cls, flags: Sequence[str], world_size: int) -> Layout:
        """Read Megatron's flags.

        Raises:
            ValueError: a size without a default in Megatron is missing, or a size is no positive
                number.
        """
        values = values_of(flags)

        def size(name: str, default: int | None = None) -> int:
            return whole_number(values, name, default)

        pattern = "".join(values.get("hybrid-layer-pattern", ()))
        experts = values.get("num-experts")
        tensor = size("tensor-model-parallel-size", 1)
        pipeline = size("pipeline-model-parallel-size", 1)
        context = size("context-parallel-size", 1)
        micro_batch, model_size = size("micro-batch-size"), tensor * pipeline * context
        return cls(
            world_size=world_size,
            num_layers=size("num-layers", len(pattern.replace(PIPE, "")) or None),
            num_attention_heads=size("num-attention-heads"),
            num_experts=0 if experts is None or experts == ["0"] else size("num-experts"),
            seq_length=size("seq-length"),
            micro_batch=micro_batch,
            global_batch=size("global-batch-size", micro_batch * (world_size // model_size)),
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=size("expert-model-parallel-size", 1),
            expert_tensor=size("expert-tensor-parallel-size", tensor),
            stages_per_rank=size("num-virtual-stages-per-pipeline-rank", 1),
            sequence_parallel="sequence-parallel" in values,
            has_own_split=any(name in values for name in _OWN_SPLITS) or PIPE in pattern,
        )

    @classmethod
    def from_args(cls, args: Any) -> Layout:
        """Read Megatron's arguments, which are parsed; they need not be validated yet."""
        tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        context = args.context_parallel_size
        ranks = max(args.world_size // max(tensor * pipeline * context, 1), 1)
        return cls(
            world_size=args.world_size,
            num_layers=args.num_layers,
            num_attention_heads=args.num_attention_heads,
            num_experts=args.num_experts or 0,
            seq_length=args.seq_length,
            micro_batch=args.micro_batch_size,
            global_batch=args.global_batch_size or args.micro_batch_size * ranks,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=args.expert_model_parallel_size,
            expert_tensor=args.expert_tensor_parallel_size or tensor,
            stages_per_rank=args.num_virtual_stages_per_pipeline_rank or 1,
            sequence_parallel=args.sequence_parallel,
            has_own_split=any(getattr(args, name.replace("-", "_"), None) for name in _OWN_SPLITS)
            or PIPE in (args.hybrid_layer_pattern or ""),
        )

    @property
    def model_size(self) -> int:
        """Number of processes that hold one copy of the model, not counting experts."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world_size // self.model_size

    @property
    def expert_data(self) -> int:
        """Number of copies of each expert."""
        return self.world_size // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches of each rank per step."""
        return max(self.global_batch // (self.micro_batch * self.data), 1)


# Flags that place the layers unevenly. Megatron itself checks them.
_OWN_SPLITS = (
    "pipeline-model-parallel-layout",
    "decoder-first-pipeline-num-layers",
    "decoder-last-pipeline-num-layers",
    "account-for-embedding-in-pipeline-split",
    "account-for-loss-in-pipeline-split",
    "num-layers-per-virtual-pipeline-stage",
)


def check_layout(layout: Layout) -> None:
    """Refuse a layout that cannot work.

    Raises:
        FlagError: the layout cannot work. The message names the value and the remedy.
    """
    for name in ("tensor", "pipeline", "context", "expert", "expert_tensor"):
        if (size := getattr(layout, name)) < 1:
            middle = "" if name in ("context", "expert_tensor") else "_model"
            raise FlagError(f"{name}{middle}_parallel_size", size, "", "use 1 or more")
    world, model = layout.world_size, layout.model_size
    if world < 1:
        raise FlagError("world_size", world, "", "use 1 or more")
    if world % model:
        raise FlagError(
            "world_size",
            world,
            f", which {_product(layout)} does not divide",
            f"use a multiple of {model} processes, or a smaller {_parallel_flags(layout)}",
        )
    _check_experts(layout)
    _check_pipeline(layout)
    _check_split_of_layers(layout)
    per_step = layout.micro_batch * layout.data
    if layout.global_batch % per_step:
        lower = layout.global_batch // per_step * per_step
        near = f"{lower} or {lower + per_step}" if lower else f"{per_step}"
        raise FlagError(
            "global_batch_size",
            layout.global_batch,
            f", which --micro-batch-size {layout.micro_batch} times {layout.data} data-parallel "
            "ranks does not divide",
            f"use {near}, or another micro-batch or number of processes",
        )
    if layout.stages_per_rank > 1 and layout.num_micro_batches % layout.pipeline:
        raise ValueError(
            f"a step has {layout.num_micro_batches} micro-batches, which the "
            f"{layout.pipeline} pipeline ranks do not divide as virtual stages need it: change "
            "--global-batch-size or --micro-batch-size."
        )


def _check_experts(layout: Layout) -> None:
    if not layout.num_experts:
        if layout.expert > 1:
            raise FlagError(
                "expert_model_parallel_size",
                layout.expert,
                ", but the model has no experts",
                "leave it out",
            )
        return
    if layout.num_experts % layout.expert:
        raise FlagError(
            "num_experts",
            layout.num_experts,
            f", which --expert-model-parallel-size {layout.expert} does not divide",
            f"use one of {_divisors(layout.num_experts, layout.world_size)}",
        )
    group = layout.expert_tensor * layout.expert * layout.pipeline
    if layout.world_size % group:
        raise FlagError(
            "world_size",
            layout.world_size,
            f", which expert parallel {layout.expert} x pipeline {layout.pipeline} x expert tensor "
            f"{layout.expert_tensor} = {group} does not divide",
            f"use a multiple of {group} processes, or a smaller --expert-model-parallel-size",
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        raise FlagError(
            "tensor_model_parallel_size",
            layout.tensor,
            " with experts",
            "add --sequence-parallel, which Megatron needs for both together",
        )


def _check_pipeline(layout: Layout) -> None:
    if layout.stages_per_rank > 1 and layout.pipeline == 1:
        raise FlagError(
            "num_virtual_stages_per_pipeline_rank",
            layout.stages_per_rank,
            " without a pipeline",
            "set --pipeline-model-parallel-size, or leave it out",
        )
    stages = layout.pipeline * layout.stages_per_rank
    if not layout.has_own_split and layout.num_layers % stages:
        virtual = (
            f" x {layout.stages_per_rank} virtual stages" if layout.stages_per_rank > 1 else ""
        )
        raise FlagError(
            "num_layers",
            layout.num_layers,
            f", which --pipeline-model-parallel-size {layout.pipeline}{virtual} does not divide",
            f"use one of {_divisors(layout.num_layers, layout.world_size)} stages in all, or place "
            "the layers with --pipeline-model-parallel-layout",
        )


def _check_split_of_layers(layout: Layout) -> None:
    if layout.num_attention_heads % layout.tensor:
        raise FlagError(
            "num_attention_heads",
            layout.num_attention_heads,
            f", which --tensor-model-parallel-size {layout.tensor} does not divide",
            f"use one of {_divisors(layout.num_attention_heads, layout.world_size)}",
        )
    if layout.sequence_parallel and layout.seq_length % layout.tensor:
        raise FlagError(
            "seq_length",
            layout.seq_length,
            f", which --tensor-model-parallel-size {layout.tensor} does not divide as "
            "--sequence-parallel needs it",
            "change one",
        )
    if layout.context > 1 and layout.seq_length % (2 * layout.context):
        raise FlagError(
            "seq_length",
            layout.seq_length,
            "",
            f"--context-parallel-size {layout.context} needs a multiple of {2 * layout.context}",
        )


def _product(layout: Layout) -> str:
    names = ("tensor", "pipeline", "context")
    parts = " x ".join(f"{name} {getattr(layout, name)}" for name in names)
    return f"{parts} = {layout.model_size}"


def _parallel_flags(layout: Layout) -> str:
    flags = {
        "--tensor-model-parallel-size": layout.tensor,
        "--pipeline-model-parallel-size": layout.pipeline,
        "--context-parallel-size": layout.context,
    }
    return " or ".join(flag for flag, size in flags.items() if size > 1)


def _divisors(number: int, most: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, most) + 1) if number % n == 0)
