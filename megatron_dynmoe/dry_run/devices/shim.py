"""The one thing that Python cannot answer for a GPU that is not there.

PyTorch's autograd engine, which is C++, asks for the number of devices and whether each has a CUDA
context, and stops if there is no driver. A library of two functions, loaded before torch, answers.
It counts no devices until :func:`devices_counted` says so, because other code of torch would take a
counted device for one that it can use.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

# torch's guard for devices that are not there counts this many, and the engine asks for each.
NUM_DEVICES = 127
# The first is C++'s name of c10::cuda::device_count.
SOURCE = """
signed char dynmoe_num_devices = 0;
signed char _ZN3c104cuda12device_countEv(void) { return dynmoe_num_devices; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 0;
    return 0;
}
"""

_num_devices: ctypes.c_byte | None = None


def load() -> None:
    """Compile and load the library, if this build of torch needs it. Call before importing torch.

    Raises:
        OSError: there is no C compiler, or it fails.
    """
    global _num_devices
    assert "torch" not in sys.modules
    compiler = find_compiler()
    if compiler is None:
        return
    with tempfile.TemporaryDirectory(prefix="dynmoe-") as folder:
        library = Path(folder, "libcuda.so.1")  # the name under which torch looks for a driver
        _compile(compiler, library)
        # Global, so that its functions come before those of the same name in torch's libraries.
        loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _num_devices = ctypes.c_byte.in_dll(loaded, "dynmoe_num_devices")


def find_compiler() -> list[str] | None:
    """Find the C compiler; None if this build of torch has no CUDA, and so needs no library.

    Raises:
        OSError: there is none.
    """
    found = find_spec("torch")
    folders = (found and found.submodule_search_locations) or ()
    if not any(Path(folder, "lib", "libc10_cuda.so").exists() for folder in folders):
        return None
    asked_for = shlex.split(os.environ.get("CC", ""))
    compiler = asked_for or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if compiler and shutil.which(compiler[0]):
        return compiler
    what = f"CC is {asked_for[0]}, which is not found" if asked_for else "there is no C compiler"
    raise OSError(
        f"{what}, and a dry run compiles ten lines of C: install gcc or clang (apt install gcc, "
        "dnf install gcc, module load gcc), or name one by CC=/path/to/cc."
    )


@contextmanager
def devices_counted() -> Iterator[None]:
    """Let torch count devices in this block."""
    if _num_devices is None:
        yield
        return
    _num_devices.value = NUM_DEVICES
    try:
        yield
    finally:
        _num_devices.value = 0


def _compile(compiler: list[str], library: Path) -> None:
    command = [*compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-"]
    done = subprocess.run(
        [*command, "-o", str(library)], input=SOURCE, text=True, capture_output=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise OSError(
            f"the C compiler {shlex.join(compiler)} fails at ten lines of C, which a dry run "
            f"needs, and says: {said}. Name another by CC=/path/to/cc."
        )
