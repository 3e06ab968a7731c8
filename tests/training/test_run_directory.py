"""What ``--run-dir`` says of a run at its end."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dynmoe.attempts import is_finished
from megatron_dynmoe.config import DynMoEConfig

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("skip_train", [False, True])
def test_only_training_brings_a_run_to_its_end(tmp_path: Path, skip_train: bool) -> None:
    """After an evaluation of what there is so far, the launch scripts have to go on with it."""
    from megatron_dynmoe.training.run_directory import keeping

    args = Namespace(
        **{"run_dir": str(tmp_path), "live_plot": False, "rank": 0, "world_size": 1},
        **{"train_iters": 20, "train_samples": None, "skip_train": skip_train},
    )
    with keeping(args, DynMoEConfig(routing="top_k").resolve(4), program_start=0.0):
        pass
    assert is_finished(tmp_path, {}) is not skip_train
