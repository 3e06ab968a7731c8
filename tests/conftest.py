"""What holds for every test: how they share a machine, and what they need to run."""

import os
import random
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more about the machine's load than about the code.
settings.register_profile("shared-machine", deadline=None, print_blob=True)
settings.load_profile("shared-machine")

# The background of a script ignores Ctrl-C, and so would every run that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where there is no GPU, Triton interprets its kernels on the CPU, if it hears so before its import.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "tests/faults")
    group.addoption(
        "--kills", type=int, default=2, help="how often runs are killed (2; make test-faults: 10)"
    )
    group.addoption(
        "--kill-seed",
        type=int,
        default=random.randrange(1_000_000),
        help="which moments; a failing test prints its own (default: another one each time)",
    )


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("distributed"):
            # One worker runs them one after another: two torchrun jobs at once only wait for
            # each other's cores.
            item.add_marker(pytest.mark.xdist_group("distributed"))
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
