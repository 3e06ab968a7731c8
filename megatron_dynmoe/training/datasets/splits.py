"""Checks that each split (training, validation, test) that a run reads has data.

Upstream counts the epochs of a split without tokens in a loop that never ends. It notices missing
validation data only at the first evaluation, hours later, and refuses test data beside several
validation sets only at the end of the training.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split

from megatron_dynmoe.data.check import read_dataset
from megatron_dynmoe.settings.messages.refusals import FlagError
from megatron_dynmoe.settings.messages.words import is_number

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
    fingerprint: str  # hash of the document lengths, on which the order of the samples depends


def splits_read(args: Namespace) -> tuple[bool, bool, bool]:
    """Whether a run reads training, validation and test data."""
    evaluates = bool(args.full_validation or args.eval_iters)
    return not args.skip_train, evaluates, evaluates


def check_splits(
    args: Namespace,
    together: tuple[list[str], list[float] | None] | None,
    per_split: list[tuple[list[str], list[float] | None] | None] | None,
) -> list[list[Part]]:
    """Refuse a split that the run reads and that has no data.

    Args:
        args: Megatron's arguments, validated.
        together: prefixes and weights of ``--data-path``, which ``--split`` divides.
        per_split: prefixes and weights of each split, or None if no split has its own.

    Returns:
        What each file contributes to training, validation and test.

    Raises:
        ValueError: the message names the flag, its value, the number of documents and the remedy.
    """
    shares: list[tuple[float, float] | None] = [(0.0, 1.0)] * len(Split)
    if together is not None:
        shares = convert_split_vector_to_split_matrix(_proportions(args))
    parts: list[list[Part]] = []
    for number, is_read in enumerate(splits_read(args)):
        blend = together if together is not None else (per_split or [None] * 3)[number]
        share = shares[number]
        parts.append([])
        if not is_read:
            continue
        if blend is None or share is None:
            if number != Split.test.value:
                raise ValueError(_missing(args, number, together is not None))
            continue
        parts[-1] = _parts(blend, share)
        for part in parts[-1]:
            if not part.num_tokens:
                raise ValueError(_empty(args, number, part, together is not None))
        flag = "--split" if together is not None else _OWN_FLAGS[number]
        _check_full_validation(args, number, flag, blend)
        _check_read_once(args, number, parts[-1])
    return parts


def _check_full_validation(args: Namespace, number: int, flag: str, blend: Any) -> None:
    """Refuse what Megatron's evaluation on all validation text cannot do."""
    if not args.full_validation:
        return
    if number == Split.valid.value and blend[1] is not None:
        if flag == "--split":
            flag = "--data-args-path" if args.data_args_path else "--data-path"
        raise ValueError(
            f"{flag} gives weights, but with --full-validation Megatron 0.19 reads each validation "
            f"text once: leave the weights of {flag} out, or --full-validation."
        )
    if number == Split.test.value:
        given = f"{_given(args)}, with" if flag == "--split" else f"{flag} gives"
        remedy = "give them 0, as in --split 95,5,0" if flag == "--split" else "leave it out"
        raise ValueError(
            f"{given} test data, on which Megatron 0.19 fails with --multiple-validation-sets, at "
            f"the end of the training: {remedy}."
        )


def _check_read_once(args: Namespace, number: int, parts: list[Part]) -> None:
    """Refuse a file that is read once and is shorter than one sequence plus a token to predict."""
    is_whole = args.full_validation and number == Split.valid.value
    is_once = is_whole or (len(parts) > 1 and parts[0].weight is None)
    for part in parts if is_once else []:
        if part.num_tokens <= args.seq_length:
            remedy = "leave it out, put its text into another file"
            remedy += "" if is_whole else ", or give all files weights"
            raise ValueError(
                f"{part.prefix} has {part.num_tokens:,} tokens for {SPLITS[number]}, of which none "
                f"is read: it is read once, and a sequence takes {args.seq_length + 1:,} "
                f"(--seq-length is {args.seq_length}, and one to predict): {remedy}."
            )


def refusing_empty_epochs(count_epochs: Callable[..., int]) -> Callable[..., int]:
    """Wrap ``GPTDataset._get_num_epochs``, which never returns if an epoch has no token.

    This protects scripts that do not call :func:`check_splits`.
    """

    @functools.wraps(count_epochs)
    def count(dataset: Any, num_tokens: int) -> int:
        if not num_tokens and dataset.num_samples is not None:
            path, split = dataset.dataset.path_prefix, SPLITS[dataset.index_split.value]
            num_documents = len(dataset.dataset.sequence_lengths)
            raise ValueError(
                f"--split is {dataset.config.split}: {split} gets none of the {num_documents:,} "
                f"documents with text of {path}: give more documents, or another --split, such as "
                "100,0,0."
            )
        return count_epochs(dataset, num_tokens)

    return count


def epochs_note(parts: list[Part], num_samples: int, sequence_length: int) -> str | None:
    """Return a line that says how often the training text is read, if that is often."""
    total_weight = sum(part.weight or 0 for part in parts)
    notes = []
    for part in parts:
        share = part.weight / total_weight if part.weight is not None else 1 / len(parts)
        if len(parts) > 1 and part.weight is None:
            return None  # the text is read once
        epochs = share * num_samples * sequence_length / part.num_tokens
        if epochs > EPOCHS_WORTH_A_NOTE:
            notes.append(f"{part.prefix} ({part.num_tokens:,} tokens) {epochs:,.0f} times")
    if not notes:
        return None
    return "> note: this run reads the same training text many times over: " + ", ".join(notes)


def check_weights(flag: str, blend: tuple[list[str], list[float] | None]) -> None:
    """Refuse weights of a blend that are not above 0; upstream's assertions have no message.

    This also refuses weights that stand after their files, which upstream takes for files.
    """
    if blend[1] is None:
        _check_places(flag, blend[0])
    for prefix, weight in zip(blend[0], blend[1] or [], strict=False):
        if not 0 < weight < math.inf:
            raise ValueError(
                f"{flag} gives {prefix} the weight {weight:g}: use a number above 0, or leave the "
                "file and its weight out."
            )


def _check_places(flag: str, words: list[str]) -> None:
    numbers = [word for word in words if is_number(word) and not Path(word + ".idx").exists()]
    if not numbers:
        return
    files, weights = words[::2], words[1::2]
    remedy = f"as in {flag} 1 FILE 1 FILE"
    if weights == numbers and len(files) == len(weights):
        pairs = zip(weights, files, strict=True)
        remedy = f"{flag} {' '.join(word for pair in pairs for word in pair)}"
    raise ValueError(
        f"{flag} has {numbers[0]} in the place of a file: a weight stands before its file, and all "
        f"have one or none: {remedy}."
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
        remedy = "give the shares of training, validation and test data, as in --split 95,5,0"
        raise FlagError("split", args.split or None, "", remedy)
    return parse_and_normalize_split(args.split)


def _parts(blend: tuple[list[str], list[float] | None], share: tuple[float, float]) -> list[Part]:
    parts = []
    weights: Sequence[float | None] = blend[1] or [None] * len(blend[0])
    for prefix, weight in zip(blend[0], weights, strict=True):
        if "://" in prefix:
            continue  # upstream itself checks the files of an object store
        lengths = read_dataset(prefix)[0].lengths
        first, last = (round(bound * float(len(lengths))) for bound in share)  # as upstream does
        read = lengths[first:last]
        fingerprint = hashlib.blake2b(read.tobytes(), digest_size=8).hexdigest()
        num_tokens = int(read.sum(dtype="int64"))
        parts.append(Part(prefix, weight, len(lengths), num_tokens, fingerprint))
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
