"""Two steps of Megatron's own loop as one rank of any world, on fake tensors.

Made up are the device, the functions of PyTorch that need one, and the world.
"""

from __future__ import annotations

import os
import sys

from megatron_dynmoe.dry_run.devices import device
from megatron_dynmoe.dry_run.recording.recorder import Recorder
from megatron_dynmoe.dry_run.recording.schedule import NUM_STEPS, MicroBatches
from megatron_dynmoe.dry_run.request import Request
from megatron_dynmoe.dry_run.stand_ins import deep_ep, substitutes
from megatron_dynmoe.settings.messages.words import values_of

# Flags of a run's files, data, schedule, reports and end: nothing is read or written.
_DROPPED = (
    "blend-", "data-", "eval-", "exit-", "live-plot", "load", "lr-decay-", "lr-warmup-", "lr-wsd-",
    "num-workers", "per-dataset-", "profile", "pretrained-checkpoint", "run-dir", "save", "split",
    "start-eval-", "tensorboard-", "test-data-", "tokenizer-", "train-data-", "train-samples",
    "use-checkpoint-", "valid-data-", "wandb-",
)  # fmt: skip
_ADDED = {
    "dataloader-type": ["external"],
    "eval-interval": ["1000"],
    "eval-iters": ["0"],
    "mock-data": [],
    "num-workers": ["0"],
    "tokenizer-type": ["NullTokenizer"],
    "train-iters": [str(NUM_STEPS)],
}


def rehearse(request: Request) -> tuple[Recorder, MicroBatches]:
    """Train for two steps.

    Returns:
        What was recorded, which micro-batches ran in the second step.
    """
    recorder = Recorder()
    device.install(request.gpu, request.capability, request.memory, recorder.wait)
    substitutes.install(recorder)
    deep_ep.install(recorder, request.experts_per_token, request.imbalance)
    _become_rank(request)
    sys.argv = ["pretrain", *flags_of(request.words)]
    # These import Megatron, which has to find the device and the substitutes.
    from megatron_dynmoe.run import prepare

    prepare()
    from megatron_dynmoe.dry_run import training

    return recorder, training.train(recorder, request)


def flags_of(words: list[str]) -> list[str]:
    """Make the flags of a dry run from those of a training."""
    values = {
        name: given for name, given in values_of(words).items() if not name.startswith(_DROPPED)
    }
    return [word for name, given in (values | _ADDED).items() for word in (f"--{name}", *given)]


def _become_rank(request: Request) -> None:
    os.environ.update(
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        DYNMOE_DEVICE="cuda",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",  # nobody listens there
        RANK=str(request.rank),
        WORLD_SIZE=str(request.world_size),
    )
