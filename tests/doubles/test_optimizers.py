"""Transformer Engine's optimizer and its operations on many tensors."""

import copy

import pytest
import torch


def parameters(device):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (5,), (1,))
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]


def steps(optimizer, params, count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.device)
        optimizer.step()


def test_adam_is_pytorchs(te, device):
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = parameters(device), parameters(device)
    steps(te.optimizers.FusedAdam(ours, **settings), ours, 5)
    steps(torch.optim.AdamW(theirs, **settings), theirs, 5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_steps_are_counted_by_group(te, device):
    params = parameters(device)
    optimizer = te.optimizers.FusedAdam([{"params": params}, {"params": []}], lr=0.01)
    steps(optimizer, params, 3)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["step"] == 3 and saved["param_groups"][0]["bias_correction"]
    assert {name for state in saved["state"].values() for name in state} == {
        "exp_avg",
        "exp_avg_sq",
    }


def test_a_state_goes_on(te, device):
    whole, first = parameters(device), parameters(device)
    steps(te.optimizers.FusedAdam(whole, lr=0.01), whole, 4)
    optimizer = te.optimizers.FusedAdam(first, lr=0.01)
    steps(optimizer, first, 4)
    again = te.optimizers.FusedAdam(first, lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, first, 0)
    assert again.param_groups[0]["step"] == 4
    for param in first:
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(again.state[param][name], optimizer.state[param][name])


def test_a_step_in_the_state_is_no_state(te, device):
    """Which is why a checkpoint of torch's AdamW has to be rewritten; see optimizer_state.py."""
    params = parameters(device)
    theirs = torch.optim.AdamW(params, lr=0.01)
    steps(theirs, params, 1)
    with pytest.raises(KeyError, match="step"):
        te.optimizers.FusedAdam(params, lr=0.01).load_state_dict(theirs.state_dict())


def test_many_tensors_at_once(te, device):
    optimizers = te.optimizers
    flag = torch.zeros(1, dtype=torch.int, device=device)
    tensors = [p.detach() for p in parameters(device)] + [torch.zeros(0, device=device)]
    apply = optimizers.multi_tensor_applier
    norm, _ = apply(optimizers.multi_tensor_l2norm, flag, [tensors], False)
    expected = torch.cat([tensor.flatten() for tensor in tensors]).norm()
    assert norm.shape == (1,)
    torch.testing.assert_close(norm[0], expected)
    halved = [torch.empty_like(tensor) for tensor in tensors]
    apply(optimizers.multi_tensor_scale, flag, [tensors, halved], 0.5)
    factor = torch.tensor([0.5], device=device)
    apply(optimizers.multi_tensor_scale_tensor, flag, [halved, halved], factor)
    for tensor, quarter in zip(tensors, halved, strict=True):
        torch.testing.assert_close(quarter, tensor / 4)
    assert apply(optimizers.multi_tensor_l2norm, flag, [[tensors[-1]]], False) is None
