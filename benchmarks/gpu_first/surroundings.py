"""What the stages find around them: variables, wheels that the machine lacks, caches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_first.stages import Stage
from benchmarks.gpu_first.state import ROOT

PIP = "-m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile"
PIP_SECONDS = 60.0
PATIENCE = "50"  # seconds for one answer of a benchmark's provider: imports, compilation, one round


def install_wheels(pack: Path, state: Path) -> Path | None:
    """Install the pack's wheels under the state's folder, once; returns where, None if nowhere.

    Raises:
        ValueError: pip cannot.
    """
    wheels, site = sorted(pack.glob("*.whl")), state / "site"
    if not wheels:
        return None
    names, note = "\n".join(wheel.name for wheel in wheels), site / "installed.txt"
    if not note.exists() or note.read_text() != names:
        shutil.rmtree(site, ignore_errors=True)
        command = [sys.executable, *PIP.split(), "--no-cache-dir", "--target", site, *wheels]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=PIP_SECONDS)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode().strip().splitlines() or ["pip failed"]
            raise ValueError(f"--pack {pack}: {said[-1]}") from error
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"--pack {pack}: pip took more than {PIP_SECONDS:.0f} s") from error
        note.write_text(names)
    return site


def environment(
    stage: Stage | None,
    rehearses: bool,
    site: Path | None,
    state: Path,
    temporary: Path,
    commit: str,
) -> dict[str, str]:
    """Of a stage, or of the look at the machine before all.

    Args:
        rehearses: whether it runs on a CPU.
        site: where wheels were installed.
        state: the folder whose caches all calls share.
        temporary: a folder for the stage's temporary files.
        commit: what the rows say.
    """
    before = {name: value for name, value in os.environ.items() if name != "DYNMOE_KERNELS"}
    paths = [str(site)] if site else []
    paths += [str(ROOT), *filter(None, [before.get("PYTHONPATH")])]
    chosen = {} if rehearses else {"TRITON_INTERPRET": "0"}  # whatever tests make of /dev
    if stage is not None and stage.kernels is not None:
        chosen["DYNMOE_KERNELS"] = str(stage.kernels)
    return before | {
        **chosen,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": before.get("OMP_NUM_THREADS", "1"),
        # Sizes differ from layer to layer and step to step, which fragments what is not expandable.
        "PYTORCH_ALLOC_CONF": before.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        "BENCHMARK_COMMIT": commit,
        # A provider that hangs is left out before its stage's limit takes the others with it.
        "BENCHMARK_PATIENCE": before.get("BENCHMARK_PATIENCE", PATIENCE),
        "TRITON_CACHE_DIR": str(state / "cache" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(state / "cache" / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(temporary),
    }
