"""Weights & Biases: a run that resumes goes on in its run there.

Megatron gives W&B a name and no id, so each attempt of a job that is queued again would become a
run of its own. W&B reads the id from its environment and names its folders by it.
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from megatron_dynmoe.settings.messages.refusals import FlagError


def complete_wandb(args: Namespace) -> None:
    """Name the run by its folder, and set W&B's environment for one that resumes.

    An id or a mode that the environment has already is kept.

    Raises:
        FlagError: W&B would get no name, or no folder.
    """
    if not args.wandb_project:
        return
    if args.run_dir:
        args.wandb_exp_name = args.wandb_exp_name or Path(args.run_dir).resolve().name
    if not args.wandb_exp_name:
        raise FlagError(
            "wandb_exp_name",
            None,
            ", and --wandb-project is given",
            "name the run, or use --run-dir",
        )
    if not (args.save or args.wandb_save_dir):
        raise FlagError(
            "wandb_save_dir",
            None,
            ", and --wandb-project is given without --save",
            "name a folder for the files of W&B, or use --run-dir",
        )
    if args.load and args.save and os.path.realpath(args.load) == os.path.realpath(args.save):
        known = _id_in(Path(args.wandb_save_dir or Path(args.save) / "wandb"))
        if known is not None:
            os.environ.setdefault("WANDB_RUN_ID", known)
            os.environ.setdefault("WANDB_RESUME", "allow")


def _id_in(folder: Path) -> str | None:
    """The id of the run that wrote there last: W&B links to ``[offline-]run-DATE_TIME-ID``."""
    last = (folder / "wandb" / "latest-run").resolve()
    parts = last.name.removeprefix("offline-").split("-", 2)
    return parts[2] if last.is_dir() and len(parts) == 3 else None
