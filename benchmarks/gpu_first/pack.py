"""Puts what a GPU machine without a network lacks into one folder to carry there.

    python -m benchmarks.gpu_first.pack [--packages NAME==VERSION ...]

Downloads wheels by name and version, by default the megatron-core that pyproject.toml names, and
writes the commit, which a copy of the tree without its history does not know, and the dry run's
predictions, which take minutes of a CPU. `make gpu-first` finds all of it in build/gpu-pack.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_first.preflight import requirements
from benchmarks.gpu_first.state import ROOT, commit
from megatron_dynmoe.settings.messages.command_line import CommandParser
from megatron_dynmoe.storage.atomic import new_folder

PACKAGES = ("megatron-core",)
MAX_CARRIED = 60 * 10**6  # bytes, tree and pack together
# Of a machine with an x86-64 processor and a glibc of the last years.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64"]


def main() -> None:
    parser = CommandParser(prog="gpu_first.pack", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "build" / "gpu-pack", help="default: %(default)s")
    default = [f"{name}{requirements()[name]}" for name in PACKAGES]
    add("--packages", nargs="+", default=default, help=f"default: {' '.join(default)}")
    add("--no-predictions", dest="predict", action="store_false", help="leave the dry runs out")
    add("--python", default="3.12", metavar="VERSION", help="of the GPU machine (%(default)s)")
    args = parser.parse_args()
    try:
        pack(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def pack(args: argparse.Namespace) -> None:
    """Make the folder anew.

    Raises:
        ValueError: a package cannot be had, or all is too much to carry.
    """
    with new_folder(args.output, overwrite=True) as folder:
        for package in args.packages:
            if "==" not in package:
                raise ValueError(f"--packages {package}: pin it, as in {package}==1.2.3")
            download(package, args.python, folder)
        (folder / "commit").write_text(f"{commit(folder)}\n")
        if args.predict:
            predict(folder / "predictions.csv")
    tree, carried = size_of_tree(), sum(f.stat().st_size for f in args.output.iterdir())
    for path in sorted(args.output.iterdir()):
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {os.path.relpath(path)}")
    print(f"{tree / 1e6:7.2f} MB  the tree, without what git ignores")
    if tree + carried > MAX_CARRIED:
        raise ValueError(f"{(tree + carried) / 1e6:.0f} MB are more than {MAX_CARRIED / 1e6:.0f}")
    print("Bring both to the GPU machine, and there: make gpu-first OUTPUT=dir MINUTES=8")


def download(package: str, python: str, folder: Path) -> None:
    """One wheel, without what it needs.

    Raises:
        ValueError: there is none for that machine.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--implementation", "cp", "--python-version", python]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    done = subprocess.run([*command, package], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ValueError(f"--packages {package}: {said[-1] if said else done.stderr.strip()}")


def predict(file: Path) -> None:
    """Ask the dry run, in a process of its own, because this one imports no PyTorch.

    Raises:
        ValueError: it has no answer to anything.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_first.predict", "--output", str(file)]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError("the dry runs failed, see above: leave them out with --no-predictions")


def size_of_tree() -> int:
    """Bytes of what a copy of the checkout holds: tracked, and untracked but not ignored."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
    )
    names = set(listed.stdout.decode().split("\0")) - {""}
    return sum((ROOT / name).lstat().st_size for name in names if (ROOT / name).exists())


if __name__ == "__main__":
    main()
