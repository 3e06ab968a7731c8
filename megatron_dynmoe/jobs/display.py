"""Shows a plan to people as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_dynmoe.jobs.plan import Plan
    from megatron_dynmoe.planning.memory import Memory


# The parts in the order of the table.
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations (estimated)",
    "expert_rows": "expert rows (estimated)",
    "update": "or, instead of these, the optimizer's step",
}


def describe(plan: Plan) -> str:
    """Write the plan as text."""
    return "\n".join([*_summary(plan), "", *_memory_table(plan), "", *_verdict(plan)])


def show_bytes(size: float) -> str:
    """A size in bytes for people, in powers of 1000, like the sizes of disks and data sheets."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} KB"


def _summary(plan: Plan) -> Iterator[str]:
    layout, counts = plan.layout, plan.counts
    yield f"{plan.recipe} on {layout.world_size} x {plan.gpu.label}"
    yield ""
    size = f"{_count(plan.parameters)} parameters"
    if counts.mean:
        size += f", {_count(plan.active_parameters)} active at {counts.mean:.3g} experts per token"
        size += f" ({counts.source})"
    yield _line("model", size)
    parallel = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "expert": layout.expert,
        "data": layout.data,
    }
    shown = " x ".join(f"{name} {size}" for name, size in parallel.items() if size > 1)
    yield _line("layout", shown or "one GPU")
    yield _line(
        "step",
        f"{_count(plan.tokens_per_step)} tokens: {layout.num_micro_batches} micro-batches of "
        f"{layout.micro_batch} x {layout.seq_length} on each of {layout.data} data-parallel ranks",
    )
    yield _line(
        "run", f"{plan.steps:,} steps, {_count(plan.tokens)} tokens, {plan.flops:.3g} FLOPs"
    )
    yield _line(
        "time",
        f"{_hours(plan.hours)} at {plan.utilization:.0%} of {plan.gpu.flops / 1e12:g} TFLOP/s a "
        "GPU: arithmetic, no measurement",
    )
    kept = ""
    if plan.num_checkpoints is not None:
        total = plan.num_checkpoints * plan.checkpoint_bytes
        kept = f"; the run keeps {plan.num_checkpoints}, {show_bytes(total)}"
    yield _line("checkpoint", f"{show_bytes(plan.checkpoint_bytes)}{kept}")


def _memory_table(plan: Plan) -> Iterator[str]:
    counts, layout = plan.counts, plan.layout
    columns: dict[str, tuple[Memory, float]] = {"mean": (plan.mean, counts.mean)}
    if layout.num_experts:
        most = counts.cap or layout.num_experts
        columns |= {
            "first steps": (plan.first_steps, counts.first_steps),
            "worst case": (plan.worst_case, most),
        }
    unit, scale = ("GB", 1e9) if plan.mean.total >= 1e9 else ("MB", 1e6)
    where = "" if layout.pipeline == 1 else f", pipeline rank {plan.stage} of {layout.pipeline}"
    yield f"  {f'memory of a GPU, {unit}' + where:<45}" + "".join(f"{name:>13}" for name in columns)
    if layout.num_experts:
        yield _row("experts per token", [f"{count:.2f}" for _, count in columns.values()])
    for part, name in PARTS.items():
        if part == "expert_rows" and not layout.num_experts:
            continue
        yield _row(name, [f"{getattr(memory, part) / scale:.2f}" for memory, _ in columns.values()])
    yield _row("total", [f"{memory.total / scale:.2f}" for memory, _ in columns.values()])
    room = plan.gpu.memory
    yield _row(
        f"of {room / scale:,g}",
        ["fits" if memory.total <= room else "too much" for memory, _ in columns.values()],
    )


def _verdict(plan: Plan) -> Iterator[str]:
    room, counts = plan.gpu.memory, plan.counts
    if not plan.fits:
        largest = max(plan.mean.total, plan.first_steps.total)
        yield (
            f"Does not fit: it needs {largest / 1e9:.1f} GB of {room / 1e9:g} GB on the fullest "
            "GPU."
        )
        if plan.remedies:
            yield "Any of these makes it fit:"
            yield from (f"  {remedy}" for remedy in plan.remedies)
        else:
            yield "Neither recomputation, smaller micro-batches nor more parallelism make it fit."
        return
    if not plan.layout.num_experts:
        yield "Fits."
        return
    yield "Fits with a balanced load."
    if plan.worst_case.total > room:
        cap = plan.cap_that_fits or 0
        if cap >= counts.mean:
            remedy = f"--moe-dynamic-max-experts-per-token {cap} rules it out."
        elif plan.worst_case_remedies:
            remedy = "no cap above the mean rules it out. Any of these does:"
        else:
            remedy = (
                "neither a cap above the mean, recomputation, smaller micro-batches nor more "
                "parallelism rule it out."
            )
        yield from textwrap.wrap(
            "The worst case does not, in which every token of all ranks that share experts chooses "
            "as many experts of this GPU as it may, in all layers at once: " + remedy,
            100,
        )
        yield from (f"  {remedy}" for remedy in plan.worst_case_remedies)


def _line(name: str, text: str) -> str:
    return f"  {name:<12}{text}"


def _row(name: str, cells: list[str]) -> str:
    return f"  {name:<45}" + "".join(f"{cell:>13}" for cell in cells)


def _count(number: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number:g}"


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours:,.0f} hours ({hours / 24:.1f} days)"
    return f"{hours:.1f} hours" if hours >= 0.1 else "less than 6 minutes"
