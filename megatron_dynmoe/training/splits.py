"""Training, validation and test data: is there something in each split that the run reads?

Upstream counts the epochs of a split without tokens in a loop that never ends, and meets missing
validation data at the first evaluation, hours later.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from typing import NamedTuple

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split

from megatron_dynmoe.doctor.data import read_dataset

SPLITS = ("training", "validation", "test")
_OWN_FLAGS = ("--train-data-path", "--valid-data-path", "--test-data-path")
# Reading a text up to about four times is almost as good as new text (Muennighoff et al., 2023).
EPOCHS_WORTH_A_NOTE = 4
_DEFAULT = "969, 30, 1"  # as upstream writes it


class Part(NamedTuple):
    """What one file contributes to one split."""

    prefix: str
    weight: float | None
    num_documents: int
    num_tokens: int


def splits_read(args: Namespace) -> tuple[bool, bool, bool]:
    """Whether a run reads training, validation and test data."""
    evaluates = bool(args.full_validation or args.eval_iters)
    return not args.skip_train, evaluates, evaluates


def check_splits(
    args: Namespace,
    together: tuple[list[str], list[float] | None] | None,
    per_split: list[tuple[list[str], list[float] | None] | None] | None,
) -> list[list[Part]]:
    """Refuse a split that the run reads and that gets no data.

    Args:
        args: Megatron's arguments, validated.
        together: prefixes and weights of ``--data-path``, which ``--split`` divides.
        per_split: those of each split, or None where each has none of its own.

    Returns:
        For training, validation and test, what each file contributes.

    Raises:
        ValueError: names the flag, its value, the number of documents and the remedy.
    """
    shares: list[tuple[float, float] | None] = [(0.0, 1.0)] * len(Split)
    if together is not None:
        shares = convert_split_vector_to_split_matrix(_proportions(args))
    parts: list[list[Part]] = []
    for number, is_read in enumerate(splits_read(args)):
        blend = together if together is not None else (per_split or [None] * 3)[number]
        is_there = blend is not None and shares[number] is not None
        if is_read and not is_there and number != Split.test.value:
            raise ValueError(_missing(args, number, together is not None))
        parts.append(_parts(blend, shares[number]) if is_read and is_there else [])
        for part in parts[-1]:
            if not part.num_tokens:
                raise ValueError(_empty(args, number, part, together is not None))
    return parts


def epochs_note(parts: list[Part], num_samples: int, sequence_length: int) -> str | None:
    """A line that says how often the training text is read, if that is often."""
    total_weight = sum(part.weight or 0 for part in parts)
    notes = []
    for part in parts:
        share = part.weight / total_weight if part.weight is not None else 1 / len(parts)
        if len(parts) > 1 and part.weight is None:
            return None  # read once
        epochs = share * num_samples * sequence_length / part.num_tokens
        if epochs > EPOCHS_WORTH_A_NOTE:
            notes.append(f"{part.prefix} ({part.num_tokens:,} tokens) {epochs:,.0f} times")
    if not notes:
        return None
    return "> note: this run reads the same training text many times over: " + ", ".join(notes)


def check_weights(flag: str, blend: tuple[list[str], list[float] | None]) -> None:
    """Refuse weights of a blend that are not above 0, on which upstream's assertions are silent."""
    for prefix, weight in zip(blend[0], blend[1] or [], strict=False):
        if not 0 < weight < math.inf:
            raise ValueError(
                f"{flag} gives {prefix} the weight {weight:g}: use a number above 0, or leave the "
                "file and its weight out."
            )


def _proportions(args: Namespace) -> list[float]:
    """The three shares of ``--split``, which sum to 1."""
    words = re.split(r"[, ]+", (args.split or "").strip())
    try:
        shares = [float(word) for word in words]
    except ValueError:
        shares = []
    is_right = 1 <= len(shares) <= len(Split) and min(shares) >= 0 and 0 < sum(shares) < math.inf
    if not is_right:
        found = args.split if args.split else "not given"
        raise ValueError(
            f"--split is {found}: give the shares of training, validation and test data, as in "
            "--split 95,5,0."
        )
    return parse_and_normalize_split(args.split)


def _parts(blend: tuple[list[str], list[float] | None], share: tuple[float, float]) -> list[Part]:
    parts = []
    for prefix, weight in zip(blend[0], blend[1] or [None] * len(blend[0]), strict=True):
        if "://" in prefix:
            continue  # an object store's: upstream's own affair
        lengths = read_dataset(prefix)[0].lengths
        first, last = (round(bound * float(len(lengths))) for bound in share)  # as upstream
        num_tokens = int(lengths[first:last].sum(dtype="int64"))
        parts.append(Part(prefix, weight, len(lengths), num_tokens))
    return parts


def _missing(args: Namespace, number: int, has_split: bool) -> str:
    name = SPLITS[number]
    given = _given(args) if has_split else f"{_OWN_FLAGS[number]} is not given"
    remedy = (
        f"give {name} a share, as in --split 95,5,0" if has_split else f"give {_OWN_FLAGS[number]}"
    )
    if number == Split.train.value:
        return f"{given}, which leaves no training data: {remedy}."
    evaluation = "--full-validation" if args.full_validation else f"--eval-iters {args.eval_iters}"
    return (
        f"{given}, which leaves no validation data for {evaluation}: give --eval-iters 0 to train "
        f"without evaluation, or {remedy}."
    )


def _given(args: Namespace) -> str:
    return f"--split is {args.split.replace(' ', '')}" + (
        " (Megatron's default)" if args.split == _DEFAULT else ""
    )


def _empty(args: Namespace, number: int, part: Part, has_split: bool) -> str:
    name = SPLITS[number]
    if not has_split:
        return (
            f"{_OWN_FLAGS[number]}: {part.prefix} has {part.num_documents:,} documents and no "
            "token: preprocess a text that is not empty."
        )
    percent = 100 * _proportions(args)[number]
    remedy = "give a larger share, more documents (a line of JSON, or a .txt file, is one), or "
    remedy += "--eval-iters 0" if number else "another --split"
    documents = f"{part.num_documents:,} document{'s' * (part.num_documents != 1)} with text"
    return (
        f"{_given(args)}: {name} gets {percent:.3g} % of the {documents} of {part.prefix}, which "
        f"is less than one: {remedy}"
        + (", or 0 for the test data." if number == Split.test.value else ".")
    )
