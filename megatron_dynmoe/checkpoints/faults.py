"""Compares the files of a checkpoint with its manifest; all ranks share the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dynmoe.checkpoints.collective import cause, on_all_ranks, on_rank_0, rank
from megatron_dynmoe.checkpoints.save import rank_that_reads
from megatron_dynmoe.storage.manifest import MANIFEST, check_file, read_manifest

COMPLETE = "metadata.json"  # Megatron writes it when all ranks have written their files


def faults(folder: Path, looks_closer: bool) -> list[str]:
    """List what is wrong with a checkpoint. The ranks share the reading; all get the same list.

    Args:
        folder: the folder of one iteration.
        looks_closer: whether to look for every file even if there is no manifest.
    """

    def manifest() -> dict[str, Any] | str | None:
        try:
            return read_manifest(folder)
        except ValueError as error:
            return str(error)

    files = on_rank_0(manifest)
    if isinstance(files, str):
        return [files]
    if files is None:
        return on_rank_0(lambda: _faults_without_manifest(folder, looks_closer))
    parts = on_all_ranks(
        lambda: [fault for item in _share(files) for fault in _fault(folder, *item)]
    )
    return sorted(fault for part in parts for fault in part)


def _fault(folder: Path, name: str, expected: dict[str, Any]) -> list[str]:
    try:
        check_file(folder / name, expected)
    except (OSError, ValueError) as error:
        return [cause(error)]
    return []


def _share(files: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """This rank's part of the files.

    Before the ranks can talk to each other (``--use-checkpoint-args``), each one checks the files
    that are read at that time. The others are checked when the model is loaded.
    """
    if not dist.is_initialized():
        return [item for item in files.items() if rank_that_reads(item[0]) == 0]
    by_size = sorted(files.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    return by_size[rank() :: dist.get_world_size()]


def _faults_without_manifest(folder: Path, looks_closer: bool) -> list[str]:
    is_other_format = any(folder.glob("mp_rank_0*"))
    if not is_other_format and not (folder / COMPLETE).is_file():
        return [f"{folder} is incomplete: without {COMPLETE}, its save was cut short"]
    if looks_closer and not is_other_format:
        from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint

        try:
            MegatronCheckpoint(folder)  # looks for every file and checks that it is long enough
        except ValueError as error:
            return [str(error)]
    print(f"> {folder} has no {MANIFEST}: whether its files are good is not known", flush=True)
    return []
