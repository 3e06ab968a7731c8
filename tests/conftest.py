"""What holds for every test: how they share a machine, and what they need to run."""

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes, or its making, says more about the machine's load than about the code.
calm = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
# The same examples each time: what passes here passes on the machine that decides about a commit.
settings.register_profile("fixed", derandomize=True, **calm)
settings.register_profile("random", **calm)  # new ones each time: --hypothesis-profile random
settings.load_profile("fixed")

# Tests name files of the checkout, and start its commands, from wherever pytest was called.
os.chdir(Path(__file__).resolve().parents[1])

# Whoever calls pytest may be within a cluster's job, or have settings: a test sets its own.
OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in [*os.environ]:
    if name in OF_A_JOB or name.startswith(("SLURM_", "SBATCH_", "TORCHELASTIC_")):
        del os.environ[name]
os.environ.pop("DYNMOE_CONFIG", None)

# The background of a script ignores Ctrl-C, and so would every run that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU, Triton interprets its kernels on the CPU, if it hears so before its import.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A training in a test's own process catches signals, and goes on to do so after it.
CAUGHT = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in CAUGHT}
    yield
    for number, handler in before.items():
        if handler is not None:  # None: not Python's
            signal.signal(number, handler)


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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws from torch's generator depends on no test before it.

    Which those are is the machine's affair: pytest-xdist hands tests to whichever worker is free.
    """
    if "torch" in sys.modules:  # a test of a pure module need not import it
        sys.modules["torch"].manual_seed(0)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
