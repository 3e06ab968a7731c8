"""Plans a run: what it takes, and whether it fits."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_dynmoe.jobs.parse import read_args
from megatron_dynmoe.jobs.recipes import command_words
from megatron_dynmoe.jobs.refusals import check_start
from megatron_dynmoe.planning.experts_per_token import ExpertCounts, expected_counts
from megatron_dynmoe.planning.gpus import GPU
from megatron_dynmoe.planning.layout import Layout, check_layout
from megatron_dynmoe.planning.memory import Memory, MemoryModel
from megatron_dynmoe.planning.shape import active_parameters, total_parameters
from megatron_dynmoe.settings.arguments import resolved_from_args

MAX_REMEDIES = 3
MAX_TOKENS = 1e18  # far beyond any run; up to here, whole numbers are exact


@dataclass(frozen=True)
class Plan:
    """What a run takes. Sizes are in bytes; memory is that of the fullest GPU.

    Attributes:
        stage: the pipeline rank of the GPU that is fullest at the mean count.
        mean, first_steps, worst_case: its memory at these counts of experts per token.
        cap_that_fits: the largest cap whose worst case fits, None if there is none.
        hours: computed, not measured: FLOPs over the GPUs' peak at the given utilization.
        remedies: if the run does not fit, changes with which it would.
        worst_case_remedies: if no cap above the mean rules the worst case out, changes that do.
    """

    recipe: str
    gpu: GPU
    layout: Layout
    parameters: int
    active_parameters: float
    counts: ExpertCounts
    stage: int
    mean: Memory
    first_steps: Memory
    worst_case: Memory
    cap_that_fits: int | None
    tokens_per_step: int
    steps: int
    flops: float
    utilization: float
    checkpoint_bytes: int
    num_checkpoints: int | None
    remedies: tuple[str, ...]
    worst_case_remedies: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the run fits with a balanced load, from the first step on."""
        return max(self.mean.total, self.first_steps.total) <= self.gpu.memory

    @property
    def tokens(self) -> int:
        """The number of tokens in the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def hours(self) -> float:
        """The run's duration: its FLOPs over the GPUs' peak at the given utilization."""
        rate = self.layout.world_size * self.gpu.flops * self.utilization
        return self.flops / rate / 3600


def make_plan(
    recipe: str,
    flags: Sequence[str],
    num_gpus: int,
    gpu: GPU,
    *,
    tokens: float | None = None,
    utilization: float = 0.4,
    experts_per_token: float | None = None,
) -> Plan:
    """Plan a run.

    Args:
        recipe: the recipe's name or path.
        flags: Megatron's and ours, which override the recipe's.
        tokens: the number of tokens in the whole run, instead of --train-iters.
        utilization: model FLOPs per second over the GPUs' peak.
        experts_per_token: the mean, instead of the one that the routing's settings imply.

    Raises:
        ValueError: a value makes no sense, or the layout cannot work.
    """
    words = command_words(recipe, flags)
    layout = Layout.from_flags(words, num_gpus)
    check_layout(layout)
    if not 0 < utilization <= 1:
        raise ValueError(f"--utilization is {utilization:g}: use more than 0, at most 1.")
    check_start(words, num_gpus, gpu)
    args = read_args(words)
    counts = expected_counts(args, experts_per_token)
    model = _memory_model(args, layout)
    (stage, mean), (_, first_steps) = map(model.fullest, counts.rows_per_token)
    fits = max(mean.total, first_steps.total) <= gpu.memory
    worst_case = model.worst_case(counts.cap)[1]
    cap_that_fits = model.cap_that_fits(gpu.memory) if model.shape.num_experts else None
    needs_more_than_a_cap = worst_case.total > gpu.memory and (cap_that_fits or 0) < counts.mean
    steps = _steps(args, layout, tokens)

    def remedies(needed: Callable[[MemoryModel], float]) -> tuple[str, ...]:
        return tuple(_remedies(words, num_gpus, gpu, lambda model: needed(model) <= gpu.memory))

    return Plan(
        recipe=recipe,
        gpu=gpu,
        layout=layout,
        parameters=total_parameters(model.shape),
        active_parameters=active_parameters(model.shape, counts.mean),
        counts=counts,
        stage=stage,
        mean=mean,
        first_steps=first_steps,
        worst_case=worst_case,
        cap_that_fits=cap_that_fits,
        tokens_per_step=layout.global_batch * layout.seq_length,
        steps=steps,
        flops=_flops(args, steps * layout.global_batch, counts.computed),
        utilization=utilization,
        checkpoint_bytes=model.checkpoint_bytes,
        num_checkpoints=math.ceil(steps / args.save_interval) if args.save_interval else None,
        remedies=()
        if fits
        else remedies(lambda model: model.fullest(max(counts.rows_per_token))[1].total),
        worst_case_remedies=remedies(lambda model: model.worst_case(counts.cap)[1].total)
        if fits and needs_more_than_a_cap
        else (),
    )


def checkpoints(recipe: str, flags: Sequence[str]) -> tuple[int, int | None]:
    """The bytes of one checkpoint, and, if --save-interval is given, how many the run keeps.

    Raises:
        ValueError: a value makes no sense.
    """
    words = command_words(recipe, flags)
    args, layout = read_args(words), Layout.from_flags(words, 1)
    interval, steps = args.save_interval, _steps(args, layout, None)
    number = math.ceil(steps / interval) if interval else None
    return _memory_model(args, layout).checkpoint_bytes, number


def _memory_model(args: Namespace, layout: Layout) -> MemoryModel:
    return MemoryModel.from_args(args, layout, resolved_from_args(args, args.num_experts))


def _steps(args: Namespace, layout: Layout, tokens: float | None) -> int:
    if args.step_batch_size_schedule:
        raise ValueError(
            f"--step-batch-size-schedule is {args.step_batch_size_schedule}: steps are planned for "
            "one --global-batch-size. Leave it out to plan without."
        )
    per_step = layout.global_batch * layout.seq_length
    if tokens is not None:
        if not 1 <= tokens < math.inf:
            raise ValueError(f"--tokens is {tokens:g}: give the tokens of the run, such as 100e9.")
        steps = math.ceil(tokens / per_step)
    elif args.train_samples:
        steps = -(-args.train_samples // layout.global_batch)
    elif args.train_iters is not None:
        steps = args.train_iters
    else:
        raise ValueError("the length of the run is not known: give --tokens or --train-iters.")
    if (steps - 1) * per_step > MAX_TOKENS:
        raise ValueError(
            f"the run has more than {MAX_TOKENS:g} tokens: give fewer --tokens, --train-iters or "
            "--train-samples."
        )
    return steps


def _flops(args: Namespace, num_samples: int, experts_per_token: float) -> float:
    from megatron_dynmoe.runs.metrics import floating_point_operations

    return floating_point_operations(args, num_samples, experts_per_token)


def _remedies(
    words: Sequence[str], num_gpus: int, gpu: GPU, fits: Callable[[MemoryModel], bool]
) -> Iterator[str]:
    """Flags with which the run would fit, the smallest change first."""
    found = 0
    for change in _changes(Layout.from_flags(words, num_gpus)):
        changed = [*words, *change.split()]
        layout = Layout.from_flags(changed, num_gpus)
        try:
            check_layout(layout)
            does = fits(_memory_model(read_args(changed), layout))
            if does:
                check_start(changed, num_gpus, gpu)
        except ValueError:
            continue
        if does:
            yield change
            found += 1
            if found == MAX_REMEDIES:
                return


def _changes(layout: Layout) -> Iterator[str]:
    micro, recompute = (
        "--micro-batch-size 1",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    )
    yield "--use-distributed-optimizer"
    size = layout.micro_batch // 2
    while size >= 1:
        yield f"--micro-batch-size {size}"
        size //= 2
    yield recompute
    yield f"{micro} {recompute}"
    factors = [2**power for power in range(1, layout.world_size.bit_length())]
    flags = {
        "--expert-model-parallel-size": layout.expert if layout.num_experts else 0,
        "--pipeline-model-parallel-size": layout.pipeline,
    }
    for rest in ("", f" {micro}", f" {micro} {recompute}"):
        for factor in factors:
            for flag, now in flags.items():
                if now:
                    yield f"{flag} {now * factor}{rest}"
    for factor in factors:
        yield f"--tensor-model-parallel-size {layout.tensor * factor} --sequence-parallel"
