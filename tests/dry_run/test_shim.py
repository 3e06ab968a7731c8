"""The library that stands in for a driver."""

import shutil
import subprocess
import sys

import pytest

from megatron_dynmoe.dry_run.devices import shim


def test_without_a_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OSError, match=r"there is no C compiler.*apt install gcc.*CC=/path/to/cc"):
        shim.find_compiler()
    monkeypatch.setenv("CC", "nvcc -x")
    with pytest.raises(OSError, match="CC is nvcc, which is not found"):
        shim.find_compiler()


def test_a_compiler_that_fails_says_why(monkeypatch, tmp_path):
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho 'cannot find ld' >&2\nexit 1\n")
    failing.chmod(0o700)
    with pytest.raises(OSError, match="and says: cannot find ld"):
        shim._compile([str(failing)], tmp_path / "libcuda.so.1")


def test_a_torch_without_cuda_needs_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    found = type("Found", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(shim, "find_spec", lambda name: found)
    assert shim.find_compiler() is None


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_autograd_runs_on_a_device_that_does_not_exist():
    """And by it alone: without the library the engine stops."""
    program = """
from megatron_dynmoe.dry_run.devices import shim
shim.load()
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from megatron_dynmoe.dry_run.devices import device
device.install("none", (9, 0), 10**9, print)
with FakeTensorMode():
    weight = torch.ones(4, 4, device="cuda", requires_grad=True)
    (weight @ weight).sum().backward()
    print(weight.grad.device, torch.cuda.get_device_name())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "cuda:0 none\n", done.stderr
    program = program.replace("shim.load()", "")
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 1
