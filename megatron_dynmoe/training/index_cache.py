"""Megatron's cache of data indexes, named by what the token files hold and written whole.

Upstream names the files of the cache by the *path* of the token files. If the text is preprocessed
again under the same path, the next run reads the new tokens by the old index: some documents never,
others cut at the wrong place. It also writes the files in place, so that a run that starts in the
middle reads one that is cut short.

:mod:`megatron_dynmoe.upstream.patches` puts both functions around upstream's own.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def named_by_content(build: Callable[..., Any]) -> Callable[..., Any]:
    """Around ``GPTDataset._build_document_sample_shuffle_indices``: add the content to its names.

    A blend's index follows, since its name is made of those of its datasets. Every rank computes
    the same name. An edit that keeps the length of every document keeps the name, rightly: the
    index says where samples begin, and not what they hold.
    """

    @functools.wraps(build)
    def build_by_content(dataset: Any, *args: Any) -> Any:
        if not dataset.config.mock:
            dataset.unique_identifiers["content"] = fingerprint(dataset.dataset)
            describe_again(dataset)
        return build(dataset, *args)

    return build_by_content


def written_whole(build: Callable[..., Any], folder_of: Callable[[Any], str | None]) -> Any:
    """Around a function that builds or loads an index: let others see whole files only.

    Args:
        build: upstream's method, which reads ``self.config.path_to_cache``.
        folder_of: where upstream keeps the files of an object of that class.
    """

    @functools.wraps(build)
    def build_aside(dataset: Any, *args: Any) -> Any:
        folder, config = folder_of(dataset), dataset.config
        if folder is None or not _builds(dataset, Path(folder)):
            return build(dataset, *args)
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as aside:
            # A copy, because several threads build data sets with one config.
            dataset.config = copy.copy(config)
            dataset.config.path_to_cache = aside
            try:
                index = build(dataset, *args)
            finally:
                dataset.config = config
            # The description comes last: for _builds it is the sign that all is there.
            for path in sorted(Path(aside).iterdir(), key=lambda path: path.suffix == ".txt"):
                os.replace(path, Path(folder) / path.name)
            return index

    return build_aside


def _builds(dataset: Any, folder: Path) -> bool:
    """Whether this process is the one that will build the index, because there is none yet."""
    config = dataset.config
    if config.fast_cache_load or config.defer_npy_index_mmap:
        return False
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return False
    return not any(folder.glob(f"{dataset.unique_description_hash}-*-description.txt"))


def folder_of_gpt(dataset: Any) -> str | None:
    """Where upstream keeps the index of a ``GPTDataset``."""
    if dataset.config.path_to_cache or dataset.config.mock:
        return dataset.config.path_to_cache
    return os.path.join(dataset.dataset.path_prefix, "cache", f"{type(dataset).__name__}_indices")


@functools.lru_cache(maxsize=1024)
def fingerprint(tokens: Any) -> str:
    """Of an ``IndexedDataset``: the lengths of its sequences, and how documents are made of them.

    Hashed at about 1 GB/s, 8 bytes a document or a little more, once for all three splits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for values in (tokens.sequence_lengths, tokens.document_indices):
        digest.update(np.ascontiguousarray(values).view(np.uint8))
    return digest.hexdigest()


def describe_again(dataset: Any) -> None:
    """Make the description of a data set, and its hash, of its present identifiers."""
    dataset.unique_description = json.dumps(
        dataset.unique_identifiers, indent=4, default=lambda obj: obj.unique_identifiers
    )
    dataset.unique_description_hash = hashlib.md5(
        dataset.unique_description.encode("utf-8"), usedforsecurity=False
    ).hexdigest()
