"""Shows a dry run to people as text: figures in columns, and beside them what they are of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from megatron_dynmoe.dry_run.launch import DryRun
from megatron_dynmoe.dry_run.reporting.result import PHASES, Kernels, Result, Wait

NOT_SEEN = (
    "Not seen: the values of tensors, NCCL and the network, time, the memory that CUDA, NCCL and "
    "fragmentation take."
)
_SHOWN = 0.005  # of a phase's peak
_SIZES = {
    "measured": "rows are counted anew in every layer and pass",
    "target": "the room for rows changes from step to step",
}
_KERNELS = {"0": "plain PyTorch", "1": "Triton's", "fused": "Triton's, experts fused"}


def describe(run: DryRun) -> str:
    """Write a dry run as text."""
    result = run.result
    sections: list[Iterator[str]] = [
        _summary(run),
        _memory(run),
        _waits(result.waits, result.copies),
        _graphs(run),
        _kernels(run),
        _sent(result),
        _mistakes(result),
        iter([_verdict(run), NOT_SEEN]),
    ]
    return "\n\n".join(text for text in map("\n".join, sections) if text)


def _summary(run: DryRun) -> Iterator[str]:
    layout, result = run.layout, run.result
    yield f"{run.recipe} on {layout.world_size} x {run.gpu.label}, a dry run of rank {run.rank}"
    yield ""
    layers = _layers(result.layers)
    if layout.pipeline > 1:
        layers = f"pipeline rank {run.stage} of {layout.pipeline}, {layers}"
    yield _line("rank", layers)
    step = f"{result.micro_batches} micro-batches of {layout.micro_batch} x {layout.seq_length}"
    if result.micro_batches_run < result.micro_batches:
        step += f"; {result.micro_batches_run} were run, and one of them stands for the others"
    yield _line("step", step)
    if layout.num_experts:
        load = "evenly spread"
        if run.imbalance != 1:
            load = f"the experts of this GPU get {run.imbalance:g} times their share"
        yield _line(
            "routing", f"{run.experts_per_token:.4g} experts per token ({run.counts}), {load}"
        )
    yield _line("kernels", f"{_KERNELS[run.kernels]} (DYNMOE_KERNELS={run.kernels})")


def _memory(run: DryRun) -> Iterator[str]:
    result = run.result
    unit, scale = ("GB", 1e9) if result.peak >= 1e9 else ("MB", 1e6)

    def row(sizes: dict[str, int], name: str) -> str:
        cells = [f"{sizes[phase] / scale:.2f}" if phase in sizes else "" for phase in PHASES]
        return _row(cells, name)

    yield _row(PHASES, f"memory, {unit}")
    yield row(result.peak_bytes, "at the peak, of which hold most:")
    for holder in result.holders:
        if not any(size >= _SHOWN * result.peak_bytes[p] for p, size in holder.num_bytes.items()):
            continue
        yield row(holder.num_bytes, "  " + _place(holder.line, holder.caller))
    yield row(dict.fromkeys(PHASES, result.state_bytes), "what stays between steps")
    if run.formula is None:
        yield f"  The planner's formula does not know this: {run.formula_note}"
        return
    total = run.formula.total
    yield _row(
        ["", f"{total / scale:.2f}", f"{(total / result.peak - 1) * 100:+.1f} %"],
        "the planner's formula, and by how much it is more than the peak",
    )


def _waits(waits: list[Wait], copies: dict[str, float]) -> Iterator[str]:
    yield "  The host waits for the device:"
    yield from map(_wait_row, waits)
    if copies:
        count = sum(copies.values())
        yield f"  {f'{count:g}':>8}  per {'step':<24}copies to the device that block"


def _graphs(run: DryRun) -> Iterator[str]:
    sizes = _SIZES.get(run.row_buffer or "", "none change")
    yield f"  A CUDA graph of the passes could not hold (sizes: {sizes}):"
    breaks = run.result.graph_breaks
    yield from map(_wait_row, breaks)
    if not breaks:
        yield "            no wait and no copy that blocks"


def _wait_row(wait: Wait) -> str:
    place = _place(wait.line, wait.caller)
    return f"  {f'{wait.count:g}':>8}  per {wait.per:<24}{wait.call:<22} {place}"


def _kernels(run: DryRun) -> Iterator[str]:
    result, rows = run.result, run.result.kernels
    title = f"kernels of a micro-batch in layer {result.kernel_layer}, and what they move"
    yield _row(["forward", "backward", "MB"], title)
    yield from map(_kernel_row, rows)
    forward, backward = (sum(getattr(row, phase) for row in rows) for phase in PHASES[:2])
    moved = sum(map(_megabytes, rows))
    yield _row([f"{forward:g}", f"{backward:g}", f"{moved:,.0f}"], "the whole layer")
    yield _kernel_row(result.kernels_outside)
    if run.least_expert_traffic:
        yield (
            f"  read and written by its experts, forward: {_size(result.expert_traffic)}, "
            f"{result.expert_traffic / run.least_expert_traffic:.2f} times the least that they "
            f"must; kept for the backward pass: {_size(result.expert_kept)}"
        )
    yield f"  kernels of a step: {_by_phase(result.kernels_per_step)}"
    files = ", ".join(f"{file} {count:g}" for file, count in result.kernels_between.items())
    if files:
        yield f"  the rest: {files}"
    yield f"  bytes that they read and write: {_by_phase(result.traffic)}"
    yield f"  FLOPs of a step: {_by_phase(result.flops)}"
    yield f"  FLOPs by the planner's formula, the mean of all GPUs: {_count(run.planned_flops)}"


def _by_phase(counts: dict[str, float]) -> str:
    shown = ", ".join(f"{phase} {_count(count)}" for phase, count in counts.items())
    return f"{_count(sum(counts.values()))} ({shown})"


def _kernel_row(row: Kernels) -> str:
    files = ", ".join(f"{file} {count:g}" for file, count in [*row.files.items()][:4])
    cells = [f"{row.forward:g}", f"{row.backward:g}", f"{_megabytes(row):,.0f}"]
    return _row(cells, f"{row.part}: {files}")


def _megabytes(row: Kernels) -> float:
    return sum(row.traffic.values()) / 1e6


def _sent(result: Result) -> Iterator[str]:
    if not result.sent:
        return
    yield _row(["ranks", "calls", ""], "sent in a step")
    for sent in result.sent:
        cells = [f"{sent.size}", f"{sent.calls:g}", _size(sent.num_bytes)]
        phases = " and ".join(sent.phases)
        yield _row(cells, f"{sent.kind}, {_group(sent.group)}, {phases}:")
        place = _place(sent.line, sent.caller)
        if not sent.is_async:
            yield _row([], f"  {place}, awaited at once")
            continue
        yield _row([], f"  {place}")
        yield _row([], f"  awaited by {', '.join(map(_short, sent.awaited)) or 'nobody'}")


def _mistakes(result: Result) -> Iterator[str]:
    if result.mistakes:
        yield "  MISTAKE: tensors made on the host, for no reason that is known, in a step:"
    for wrong in result.mistakes:
        yield f"  {wrong.per_step:8g}  {wrong.made} at {_place(wrong.line, wrong.caller)}"


def _verdict(run: DryRun) -> str:
    fits = "Fits" if run.fits else "Does not fit"
    return f"{fits}: {_size(run.result.peak)} of {run.gpu.memory / 1e9:g} GB."


def _place(line: str, caller: str) -> str:
    return f"{_short(line)} < {PurePath(caller).name}" if caller else _short(line)


def _short(line: str) -> str:
    """A line with the last folder of its file."""
    return "/".join(PurePath(line).parts[-2:])


def _group(name: str) -> str:
    return name.replace("_GROUP", "").replace("_", " ").lower()


def _size(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:g} B"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e9 else f"{number:.3g}"


def _layers(numbers: list[int]) -> str:
    if not numbers:
        return "no layers"
    first, last = numbers[0], numbers[-1]
    if first == last:
        return f"layer {first}"
    if numbers == [*range(first, last + 1)]:
        return f"layers {first} to {last}"
    return f"layers {', '.join(map(str, numbers))}"


def _line(name: str, text: str) -> str:
    return f"  {name:<9}{text}"


def _row(cells: Sequence[str], name: str) -> str:
    return "  " + "".join(f"{cell:>10}" for cell in [*cells, "", ""][:3]) + f"   {name}"
