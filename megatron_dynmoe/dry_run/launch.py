"""Asks for a dry run, and runs it in a process of its own, which leaves this one as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path

from megatron_dynmoe.dry_run.machine import NEEDED_BYTES
from megatron_dynmoe.dry_run.reporting.result import Result
from megatron_dynmoe.dry_run.request import Request
from megatron_dynmoe.jobs.parse import read_args
from megatron_dynmoe.jobs.recipes import command_words
from megatron_dynmoe.kernels import asked_for
from megatron_dynmoe.planning.experts_per_token import ExpertCounts, expected_counts
from megatron_dynmoe.planning.gpus import GPU
from megatron_dynmoe.planning.layout import Layout, check_layout
from megatron_dynmoe.planning.memory import Memory, MemoryModel
from megatron_dynmoe.settings.arguments import resolved_from_args
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.refusals import FlagError

_CHILD = "megatron_dynmoe.dry_run"
LEAST_IMBALANCE = 0.01
COUNTS = ("mean", "first", "cap")
ERROR = "dynmoe plan: error: "
# A launcher's variables, and one with which Triton's kernels would be interpreted.
_NOT_INHERITED = ("TORCHELASTIC_", "TRITON_INTERPRET")
_NO_MEMORY = ("MemoryError", "Cannot allocate memory", "failed to map segment", "bad_alloc")
# Settings whose code takes no fake tensors, the values that do, and the remedy.
_REFUSED = {
    "moe_dynamic_backend": ((None, "auto", "torch_native", "local"), "use torch_native"),
    "transformer_impl": ((None, "local"), "leave it out"),
    "cuda_graph_impl": (("none",), "leave it out"),
    "use_megatron_fsdp": ((False,), "leave it out"),
    "use_torch_fsdp2": ((False,), "leave it out"),
    "fp8": ((None,), "leave it out"),
    "fp4": ((None,), "leave it out"),
    "moe_permute_fusion": ((False,), "leave it out"),
    "optimizer_cpu_offload": ((False,), "leave it out"),
}


_SPELLED = {"fp8": "fp8_format", "fp4": "fp4_format"}  # Megatron stores them under other names


@dataclass(frozen=True)
class DryRun:
    """A dry run, and what the planner says of the same GPU.

    Attributes:
        rank: the rank that was run.
        stage: its pipeline rank.
        experts_per_token: the mean count of every layer, 0 without experts.
        counts: where it comes from.
        expected: the counts that the routing's settings imply: mean, first steps', cap.
        imbalance: how many times their share the experts of this rank get.
        kernels: DYNMOE_KERNELS: 0, 1 or fused.
        row_buffer: the setting, None without dynamic routing.
        formula: the planner's memory, None if it does not know a setting.
        formula_note: which setting that is.
        planned_flops: of a step, the mean of all GPUs, by Megatron's formula, which the planner
            takes.
        least_expert_traffic: bytes that a layer's experts must read and write in the forward pass
            of a micro-batch, None if the planner does not know a setting.
    """

    recipe: str
    gpu: GPU
    layout: Layout
    rank: int
    stage: int
    experts_per_token: float
    counts: str
    expected: ExpertCounts
    imbalance: float
    kernels: str
    row_buffer: str | None
    formula: Memory | None
    formula_note: str
    planned_flops: float
    least_expert_traffic: float | None
    result: Result

    @property
    def fits(self) -> bool:
        """Whether the peak is below the GPU's memory."""
        return self.result.peak <= self.gpu.memory


def dry_run(
    recipe: str,
    flags: Sequence[str],
    num_gpus: int | None,
    gpu: GPU,
    *,
    rank: int | None = None,
    counts: str = "mean",
    imbalance: float = 1.0,
    experts_per_token: float | None = None,
    kernels: str | None = None,
) -> DryRun:
    """Run two steps of a training without a GPU, and count what the second one does.

    Args:
        recipe: the recipe's name or path.
        flags: Megatron's and ours, which override the recipe's.
        num_gpus: None: as few as the layout takes.
        rank: None: the first rank of the pipeline rank that is fullest, as the planner says.
        counts: whose experts per token, one of :data:`COUNTS`.
        imbalance: how many times their share the experts of this rank get.
        experts_per_token: the mean, instead of the one that the routing's settings imply.
        kernels: DYNMOE_KERNELS; None: as the environment says.

    Raises:
        ValueError: a value makes no sense, or the layout cannot work.
        OSError: the training fails, or the process of the dry run ended without a result.
    """
    words = command_words(recipe, flags)
    if num_gpus is None:
        num_gpus = _fewest_gpus(Layout.from_flags(words, 1))
    layout = Layout.from_flags(words, num_gpus)
    check_layout(layout)
    args = read_args(words)
    resolved = resolved_from_args(args, layout.num_experts)
    _check_can_rehearse(args)
    expected = expected_counts(args, experts_per_token)
    if experts_per_token is not None and counts != "mean":
        raise FlagError(
            "experts_per_token",
            experts_per_token,
            f" beside --counts {counts}, which takes other counts",
            "leave one of them out",
        )
    _check_dispatcher(args, layout)
    experts, source = _experts_per_token(expected, counts, layout.num_experts)
    _check_imbalance(imbalance, layout, experts)
    model, note = _memory_model(args, layout)
    rows_per_token = expected.rows_with_room(experts)
    if rank is None:
        rank = _first_rank(model.fullest(rows_per_token)[0], layout, args) if model else 0
    if not 0 <= rank < layout.world_size:
        raise ValueError(f"--rank is {rank}: use 0 to {layout.world_size - 1}.")
    stage = _stage(rank, layout, args)
    setting = kernels or asked_for() or "0"
    request = Request(
        words,
        layout.world_size,
        rank,
        stage,
        gpu.label,
        gpu.capability,
        int(gpu.memory),
        experts,
        imbalance,
    )
    return DryRun(
        recipe=recipe,
        gpu=gpu,
        layout=layout,
        rank=rank,
        stage=stage,
        experts_per_token=experts,
        counts=source,
        expected=expected,
        imbalance=imbalance,
        kernels=setting,
        row_buffer=resolved.row_buffer,
        formula=None if model is None else model.of_stage(stage, rows_per_token, imbalance),
        formula_note=note,
        planned_flops=_planned_flops(args, layout, experts),
        least_expert_traffic=(
            None if model is None else model.least_expert_traffic(rows_per_token, imbalance)
        ),
        result=_run(request, setting),
    )


def _check_can_rehearse(args: Namespace) -> None:
    """Refuse settings whose code cannot run here."""
    for name, (values, remedy) in _REFUSED.items():
        value = getattr(args, name, values[0])
        if value not in values:
            name = _SPELLED.get(name, name)
            raise FlagError(name, value, ", and its code cannot run without a GPU", remedy)
    if args.reset_attention_mask:
        raise FlagError(
            "reset_attention_mask",
            True,
            ", and a dry run knows no tokens, and so no documents",
            "leave it out; the dry run is then that of attention over whole rows, which takes more",
        )


def _check_dispatcher(args: Namespace, layout: Layout) -> None:
    """Refuse what :mod:`~.stand_ins.deep_ep` does not stand in for."""
    if args.moe_token_dispatcher_type != "flex":
        return
    backend, remedy = args.moe_flex_dispatcher_backend, "--moe-token-dispatcher-type alltoall."
    if backend != "deepep":
        raise ValueError(
            f"--moe-flex-dispatcher-backend is {backend}, whose kernels nothing stands in for: use "
            f"deepep, or {remedy}"
        )
    if layout.expert_tensor > 1:
        raise ValueError(
            f"experts are split over {layout.expert_tensor} ranks, and a dry run does not count "
            f"their rows with flex: give --expert-tensor-parallel-size 1, or {remedy}"
        )


def _fewest_gpus(layout: Layout) -> int:
    return lcm(layout.model_size, layout.expert_tensor * layout.expert * layout.pipeline)


def _memory_model(args: Namespace, layout: Layout) -> tuple[MemoryModel | None, str]:
    """The planner's model, or which setting it does not know."""
    dynmoe = resolved_from_args(args, args.num_experts)
    try:
        return MemoryModel.from_args(args, layout, dynmoe), ""
    except ValueError as error:
        return None, str(error)


def _planned_flops(args: Namespace, layout: Layout, experts_per_token: float) -> float:
    """The floating-point operations of a step, the mean of all GPUs."""
    from megatron_dynmoe.runs.metrics import floating_point_operations

    whole = floating_point_operations(args, layout.global_batch, experts_per_token)
    return whole / layout.world_size


def _stage(rank: int, layout: Layout, args: Namespace) -> int:
    """The pipeline rank of a rank, in Megatron's order."""
    if args.use_tp_pp_dp_mapping:
        return rank // (layout.tensor * layout.context) % layout.pipeline
    return rank // (layout.world_size // layout.pipeline)


def _first_rank(stage: int, layout: Layout, args: Namespace) -> int:
    return next(rank for rank in range(layout.world_size) if _stage(rank, layout, args) == stage)


def _experts_per_token(expected: ExpertCounts, counts: str, num_experts: int) -> tuple[float, str]:
    if not num_experts:
        if counts != "mean":
            raise ValueError(f"--counts is {counts}, but the model has no experts: leave it out.")
        return 0.0, expected.source
    return {
        "mean": (expected.mean, expected.source),
        "first": (expected.first_steps, "the first steps'"),
        "cap": (expected.cap or num_experts, "the cap" if expected.cap else "all experts"),
    }[counts]


def _check_imbalance(imbalance: float, layout: Layout, experts_per_token: float) -> None:
    if imbalance == 1:
        return
    if layout.expert == 1:
        raise ValueError(
            f"--imbalance is {imbalance:g}, but every GPU holds all experts and gets the same rows "
            "whatever their balance: leave it out, or use --expert-model-parallel-size."
        )
    most = min(layout.expert, layout.num_experts / experts_per_token)
    if not LEAST_IMBALANCE <= imbalance <= most:
        raise ValueError(
            f"--imbalance is {imbalance:g}: use {LEAST_IMBALANCE} to {most:g}, at which all tokens "
            "go to this GPU's experts."
        )


def _run(request: Request, kernels: str) -> Result:
    """Run it in a child process.

    Raises:
        UsageError: the child found that a setting cannot work.
        OSError: it ended for another reason.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)
    }
    env = inherited | {"CUDA_VISIBLE_DEVICES": "", "DYNMOE_KERNELS": kernels}
    env.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="dynmoe-") as folder:
        file, log = Path(folder, "result.json"), Path(folder, "log.txt")
        with log.open("w") as output:
            child = subprocess.run(
                [sys.executable, "-m", _CHILD, str(file)],
                input=request.to_json(),
                text=True,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                check=False,
            )
        if child.returncode == 0 and file.is_file():
            return Result.from_json(file.read_text())
        lines = log.read_text(errors="replace").strip().splitlines()
    raise _reason(child.returncode, lines)


def _reason(returncode: int, lines: Sequence[str]) -> Exception:
    """Say why the child ended without a result, from its exit code and the lines of its log."""
    said = next((line for line in reversed(lines) if line.startswith(ERROR)), None)
    if said is not None and not any(word in said for word in _NO_MEMORY):
        kind = UsageError if returncode == 2 else ChildProcessError
        return kind(said.removeprefix(ERROR))
    last = said or (lines[-1].strip() if lines else "nothing")
    if returncode == -signal.SIGKILL or any(word in last for word in _NO_MEMORY):
        return OSError(
            f"the process of the dry run ran out of memory: it needs about {NEEDED_BYTES / 1e9:g} "
            "GB. End other programs, raise the limit (ulimit -v), or run it on another machine."
        )
    return OSError(
        f"the process of the dry run ended with exit code {returncode} and said last: {last}"
    )
