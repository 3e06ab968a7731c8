"""What a run prints at its start (what it rules out for later) and at its end (how to go on)."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist

from megatron_dynmoe.backends import bf16, choice, cpu
from megatron_dynmoe.checkpoints.collective import is_local
from megatron_dynmoe.conversion.megatron.settings import obstacles
from megatron_dynmoe.model.settled import Settled
from megatron_dynmoe.settings.routings import ROUTINGS
from megatron_dynmoe.storage.megatron_names import TRACKER

NOTE = "> note: "


def print_notes(args: Namespace, settled: Settled, is_exported: bool = True) -> None:
    """Print, on the first rank, what a person would want to know before hours have passed.

    Args:
        args: Megatron's arguments, validated.
        settled: the run's settings.
        is_exported: whether models of this kind can be exported to Hugging Face.
    """
    if args.rank != 0:
        return
    if args.bf16 and cpu.is_installed():
        slow = bf16.warning(bf16.slowdown())
        if slow is not None:
            print(slow, flush=True)
    if not args.skip_train:
        for note in start_notes(args, settled.backend, settled.dynmoe.routing, is_exported):
            print(NOTE + note, flush=True)


def start_notes(
    args: Namespace, backend: choice.BackEnd, routing: str, is_exported: bool = True
) -> list[str]:
    """Lines about what cannot be done later with a new run; empty if the run resumes.

    Args:
        args: Megatron's arguments, validated.
        backend: the back end of each part of the model.
        routing: the name of the routing.
        is_exported: as for :func:`print_notes`.
    """
    if not args.save:
        return ["neither --run-dir nor --save is given, so nothing of this run will be kept"]
    if args.load and (Path(args.load) / TRACKER).is_file():
        return []  # the first start has already printed it, and it can no longer be changed
    notes = _export_notes(args, routing) if is_exported else []
    if choice.needs_parallel_experts(backend, args):
        notes.append(
            "the experts have biases, so this run cannot go on later without expert parallelism "
            "(give --disable-bias-linear)"
        )
    return notes


def _export_notes(args: Namespace, routing: str) -> list[str]:
    notes = []
    causes = [f"{one.otherwise} ({one.remedy})" for one, _ in obstacles(args)]
    if not ROUTINGS[routing].is_exported:
        causes.append(f"its routing {routing}, which no format has")
    if causes:
        notes.append(
            f"this model cannot be exported to Hugging Face later, because of {'; '.join(causes)}"
        )
    if args.ckpt_format != "torch_dist":
        notes.append(
            f"--ckpt-format is {args.ckpt_format}, and only checkpoints of torch_dist, the "
            "default, can be exported to Hugging Face"
        )
    return notes


def print_how_to_resume(args: Namespace, stopped_by: str | None = None, ends: bool = True) -> str:
    """Print, on the first rank, the state of the run and how to go on, once all ranks have written.

    A launch script has commands of its own and prints them itself; then this prints nothing.

    Args:
        args: Megatron's arguments.
        stopped_by: the name of the signal that stopped the run, or None.
        ends: whether the run has taken all its steps.

    Returns:
        The text for every rank, printed or not.
    """
    words = how_to_resume(args, stopped_by, ends)
    if dist.is_initialized():
        dist.barrier()
    if args.rank == 0 and "ATTEMPT" not in os.environ:
        print("> " + words, flush=True)
    return words


def how_to_resume(args: Namespace, stopped_by: str | None, ends: bool) -> str:
    """The state of a run, and the command that resumes it."""
    # Upstream counts an iteration after its step; without a step it has the iteration it loaded.
    last = args.curr_iteration + 1 if hasattr(args, "curr_iteration") else args.iteration
    cause = f" by {stopped_by}" if stopped_by else ""
    begin = f"{'finished' if ends else f'stopped{cause}'}: iteration {last} of {args.train_iters}"
    saved = _last_saved(args.save)
    if not args.save:
        return f"{begin}; nothing was kept, as neither --run-dir nor --save is given"
    where = (
        f"the run is in {args.run_dir}" if args.run_dir else f"its checkpoints are in {args.save}"
    )
    if saved is None:
        return f"{begin}; {where}, and no checkpoint was saved"
    is_same = args.load and os.path.realpath(args.load) == os.path.realpath(args.save)
    command = "the same command"
    if not is_same:
        command += f" with --load {shlex.quote(args.save)}"
    go_on = f"to go on: {command}"
    if ends:
        unit = "samples" if args.train_samples else "iters"
        go_on = (
            f"to train further: {command} {'with' if is_same else 'and'} a larger --train-{unit}"
        )
        # If the flag for the learning rate's decay is missing, Megatron uses the run's length.
        has_own_decay = getattr(args, f"lr_decay_{unit}") != getattr(args, f"train_{unit}")
        if not (has_own_decay or args.override_opt_param_scheduler):
            go_on += " and --override-opt-param-scheduler"
    return f"{begin}; {where}, last checkpoint: {saved}; {go_on}"


def _last_saved(save: str | None) -> str | None:
    """The iteration that the tracker names."""
    if not save or not is_local(save):
        return None
    tracker = Path(save) / TRACKER
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else None
