"""An optimizer goes on from another Adam's state; through Megatron: test_transformer_engine."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.doubles.transformer_engine.pytorch.optimizers import FusedAdam

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}


@pytest.fixture
def optimizer_state():
    """The module, which imports Megatron's names when it is used."""
    from megatron_dynmoe.upstream import optimizer_state

    return optimizer_state


@pytest.fixture(autouse=True)
def _a_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def trained(cls, steps: int = 3):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(4, 3, generator=generator).requires_grad_() for _ in range(2)]
    optimizer = cls(params, **SETTINGS)
    step(optimizer, steps)
    return optimizer


def step(optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def as_megatron_saves(optimizer, distributed: bool) -> dict:
    """One step for all: a common one, or with the distributed optimizer in the groups alone."""
    saved = copy.deepcopy(optimizer.state_dict())
    steps = {float(state.pop("step")) for state in saved["state"].values() if "step" in state}
    if distributed:
        for group in saved["param_groups"]:
            group["step"] = steps.copy().pop() if steps else group["step"]
        return {"optimizer": {"param_groups": saved["param_groups"]}, "param_state": saved["state"]}
    if steps:
        saved["state"]["common_step"] = torch.tensor(steps.pop())
    return {"optimizer": saved}


def as_megatron_loads(loaded: dict, cls) -> dict:
    """The other way round, for this optimizer."""
    inner = loaded["optimizer"]
    state = loaded.get("param_state") or inner["state"]
    common = state.pop("common_step", None)
    if common is None and cls is torch.optim.AdamW:
        common = torch.tensor(float(inner["param_groups"][0]["step"]))
    if common is not None:
        for values in state.values():
            values["step"] = common.clone()
    return {"state": state, "param_groups": inner["param_groups"]}


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("loader", [torch.optim.AdamW, FusedAdam], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("saver", [torch.optim.AdamW, FusedAdam], ids=lambda cls: cls.__name__)
def test_the_fourth_step_follows_from_three_of_any_adam(
    optimizer_state, saver, loader, distributed
):
    first = trained(saver)
    second = trained(loader, steps=0)
    for ours, theirs in zip(*(o.param_groups[0]["params"] for o in (second, first)), strict=True):
        ours.data.copy_(theirs.data)
    saved = as_megatron_saves(first, distributed)
    loaded = optimizer_state.with_step_of([SimpleNamespace(optimizer=second)], copy.deepcopy(saved))
    if saver is loader:  # the next checkpoint is that of a run in one go
        ours, theirs = loaded["optimizer"], saved["optimizer"]
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours.get("state", {}).keys() == theirs.get("state", {}).keys()
    second.load_state_dict(as_megatron_loads(loaded, loader))
    for optimizer in (first, second):
        step(optimizer, 1, seed=2)
    for ours, theirs in zip(*(o.param_groups[0]["params"] for o in (second, first)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_counts_no_steps_is_left_alone(optimizer_state):
    sgd = trained(torch.optim.SGD)
    saved = {"optimizer": sgd.state_dict(), "grad_scaler": {"scale": 1.0}}
    assert optimizer_state.with_step_of([SimpleNamespace(optimizer=sgd)], saved) == saved
    assert optimizer_state.with_step_of([SimpleNamespace(optimizer=None)], saved) == saved
