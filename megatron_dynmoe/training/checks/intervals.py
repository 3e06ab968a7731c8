"""Checks the intervals for logging, evaluating and saving before Megatron crashes over them.

Some of these crashes would come hours later.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_dynmoe.settings.messages.refusals import FlagError

_DIVIDES = "since Megatron divides by it"


def check_intervals(args: Namespace) -> None:
    """Refuse an interval that is missing or below 1, before Megatron validates its arguments.

    The check also refuses evaluations on all validation text that Megatron cannot do.

    If the run only evaluates, a missing ``--eval-interval`` is filled in: it then means nothing,
    but Megatron still divides by it after a load.

    Raises:
        FlagError: the message names the flag, its value and the remedy.
    """
    if args.skip_train:
        args.eval_interval = args.eval_interval or 1
    needed = {
        "log_interval": _DIVIDES,
        "tensorboard_log_interval": _DIVIDES,
        "eval_interval": f"{_DIVIDES}, also if --eval-iters is 0",
    }
    if args.save:
        needed["save_interval"] = "which Megatron needs with --save (--run-dir sets both)"
    for name, reason in needed.items():
        value = getattr(args, name)
        if value is None or value < 1:
            raise FlagError(name, value, "", f"use 1 or more steps, {reason}")
    if args.multiple_validation_sets and not args.full_validation:
        raise FlagError(
            "multiple_validation_sets",
            True,
            " without --full-validation, which Megatron 0.19 does not do",
            "add --full-validation, or leave it out",
        )
    if args.full_validation and not args.multiple_validation_sets:
        raise FlagError(
            "full_validation",
            True,
            " without --multiple-validation-sets, with which alone Megatron 0.19 gets through an "
            "evaluation",
            "add it, with --valid-data-path without weights",
        )
    retain = args.save_retain_interval
    if args.save and retain is not None and (retain < 1 or retain % args.save_interval):
        raise FlagError(
            "save_retain_interval",
            retain,
            "",
            f"use a multiple of --save-interval ({args.save_interval}), or leave it out to keep "
            "every checkpoint",
        )
