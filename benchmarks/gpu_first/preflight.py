"""What this machine lacks for the first minutes on a GPU, and how to get it, in seconds.

    python -m benchmarks.gpu_first.preflight [--rehearse] [--needs MODULE ...] [--json FILE]

The exit code is 1 if nothing could run.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dynmoe.settings.messages.command_line import CommandParser

ROOT = Path(__file__).resolve().parents[2]
# Distributions by the module that shows whether they are there.
DISTRIBUTIONS = {
    "torch": "torch",
    "megatron.core": "megatron-core",
    "numpy": "numpy",
    "psutil": "psutil",
    "transformers": "transformers",
    "triton": "triton",
    "xdist": "pytest-xdist",
}
EVERY_STAGE = ("torch", "megatron.core", "numpy", "psutil")
ON_A_GPU = ("triton",)
MIN_SPACE = 2**30  # bytes, of compiled kernels and logs
MIN_MEMORY = 120e9  # bytes: what a step of 3.5 B takes


class Lack(NamedTuple):
    """Something that is not as it has to be.

    Attributes:
        modules: whose stages cannot run; empty if it is of less weight.
        every_stage: whether no stage can run.
    """

    what: str
    remedy: str
    modules: tuple[str, ...] = ()
    every_stage: bool = False


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rehearse", action="store_true", help="on a CPU: a GPU is not missed")
    add("--needs", nargs="*", default=[], metavar="MODULE", help="of some stages")
    add("--json", type=Path, metavar="FILE", help="where to write it, for a script")
    args = parser.parse_args()
    lacks = packages(args.needs, args.rehearse)
    device = {"name": "rehearsal"}
    if not any(lack.every_stage for lack in lacks):
        device, lacks_of_device = look_at_device(args.rehearse)
        lacks += lacks_of_device
    for lack in lacks:
        print(f"{lack.what}: {lack.remedy}")
    if args.json:
        args.json.write_text(json.dumps({"device": device, "lacks": [x._asdict() for x in lacks]}))
    print(" | ".join(f"{name} {value}" for name, value in device.items()))
    sys.exit(any(lack.every_stage for lack in lacks))


def packages(needs: Sequence[str], rehearses: bool) -> list[Lack]:
    """Of the modules, those that are not there or of another version; imports nothing large."""
    every_stage = {*EVERY_STAGE, *(() if rehearses else ON_A_GPU)}
    lacks = []
    for module in dict.fromkeys([*EVERY_STAGE, *(() if rehearses else ON_A_GPU), *needs]):
        name = DISTRIBUTIONS.get(module, module)
        wanted = requirements().get(name, "")
        try:
            version = metadata.version(name) if is_there(module) else None
        except metadata.PackageNotFoundError:
            version = ""
        if version is not None and fits(version, wanted):
            continue
        what = f"{name} is missing" if version is None else f"{name} is {version or 'unknown'}"
        if version == "":
            what = f"{name} is there without its metadata, as a copied folder is"
        packing = "" if name == "megatron-core" else f" PACKAGES='{name}{wanted or '==VERSION'}'"
        remedy = f"pip install '{name}{wanted}', or bring its wheel: make gpu-pack{packing}"
        lacks.append(Lack(what, remedy, (module,), module in every_stage))
    return lacks


def requirements() -> dict[str, str]:
    """What pyproject.toml asks of the project's dependencies, by name."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [line.partition("=")[0].partition(">")[0] for line in listed]
    return {name: line.removeprefix(name) for name, line in zip(names, listed, strict=True)}


def fits(version: str, wanted: str) -> bool:
    """Whether a version is the one that is pinned, if one is: of those others are not tried."""
    if not version or not wanted.startswith("=="):
        return bool(version)
    pinned = wanted.removeprefix("==")
    if pinned.endswith("*"):
        return f"{version}.".startswith(pinned.removesuffix("*"))
    return version.partition("+")[0] == pinned


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def look_at_device(rehearses: bool) -> tuple[dict[str, Any], list[Lack]]:
    """The device's name and versions, and what is wrong with it or around it."""
    lacks = []
    device = {"name": "rehearsal", "torch": metadata.version("torch")}
    if not rehearses:
        import torch

        if not torch.cuda.is_available():
            lack = "there is no CUDA device (torch.cuda.is_available() is false)"
            remedy = "on a CPU, rehearse: make gpu-first DEVICE=cpu (--rehearse)"
            return device, [Lack(lack, remedy, every_stage=True)]
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        device = {
            "name": properties.name,
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": f"{total / 1e9:.0f} GB, {free / 1e9:.0f} free",
        }
        torch.ones(1024, device="cuda").sum().item()  # it computes, and is not merely listed
        if free < MIN_MEMORY:
            lacks.append(
                Lack(
                    f"{free / 1e9:.0f} GB of the GPU's memory are free",
                    f"a step of 3.5 B takes about {MIN_MEMORY / 1e9:.0f}: leave it out by ONLY=, "
                    "or end what else uses the GPU",
                )
            )
        if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
            lacks.append(Lack("there is no C compiler", "Triton needs one: install gcc"))
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
            lacks.append(
                Lack("Python.h is missing", "Triton needs it: install Python's headers (-dev)")
            )
    free_space = shutil.disk_usage(ROOT).free
    if free_space < MIN_SPACE:
        lacks.append(Lack(f"{free_space / 1e9:.1f} GB of disk are free", "make room: it takes 1"))
    return device, lacks


if __name__ == "__main__":
    main()
