"""What two layouts of one training must have in common, and how their tensors are compared.

A sharded checkpoint names whole tensors and knows which part each rank holds. Gradients saved in
that form are put together under every layout by what puts parameters together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import CaseResult

GRADIENTS = (f"{__name__}:saved_gradients",)  # hooks of a case
EVERY = 3  # steps


@contextlib.contextmanager
def saved_gradients(recorder: Any) -> Iterator[None]:
    """Save the reduced gradients of every third step, of the first and of a resumed run's first."""
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    from megatron_dynmoe.control.update import GlobalBatchUpdate, finished_iterations
    from tests.distributed.faults import replaced

    update = GlobalBatchUpdate.__call__

    def update_and_save(self, model, *args, **kwargs):
        update(self, model, *args, **kwargs)
        if finished_iterations() % EVERY:
            return
        folder = _folder(recorder.folder, finished_iterations())
        folder.mkdir(parents=True, exist_ok=True)
        parameters = [parameter for chunk in model for parameter in chunk.parameters()]
        values = [parameter.data for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.data = parameter.main_grad
            chunks = {
                f"chunk {index}": chunk.sharded_state_dict()
                for index, chunk in enumerate(unwrap_model(model))
            }
            dist_checkpointing.save(chunks, str(folder))
        finally:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data = value

    with replaced(GlobalBatchUpdate, "__call__", update_and_save):
        yield


def _folder(files: Path, step: int) -> Path:
    return files / f"gradients_{step}"


def gradients(result: CaseResult, step: int = 0) -> dict[str, torch.Tensor]:
    """The whole gradients of a step, and the routers' buffers, by torch_native's names."""
    found = tensors(_folder(result.directory / f"{result.case.name}.files", step))
    te, native = ".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"
    return {name.replace(te, native): tensor for name, tensor in found.items()}


def assert_same_gradients(
    one: CaseResult, many: CaseResult, step: int = 0, tolerance: float = 5e-6
) -> None:
    """Every element alike, up to a share of the largest one of its matrix; of each expert apart."""
    expected, actual = gradients(one, step), gradients(many, step)
    shapes = [{name: x.shape for name, x in found.items()} for found in (expected, actual)]
    assert shapes[0] == shapes[1]
    wrong = {}
    for name, x in expected.items():
        matrix = (-2, -1) if x.dim() > 2 else None
        scale = x.abs().amax(dim=matrix).clamp(min=torch.finfo(torch.float32).tiny)
        difference = ((actual[name] - x).abs().amax(dim=matrix) / scale).max().item()
        if not difference <= tolerance:
            wrong[name] = difference
    assert not wrong, f"{many.case.name}, step {step}, relative to the largest gradient: {wrong}"
    assert any(x.any() for name, x in expected.items() if "experts" in name)


def assert_same_training(one: CaseResult, many: CaseResult) -> None:
    """The first step is the same; the next differ by the order of float sums in the gradients."""
    assert many.losses == pytest.approx(one.losses, rel=1e-4)
    assert many.losses[0] == pytest.approx(one.losses[0], rel=1e-6)
    assert many.assignments[0] == one.assignments[0]
    assert many.thresholds[0] == one.thresholds[0]
    # A token whose cumulative probability all but equals the threshold may change its mind.
    tokens = max(one.finalized[0]["tokens"])
    assert many.experts_per_token == pytest.approx(one.experts_per_token, abs=2 / tokens)
    assert many.thresholds == pytest.approx(one.thresholds, abs=1e-3)


def tensors(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint, by name."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, checkpoint_id=path, no_dist=True)
    return state
