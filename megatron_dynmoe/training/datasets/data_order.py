"""Checks that a resumed run still reads its training text in the order in which it began.

Upstream stores only a position. If the text, the weights, the seed or the sequence length change, a
run resumes at that position in another order: it reads some text again and some never, and gets no
message.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_dynmoe.checkpoints.saved_arguments import saved_arguments
from megatron_dynmoe.training.datasets.splits import Part

# The description of a run's data lies in its checkpoints, as this one of Megatron's arguments.
NAME = "dynmoe_data_order"


def describe(args: Namespace, parts: list[Part], num_samples: int) -> dict[str, Any]:
    """Describe, in plain values, everything that the order of the training samples depends on.

    Args:
        args: Megatron's arguments.
        parts: the files of the training data.
        num_samples: the number of sequences in the whole training.
    """
    total = sum(part.weight or 0 for part in parts) or 1.0
    once = len(parts) > 1 and parts[0].weight is None
    shares = [1.0 if part.weight is None else part.weight / total for part in parts]
    tokens = num_samples * args.seq_length
    return {
        "documents": [part.fingerprint for part in parts],
        "shares": [round(share, 9) for share in shares],
        "seed": args.seed,
        "seq_length": args.seq_length,
        "num_samples": num_samples,
        "is_read_again": not once
        and any(s * tokens > part.num_tokens for s, part in zip(shares, parts, strict=True)),
    }


def note_of_change(args: Namespace, order: dict[str, Any]) -> str | None:
    """Return a line that says what changed if the run resumes with another order, else None.

    Args:
        args: Megatron's arguments, validated.
        order: this run's description by :func:`describe`.
    """
    if args.finetune or args.skip_train:
        return None  # the run begins at the first sample, or reads no samples
    saved = saved_arguments(args)
    before = getattr(saved, NAME, None)
    if not isinstance(before, dict):
        return None
    changes = []
    if before.get("documents") != order["documents"]:
        changes.append("other training documents")
    elif before.get("shares") != order["shares"]:
        changes.append("other weights of its files")
    for name in ("seed", "seq_length"):
        if before.get(name) != order[name]:
            changes.append(f"--{name.replace('_', '-')} {order[name]} (it was {before.get(name)})")
    is_read_again = before.get("is_read_again") or order["is_read_again"]
    if before.get("num_samples") != order["num_samples"] and is_read_again:
        changes.append(
            f"{order['num_samples']} sequences to read (it was {before.get('num_samples')}) of a "
            "text that is read more than once"
        )
    if not changes:
        return None
    return (
        f"> warning: since the checkpoint in {args.load} this run has got {' and '.join(changes)}: "
        "it goes on from its position in another order, in which some text may come again and some "
        "never (--finetune begins at the first sample and step)"
    )
