"""Another Megatron, copied or installed into a folder of its own, which comes first on the path."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from megatron_dynmoe.settings.messages.command_line import UsageError

PACKAGES = ("core", "training")


@dataclass(frozen=True)
class Place:
    """Where the other Megatron is.

    Attributes:
        folder: what comes first on the path; holds ``megatron`` and no other package.
        version: as its own ``package_info.py`` says.
        origin: what was asked for, for people.
        commit: of a checkout by git; otherwise empty.
    """

    folder: Path
    version: str
    origin: str
    commit: str = ""


def place(wanted: str, folder: Path) -> Place:
    """Copy a checkout, or install a release, into an empty folder.

    Args:
        wanted: a folder that holds ``megatron/core``, or a version.

    Raises:
        UsageError: it is neither, or cannot be trained with.
    """
    source, commit = Path(wanted), ""
    if source.exists():
        if not (source / "megatron/core/package_info.py").is_file():
            raise UsageError(
                f"{wanted} is no Megatron: it has no megatron/core/package_info.py. Give the "
                "folder that holds the folder megatron."
            )
        for name in PACKAGES:
            if (source / "megatron" / name).is_dir():
                shutil.copytree(source / "megatron" / name, folder / "megatron" / name)
        commit = _commit(source)
        origin = f"{source.resolve()}" + (f" at {commit[:12]}" if commit else "")
    elif re.fullmatch(r"\d+(\.\w+)+", wanted):
        _install(wanted, folder)
        origin = "as released"
    else:
        raise UsageError(f"{wanted} is neither a folder nor a version such as 0.19.2.")
    version = _version(folder / "megatron/core/package_info.py")
    if not (folder / "megatron/training/__init__.py").is_file():
        raise UsageError(
            f"megatron-core {version} has no megatron.training in its package, with which we train."
        )
    _add_helpers(folder / "megatron/core/datasets")
    if not any(folder.glob("megatron_core-*.dist-info")):
        about = folder / f"megatron_core-{version}.dist-info"
        about.mkdir()
        text = f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n"
        (about / "METADATA").write_text(text)
    return Place(folder, version, origin, commit)


def installed() -> Path:
    """The folder that holds the ``megatron`` of this environment, which this package supports."""
    return Path(str(distribution("megatron-core").locate_file("")))


def _commit(source: Path) -> str:
    if not (source / ".git").exists():
        return ""
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _install(version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--target", str(folder), f"megatron-core=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        known = re.search(r"from versions: ([^)]*)", done.stderr)
        if known and known[1] != "none":
            newest = ", ".join(known[1].split(", ")[-6:])
            raise UsageError(f"there is no megatron-core {version}; the newest are {newest}.")
        last = (said or done.stderr.splitlines() or ["pip failed"])[-1]
        raise UsageError(f"megatron-core {version} was not installed: {last}")


def _version(file: Path) -> str:
    numbers = dict(re.findall(r"""^(\w+) = ['"]?([^'"\n]*)""", file.read_text(), re.MULTILINE))
    short = ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
    return short + numbers.get("PRE_RELEASE", "")


def _add_helpers(datasets: Path) -> None:
    """Give a checkout the compiled helper of the installed package, if both have one source.

    Otherwise Megatron calls make, which needs pybind11.
    """
    ours = installed() / "megatron/core/datasets"
    if any(datasets.glob("helpers_cpp*.so")) or not (datasets / "helpers.cpp").exists():
        return
    if (datasets / "helpers.cpp").read_bytes() == (ours / "helpers.cpp").read_bytes():
        for file in ours.glob("helpers_cpp*.so"):
            shutil.copy(file, datasets)
