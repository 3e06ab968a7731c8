"""Checks what is installed and whether it works, in one child that prints each result at once.

The child is ``python -m megatron_dynmoe.doctor.software``. Each line that starts with
:data:`MARK` holds a check in JSON, in the order of :data:`CHECKS`. After a hang or a crash, the
parent therefore knows which check caused it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

from megatron_dynmoe import __version__
from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check, guarded

MARK = "dynmoe-doctor: "
# The tests run with these versions; a test compares them with pyproject.toml.
TESTED_PYTHON = ((3, 12), (3, 13))
TESTED_TORCH = "2.11"
TESTED_MEGATRON = "0.19.2"

_INSTALL = "make setup, or pip install the package again"


def look(timeout: float) -> list[Check]:
    """Run all checks of this file in a child process.

    Args:
        timeout: seconds for all checks together.
    """
    command = [sys.executable, "-m", "megatron_dynmoe.doctor.software"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        output, errors = child.stdout, child.stderr.strip().splitlines()
        end = f"the process ended with {_status(child.returncode)}"
        end += f": {errors[-1]}" if child.returncode and errors else ""
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace")
        end = f"no answer within {timeout:g} s"
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    checks = [Check(*json.loads(line.removeprefix(MARK))) for line in lines]
    missing = list(CHECKS)[len(checks) :]
    if missing:
        remedy = "try it by hand; a slow file system needs a longer --timeout"
        checks.append(Check(missing[0], FAILED, end, remedy))
        checks += [Check(name, FAILED, "not looked at after that") for name in missing[1:]]
    return checks


def _status(returncode: int) -> str:
    if returncode < 0:
        return signal.Signals(-returncode).name
    return f"exit code {returncode}"


def _python() -> Check:
    found = f"{platform.python_version()}, {sys.executable}"
    minor = sys.version_info[:2]
    if minor < TESTED_PYTHON[0]:
        return Check("Python", FAILED, found, "Megatron needs 3.12 or later: install 3.12")
    if minor > TESTED_PYTHON[-1]:
        return Check("Python", WARNING, found, "tested with 3.12 and 3.13 only")
    return Check("Python", PASSED, found)


def _package() -> Check:
    import megatron_dynmoe

    folder = os.path.dirname(megatron_dynmoe.__file__)
    return Check("megatron-dynmoe", PASSED, f"{__version__}, {folder}")


def _torch() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("PyTorch", FAILED, f"does not import: {error}", _INSTALL)
    if not torch.__version__.startswith(TESTED_TORCH + "."):
        remedy = f"tested with {TESTED_TORCH}: pip install 'torch=={TESTED_TORCH}.*'"
        return Check("PyTorch", WARNING, torch.__version__, remedy)
    return Check("PyTorch", PASSED, torch.__version__)


def _cuda() -> Check:
    import torch

    has_driver = os.path.exists("/proc/driver/nvidia/version")
    if torch.version.cuda is None:
        found = "torch is built without CUDA" + (", but there is a driver" if has_driver else "")
        return Check(
            "CUDA", WARNING, found, "runs on the CPU only; for a GPU, install a CUDA build of torch"
        )
    found = f"torch for CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
        return Check("CUDA", PASSED, f"{found}, driver for {driver // 1000}.{driver % 1000 // 10}")
    if has_driver:
        return Check(
            "CUDA",
            FAILED,
            f"{found}, a driver is loaded, but torch finds no device",
            f"check nvidia-smi, CUDA_VISIBLE_DEVICES, and that the driver is new enough for CUDA "
            f"{torch.version.cuda}",
        )
    return Check("CUDA", WARNING, f"{found}, no driver", "for a GPU, install NVIDIA's driver")


def _gpus() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("GPUs", WARNING, "none", "train small models here, large ones on GPUs")
    devices = [
        torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
    ]
    kinds = sorted({f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices})
    found = f"{len(devices)} x " + " and ".join(kinds)
    if len(kinds) > 1:
        remedy = "the slowest and smallest one decides: give a run equal ones"
        return Check("GPUs", WARNING, found, remedy)
    if min((d.major, d.minor) for d in devices) < (8, 0):
        return Check("GPUs", WARNING, found, "no bf16 units: Ampere or later is wanted")
    return Check("GPUs", PASSED, found)


def _communication() -> Check:
    import torch
    from torch import distributed

    on_gpu = torch.cuda.is_available() and distributed.is_nccl_available()
    backend, device = ("nccl", "cuda") if on_gpu else ("gloo", "cpu")
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        value = torch.ones(1, device=device)
        distributed.all_reduce(value)
        assert value.item() == 1
    finally:
        distributed.destroy_process_group()
    if on_gpu:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        return Check("communication", PASSED, f"NCCL {version}, tried on one GPU")
    found = "gloo, tried on one process"
    if torch.cuda.is_available():
        return Check("communication", FAILED, f"{found}; torch has no NCCL", _INSTALL)
    return Check("communication", PASSED, found)


def _triton() -> Check:
    import torch

    from megatron_dynmoe.kernels import asked_for

    if importlib.util.find_spec("triton") is None:
        remedy = "only needed for the kernels of DYNMOE_KERNELS=1"
        return Check("Triton", WARNING, "not installed", remedy)
    import triton

    found = f"{triton.__version__}; kernels are {'on' if asked_for() in ('1', 'fused') else 'off'}"
    if torch.cuda.is_available() and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        remedy = "Triton builds its launchers with one: install gcc"
        return Check("Triton", WARNING, f"{found}; no C compiler", remedy)
    return Check("Triton", PASSED, found)


def _megatron() -> Check:
    from megatron_dynmoe.backends import cpu

    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return Check("Megatron-Core", FAILED, "not installed", _INSTALL)
    if cpu.wanted():  # a run would ask this, too
        cpu.install()
    import megatron.training.arguments  # noqa: F401

    if version == TESTED_MEGATRON:
        return Check("Megatron-Core", PASSED, version)
    series = TESTED_MEGATRON.rpartition(".")[0] + "."
    state = WARNING if version.startswith(series) else FAILED
    remedy = f"tested with {TESTED_MEGATRON}: pip install megatron-core=={TESTED_MEGATRON}"
    return Check("Megatron-Core", state, version, remedy)


def _transformer_engine() -> Check:
    name = "Transformer Engine"
    if importlib.util.find_spec("transformer_engine") is None:
        return Check(name, PASSED, "not installed; fp8 and --cp-comm-type p2p would need it")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # such as a build for another torch or CUDA
        remedy = "build it for this torch, or uninstall it: torch_native does without"
        return Check(name, FAILED, f"installed, does not import: {error}", remedy)
    return Check(name, PASSED, importlib.metadata.version("transformer_engine"))


def _apex() -> Check:
    if importlib.util.find_spec("apex") is None:
        return Check("Apex", PASSED, "not installed, not needed")
    parts = {
        "fused gradient accumulation": "fused_weight_gradient_mlp_cuda",
        "fused optimizers": "amp_C",
    }
    missing = [what for what, module in parts.items() if importlib.util.find_spec(module) is None]
    if missing:
        remedy = "rebuild it with its CUDA extensions, or uninstall it"
        return Check("Apex", WARNING, f"installed without {' and '.join(missing)}", remedy)
    return Check("Apex", PASSED, "installed, with its CUDA extensions")


def _backend() -> Check:
    from megatron_dynmoe.backends.choice import choose_backend

    chosen = choose_backend(None, None)
    return Check("back end", PASSED, f"auto takes {chosen.backend}: {chosen.why}")


def _bf16() -> Check:
    import torch

    from megatron_dynmoe.backends import bf16, cpu

    if torch.cuda.is_available() and not cpu.is_installed():
        return Check("bf16", PASSED, "multiplied by the GPU")
    factor = bf16.slowdown()
    found = f"a product takes {factor:.2g} times as long as in float32 on this CPU"
    if factor < bf16.SLOW:
        return Check("bf16", PASSED, found)
    return Check("bf16", WARNING, found, "train without --bf16 on this CPU")


def _experts() -> Check:
    import torch

    from megatron_dynmoe.backends import cpu
    from megatron_dynmoe.moe.fused import fused_experts, is_fused
    from megatron_dynmoe.moe.grouped_linear import grouped_linear, uses_grouped_mm

    on_gpu = torch.cuda.is_available() and not cpu.is_installed()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = torch.ones(6, 64, device=device, dtype=dtype, requires_grad=True)
    weight = torch.ones(2, 32, 64, device=device, dtype=dtype, requires_grad=True)
    output = grouped_linear(rows, weight, torch.tensor([2, 4], device=device))
    output.sum().backward()
    assert output.min() == output.max() == 64 and rows.grad is not None
    kind = f"in {str(dtype).removeprefix('torch.')} on {torch.cuda.get_device_name(0)}, tried"
    if is_fused(device, dtype, 64, 32):
        second = torch.ones(2, 64, 16, device=device, dtype=dtype)
        counts = torch.tensor([2, 4], device=device)
        fused_experts(rows, torch.ones(6, device=device), weight, second, counts).sum().backward()
        return Check("experts' GEMM", PASSED, f"fused Triton kernels {kind}")
    if uses_grouped_mm(device, dtype, 64, 32):
        return Check("experts' GEMM", PASSED, f"grouped_mm {kind}")
    remedy = (
        "PyTorch groups them from Hopper on; DYNMOE_KERNELS=1 does with Triton (docs/backends.md)"
    )
    return Check("experts' GEMM", WARNING, f"one after another {kind}", remedy)


CHECKS: dict[str, Callable[[], Check]] = {
    "Python": _python,
    "megatron-dynmoe": _package,
    "PyTorch": _torch,
    "CUDA": _cuda,
    "GPUs": _gpus,
    "communication": _communication,
    "Triton": _triton,
    "Megatron-Core": _megatron,
    "Transformer Engine": _transformer_engine,
    "Apex": _apex,
    "back end": _backend,
    "experts' GEMM": _experts,
    "bf16": _bf16,
}


def main() -> None:
    """Print the result of every check."""
    for name, check in CHECKS.items():
        print(MARK + json.dumps(guarded(name, check)), flush=True)


if __name__ == "__main__":
    main()
