"""Names the files of Megatron's index cache by the content of the data, and writes them whole.

Upstream names the files of the cache by the *path* of the token files. If somebody preprocesses the
text again under the same path, the next run reads the new tokens by the old index: it skips some
documents and cuts others at the wrong place. Upstream also writes the files in place, so a run that
starts in the meantime reads a file that is cut short.

:mod:`megatron_dynmoe.upstream.patches` wraps upstream's functions in both of these.
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
    """Wrap ``GPTDataset._build_document_sample_shuffle_indices``: add the content to file names.

    The name of a blend's index follows, since upstream makes it of the names of its datasets. Every
    rank computes the same name. An edit that keeps the length of every document keeps the name too.
    That is right, because the index says at which token a sample begins, and not what it holds.
    """

    @functools.wraps(build)
    def build_by_content(dataset: Any, *args: Any) -> Any:
        if not dataset.config.mock:
            dataset.unique_identifiers["content"] = fingerprint(dataset.dataset)
            update_description(dataset)
        return build(dataset, *args)

    return build_by_content


def written_atomically(build: Callable[..., Any], folder_of: Callable[[Any], str | None]) -> Any:
    """Wrap a function that builds or loads an index, so that others only ever see whole files.

    Args:
        build: upstream's method, which reads ``self.config.path_to_cache``.
        folder_of: returns the folder in which upstream keeps the files of such an object.
    """

    @functools.wraps(build)
    def build_aside(dataset: Any, *args: Any) -> Any:
        folder, config = folder_of(dataset), dataset.config
        if folder is None or not _builds(dataset, Path(folder)):
            return build(dataset, *args)
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as aside:
            # This is a copy, because several threads build datasets with one config.
            dataset.config = copy.copy(config)
            dataset.config.path_to_cache = aside
            try:
                index = build(dataset, *args)
            finally:
                dataset.config = config
            # The description comes last: _builds takes it as the sign that all files are there.
            for path in sorted(Path(aside).iterdir(), key=lambda path: path.suffix == ".txt"):
                os.replace(path, Path(folder) / path.name)
            return index

    return build_aside


def _builds(dataset: Any, folder: Path) -> bool:
    """Whether this process will build the index, because there is none yet."""
    config = dataset.config
    if config.fast_cache_load or config.defer_npy_index_mmap:
        return False
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return False
    return not any(folder.glob(f"{dataset.unique_description_hash}-*-description.txt"))


def folder_of_gpt(dataset: Any) -> str | None:
    """The folder in which upstream keeps the index of a ``GPTDataset``."""
    if dataset.config.path_to_cache or dataset.config.mock:
        return dataset.config.path_to_cache
    return os.path.join(dataset.dataset.path_prefix, "cache", f"{type(dataset).__name__}_indices")


@functools.lru_cache(maxsize=1024)
def fingerprint(tokens: Any) -> str:
    """Hash the sequence lengths of an ``IndexedDataset``, and how they form documents.

    The hash runs at about 1 GB/s over 8 bytes per document or a little more, once for all three
    splits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for values in (tokens.sequence_lengths, tokens.document_indices):
        digest.update(np.ascontiguousarray(values).view(np.uint8))
    return digest.hexdigest()


def update_description(dataset: Any) -> None:
    """Build the description of a dataset, and its hash, anew from its present identifiers."""
    dataset.unique_description = json.dumps(
        dataset.unique_identifiers, indent=4, default=lambda obj: obj.unique_identifiers
    )
    dataset.unique_description_hash = hashlib.md5(
        dataset.unique_description.encode("utf-8"), usedforsecurity=False
    ).hexdigest()
