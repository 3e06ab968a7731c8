"""Steps of Megatron's own training, which need a process of their own."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from tests.gpu.stand_in import ON_GPU, take_the_ways_of_cuda
from tests.kernels.device import DEVICE

BACKEND, ROUTING = "torch_native", "dtop_p"


class Step(NamedTuple):
    """What a step came to.

    Attributes:
        experts: per token, of each layer.
    """

    loss: float
    gradient_norm: float
    threshold: float
    experts: list[float]


def with_and_without_kernels(flags: list[str], number: int) -> tuple[list[Step], list[Step]]:
    """Train a model with DYNMOE_KERNELS=0, and one that begins with the same weights with 1."""
    from megatron_dynmoe.run import prepare

    prepare()
    if not ON_GPU:
        take_the_ways_of_cuda()
    from benchmarks.training import build, start_megatron, step, text_batches
    from megatron_dynmoe import kernels
    from megatron_dynmoe.control.update import routers_of

    args = start_megatron("small", None, flags)
    batches = text_batches(args, number)
    runs: tuple[list[Step], list[Step]] = ([], [])
    for setting, steps in enumerate(runs):
        os.environ["DYNMOE_KERNELS"] = str(setting)
        assert kernels.available(torch.device(DEVICE)) == bool(setting)
        provider = build(args, batches, BACKEND, ROUTING)
        routers = [*routers_of(provider.model)]
        for _ in range(number):
            losses, skipped, *_, gradient_norm, _, _ = step(provider)
            assert not skipped
            experts = [router.measured.item() for router in routers]
            threshold = routers[0].threshold.item()
            steps.append(Step(losses["lm loss"].item(), float(gradient_norm), threshold, experts))
    return runs
