"""A dry run on the double of Transformer Engine: no device is mixed up, and the host waits as ever.

Its memory and kernels are the double's, so users are refused such a dry run.
"""

import os
from pathlib import Path

import pytest

from megatron_dynmoe.dry_run import launch
from megatron_dynmoe.planning.gpus import GPUS

pytestmark = [pytest.mark.megatron, pytest.mark.long]
TE = ["--moe-dynamic-backend", "transformer_engine"]
REPOSITORY = Path(__file__).resolve().parents[2]
# The host's generator, which upstream compares when it forks; and counts, which the host has.
ON_THE_HOST = {"eq", "lift_fresh"}


def dry_run(*flags: str) -> launch.DryRun:
    return launch.dry_run("smoke", [*TE, *flags], None, GPUS["h200-141g"], kernels="0")


def test_users_are_refused():
    with pytest.raises(
        ValueError, match="--moe-dynamic-backend is transformer_engine, and its code"
    ):
        dry_run()


@pytest.mark.parametrize("flags", [[], ["--bf16", "--context-parallel-size", "2"]], ids=["", "cp2"])
def test_a_step_on_the_double(monkeypatch, flags):
    refused = {n: why for n, why in launch._REFUSED.items() if n != "moe_dynamic_backend"}
    monkeypatch.setattr(launch, "_REFUSED", refused)
    monkeypatch.setattr(launch, "_CHILD", "tests.dry_run.with_the_double")
    doubles = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests/doubles'}"
    monkeypatch.setenv("PYTHONPATH", doubles)
    result = dry_run(*flags).result
    assert {each.made.split()[0] for each in result.mistakes} <= ON_THE_HOST
    assert sum(wait.count for wait in result.waits if wait.per.startswith("layer")) == 1
    attention = next(part for part in result.kernels if part.part == "attention")
    assert "transformer_engine" in attention.files
