"""Checks of paths, disk space, Slurm and the launcher's variables."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check
from megatron_dynmoe.jobs import host_names
from megatron_dynmoe.jobs.display import show_bytes
from megatron_dynmoe.storage.atomic import nearest_existing

# Data-loader workers pass batches in shared memory.
MIN_SHARED_MEMORY = 1 << 30
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_writable(name: str, folder: Path) -> Check:
    """Whether files can be made in a folder; if it does not exist, whether it can be made."""
    existing = nearest_existing(folder)
    missing = "" if existing == folder.absolute() else ", will be made"
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        reason = error.strerror or str(error)
        found = f"{folder}: {existing} is not writable ({reason})"
        return Check(name, FAILED, found, "name a folder that you may write to")
    return Check(name, PASSED, f"{folder}{missing}")


def check_space(folder: Path, checkpoint_bytes: int | None, num_checkpoints: int | None) -> Check:
    """Whether the checkpoints of a run fit.

    Args:
        checkpoint_bytes: size of one checkpoint, or None if no run is named.
        num_checkpoints: how many the run will keep; None if that is unknown.
    """
    free = shutil.disk_usage(nearest_existing(folder)).free
    found = f"{show_bytes(free)} free"
    if checkpoint_bytes is None:
        return Check(
            "disk space", PASSED, f"{found}; --recipe compares it with a run's checkpoints"
        )
    found += f", a checkpoint takes about {show_bytes(checkpoint_bytes)}"
    if free < checkpoint_bytes:
        return Check("disk space", FAILED, found, "free space, or name another folder with --save")
    if num_checkpoints is not None:
        needed = num_checkpoints * checkpoint_bytes
        found += f", the run keeps {num_checkpoints}: {show_bytes(needed)}"
        if free < needed:
            remedy = "raise --save-interval, or remove old ones while it runs"
            return Check("disk space", WARNING, found, remedy)
    return Check("disk space", PASSED, found)


def check_shared_memory() -> Check:
    """Whether the data loader's workers have enough shared memory."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", WARNING, "there is no /dev/shm", "give --num-workers 0")
    free = shutil.disk_usage(folder).free
    if free < MIN_SHARED_MEMORY:
        remedy = "start the container with --ipc=host or --shm-size=8g, or give --num-workers 0"
        return Check("shared memory", WARNING, f"{show_bytes(free)} free", remedy)
    return Check("shared memory", PASSED, f"{show_bytes(free)} free")


def check_slurm() -> Check:
    """What Slurm says of this process."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        there = "not in a job" if shutil.which("sbatch") else "not here; torchrun starts runs"
        return Check("Slurm", PASSED, there)
    names = {"SLURM_JOB_NUM_NODES": "nodes", "SLURM_NTASKS": "tasks", "SLURM_GPUS_ON_NODE": "GPUs"}
    sizes = [f"{os.environ[name]} {what}" for name, what in names.items() if name in os.environ]
    found = ", ".join([f"job {job}", *sizes])
    if os.environ.get("SLURM_NTASKS", "1") != "1" and "RANK" not in os.environ:
        remedy = "let every task start torchrun, or set RANK and its like; launch/ does it"
        return Check("Slurm", WARNING, f"{found}, RANK is not set", remedy)
    return Check("Slurm", PASSED, found)


def check_launcher() -> Check:
    """Whether all of the variables that torchrun sets are there, or none."""
    name = "launcher"
    there = [variable for variable in LAUNCHER_VARIABLES if variable in os.environ]
    missing = [variable for variable in LAUNCHER_VARIABLES if variable not in there]
    if "RANK" in there and missing:
        remedy = "start with torchrun, or set them, too; without RANK one process trains alone"
        return Check(name, FAILED, f"RANK is set, but not {', '.join(missing)}", remedy)
    if there and missing:
        remedy = f"left over from a launch? unset {' '.join(there)}"
        return Check(name, WARNING, f"{', '.join(there)} without RANK", remedy)
    if there:
        found = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
        return Check(name, PASSED, found)
    return Check(name, PASSED, "none set")


def check_host_name() -> Check:
    """Whether this machine's own name leads to it: torchrun's ranks meet at that name."""
    name = host_names.own_name()
    if host_names.resolves_to_this_machine(name):
        return Check("host name", PASSED, f"{name} leads to this machine")
    remedy = (
        "one machine trains all the same; on several, give each torchrun --local-addr ADDRESS, "
    )
    remedy += "or enter the name in /etc/hosts"
    return Check("host name", WARNING, f"{name} does not lead to this machine", remedy)
