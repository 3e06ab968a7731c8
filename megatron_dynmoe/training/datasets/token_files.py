"""Finds token files that are damaged or made for another vocabulary before they do harm.

Upstream maps an index without checking it. An id without an embedding ends a run in an index error,
or, on a GPU, in a device assert that names nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import gpt_dataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_dynmoe.checkpoints.collective import cause
from megatron_dynmoe.data.check import Vocabulary, check_dataset
from megatron_dynmoe.data.finding import FAILED, WARNING
from megatron_dynmoe.settings.messages.refusals import FlagError
from megatron_dynmoe.training.datasets import data_order, splits

# The check at start-up reads about this many bytes of each .bin file.
BYTES_LOOKED_AT = 1 << 26
_DATA_FLAGS = (
    *("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path"),
    "per_split_data_args_path",
)
# Flags that tell documents apart, which upstream does by the token that ends each of them.
_BY_EOD = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
_OTHER_TOKENIZER = "preprocess the text with the tokenizer of the run"


def check_token_files(args: Any) -> None:
    """Check the files of ``--data-path`` and the flags like it.

    Every rank checks that they are there, so that none waits for one that has stopped. Once per
    node, every index is compared with its tokens, and some 64 MB of the ids with the vocabulary.
    Upstream itself checks the addresses of object stores.

    Args:
        args: Megatron's arguments.

    Raises:
        ValueError: a file is missing or damaged, or holds an id that the model has no embedding
            for, or documents are to be told apart and do not end with eod; the message gives the
            file's name, the position and the remedy.
    """
    if args.mock_data:
        return
    reads = os.environ.get("LOCAL_RANK", "0") == "0"
    by_eod = [flag for flag in _BY_EOD if getattr(args, flag, False)]
    eod = build_tokenizer(args).eod if by_eod and reads else None
    vocabulary = Vocabulary(args.padded_vocab_size, eod, "the model's embedding")
    on_all_ranks, per_split = _blends(args)
    for flag, blend in _flags_of(args, on_all_ranks, per_split):
        splits.check_weights(flag, blend)
    named = _named_files(args)
    if not named:
        remedy = "name what dynmoe preprocess wrote, without .bin, or give --mock-data to try "
        raise FlagError("data_path", None, "", f"{remedy}without data")
    for prefix, flag in named.items():
        if "://" in prefix or not (reads or _is_missing(prefix)):
            continue
        check = check_dataset(prefix, vocabulary, BYTES_LOOKED_AT)
        if check.state == FAILED:
            raise ValueError(f"{flag}: {check.found}. Remedy: {check.remedy}.")
        if check.state == WARNING:
            asked_for = f"--{by_eod[0].replace('_', '-')}"
            raise ValueError(
                f"{asked_for} is given, which knows documents by eod, the id {eod}. {flag}: "
                f"{check.found}. Remedy: {check.remedy}, or leave {asked_for} out."
            )
    if reads:
        training = splits.check_splits(args, on_all_ranks, per_split)[0]
        _note_order(args, training)


def _note_order(args: Any, training: list[splits.Part]) -> None:
    """Note the order of the training text for the checkpoints.

    Say so if the run reads the text often, or in another order than it began with.
    """
    if not training or os.environ.get("RANK", "0") != "0":
        return
    order = data_order.describe(args, training, _num_samples(args))
    notes = (
        splits.epochs_note(training, _num_samples(args), args.seq_length),
        data_order.note_of_change(args, order),
    )
    for note in notes:
        if note is not None:
            print(note, flush=True)
    setattr(args, data_order.NAME, order)


def _num_samples(args: Any) -> int:
    """The number of sequences that a whole training takes, including those of earlier starts."""
    return args.train_samples or (args.train_iters or 0) * args.global_batch_size


def _is_missing(prefix: str) -> bool:
    return not all(Path(prefix + ending).exists() for ending in (".idx", ".bin"))


@contextmanager
def naming_the_cache(args: Any) -> Iterator[None]:
    """Name the data cache if it cannot be written, or the files that a killed run has left in it.

    Upstream names an attribute for the first. It wrote the files in place, and what it reads of one
    that is cut short is NumPy's error without a name.

    Args:
        args: Megatron's arguments.

    Raises:
        ValueError: in place of an error of the block, if the cache is the cause.
    """
    try:
        yield
    except (ValueError, EOFError) as error:
        cut = [path for path in _cached_indexes(args) if not _is_whole(path)]
        if not cut:
            raise
        more = f" and {len(cut) - 1} more files there are" if len(cut) > 1 else " is"
        raise ValueError(
            f"{cut[0]}{more} cut short ({error}): a run died while it wrote the data's index. "
            "Remedy: delete what is cut short, and the next start writes it anew."
        ) from error
    except Exception as error:  # upstream's is of no closer kind
        if not isinstance(error.__cause__, OSError):
            raise
        cache, why = args.data_cache_path, cause(error.__cause__)
        where = f"--data-cache-path is {cache}" if cache else "--data-cache-path is not given"
        folder = "there" if cache else "beside the tokens"
        raise ValueError(
            f"{where}, and Megatron's list of samples cannot be written {folder} ({why}): give a "
            "folder that can be written to."
        ) from None


def _cached_indexes(args: Any) -> Iterator[Path]:
    if args.data_cache_path:
        folders = [Path(args.data_cache_path)]
    else:  # this is upstream's default
        folders = [Path(p) / "cache" / f"{GPTDataset.__name__}_indices" for p in _named_files(args)]
    for folder in folders:
        yield from sorted(folder.glob("*.npy"))


def _is_whole(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        return False
    return True


def _named_files(args: Any) -> dict[str, str]:
    """The token files that the flags name, each once, together with its flag."""
    return {prefix: flag for flag, blend in _flags_of(args, *_blends(args)) for prefix in blend[0]}


def _flags_of(args: Any, together: Any, per_split: Any) -> Iterator[tuple[str, Any]]:
    """Each flag that is given, with its list of files as prefixes and weights."""
    if together:
        yield "--data-args-path" if args.data_args_path else "--data-path", together
    for split, blend in zip(("train", "valid", "test"), per_split or [None] * 3, strict=True):
        is_file = args.per_split_data_args_path is not None
        if blend:
            yield "--per-split-data-args-path" if is_file else f"--{split}-data-path", blend


def _blends(args: Any) -> tuple[Any, Any]:
    """Prefixes and weights of ``--data-path`` and of each split, as upstream reads them."""
    try:
        return get_blend_and_blend_per_split(args)
    except (AssertionError, KeyError, OSError, TypeError, ValueError) as error:
        given = [name for name in _DATA_FLAGS if getattr(args, name) is not None]
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        is_mixed = isinstance(error, AssertionError)
        reason = "some prefixes have a weight and some have none" if is_mixed else cause(error)
        raise ValueError(
            f"{flags}: the list of data cannot be read ({reason}). Remedy: give prefixes, each "
            "with a weight before it or none, or a file of these words; per split, a JSON file "
            "with lists named train, valid and test."
        ) from None


@dataclass
class DatasetConfig(gpt_dataset.GPTDatasetConfig):
    """Megatron's, with ``num_embeddings``: the model knows the ids below this number."""

    num_embeddings: int = 0


class GPTDataset(gpt_dataset.GPTDataset):
    """Megatron's, except that it compares every sample it reads with the vocabulary.

    It does so on the host, in the data loader. The class keeps upstream's name, because upstream
    names the files of its cache by it.
    """

    def _query_document_sample_shuffle_indices(
        self, idx: int
    ) -> tuple[np.ndarray, np.ndarray, list]:
        text, sequences, lengths = super()._query_document_sample_shuffle_indices(idx)
        read = text[: sum(lengths)]  # the tokens without padding
        # As an unsigned number, a negative id is a large one.
        if (read.view(np.uint64) >= self.config.num_embeddings).any():
            self._refuse(read, sequences, lengths)
        return text, sequences, lengths

    def _refuse(self, read: np.ndarray, sequences: np.ndarray, lengths: list[int]) -> None:
        place = int((read.view(np.uint64) >= self.config.num_embeddings).argmax())
        sequence = int(sequences[np.searchsorted(np.cumsum(lengths), place, "right")])
        bounds = self.dataset.document_indices
        document = int(np.searchsorted(bounds, sequence, "right")) - 1
        before = int(self.dataset.sequence_lengths[bounds[document] : sequence].sum())
        position = before + int(np.argmax(self.dataset.get(sequence) == read[place]))
        raise ValueError(
            f"{self.dataset.path_prefix}: document {document:,}, token {position:,} is the id "
            f"{read[place]:,}, and the model's embedding has ids to "
            f"{self.config.num_embeddings - 1:,}. Remedy: {_OTHER_TOKENIZER}."
        )
