"""Norm and clipping of all gradients at once; the fused Adam in Megatron: test_fused_adam."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.megatron

SIZES = [(3, 5), (1,), (64, 64), (7,), (0,)]


@pytest.fixture
def fewer_kernels():
    """The module, which imports Megatron's names when it is used."""
    from megatron_dynmoe.upstream import fewer_kernels

    return fewer_kernels


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator) for size in SIZES]


def test_the_norm_is_that_of_all_elements(fewer_kernels) -> None:
    norm, per_tensor = fewer_kernels.l2_norm(0, torch.zeros(1), [gradients()], False)
    exact = torch.cat([grad.double().reshape(-1) for grad in gradients()]).norm()
    assert norm.shape == (1,) and norm.dtype == torch.float32 and per_tensor is None
    torch.testing.assert_close(norm[0].double(), exact, rtol=1e-6, atol=0)


def test_the_norm_has_the_bits_of_upstreams(fewer_kernels, monkeypatch) -> None:
    from megatron.core import utils

    tensor = torch.tensor
    monkeypatch.setattr(
        utils.torch, "tensor", lambda data, device=None, **kwargs: tensor(data, **kwargs)
    )
    expected, _ = utils.local_multi_tensor_l2_norm(0, None, [gradients()], False)
    norm, _ = fewer_kernels.l2_norm(0, torch.zeros(1), [gradients()], False)
    assert torch.equal(norm, expected)


def test_scaling_has_the_bits_of_upstreams_and_is_in_place(fewer_kernels) -> None:
    from megatron.core.utils import local_multi_tensor_scale

    ours, theirs = gradients(), gradients()
    local_multi_tensor_scale(0, None, [theirs, theirs], 0.3)
    fewer_kernels.scale(0, None, [ours, ours], 0.3)
    assert all(map(torch.equal, ours, theirs))
    with pytest.raises(ValueError, match="different tensors"):
        fewer_kernels.scale(0, None, [ours, theirs], 0.3)


@pytest.mark.parametrize("setting", ["0", "1", ""])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_steps_are_fused_except_on_a_cpu_without_kernels(
    fewer_kernels, monkeypatch, setting: str, on_cpu: bool
) -> None:
    monkeypatch.setenv("DYNMOE_KERNELS", setting)
    monkeypatch.setattr(fewer_kernels.cpu, "is_installed", lambda: on_cpu)
    params = [torch.nn.Parameter(grad) for grad in gradients()]
    optimizer = fewer_kernels.with_fused_adam(torch.optim.AdamW)(params)
    is_fused = not (on_cpu and setting == "0")
    assert [bool(group["fused"]) for group in optimizer.param_groups] == [is_fused]


def test_a_fused_step_is_as_exact_as_pytorchs_loop_wherever_a_parameter_lies() -> None:
    """So that ranks which share an optimizer's state in other ways make the same steps."""
    settings = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    first, *gradients = torch.randn(11, 5003, generator=torch.Generator().manual_seed(0))

    def after_steps(dtype: torch.dtype, part: slice, fused: bool) -> torch.Tensor:
        param = torch.nn.Parameter(first[part].to(dtype, copy=True))
        optimizer = torch.optim.AdamW([param], fused=fused, **settings)
        for gradient in gradients:
            param.grad = gradient[part].to(dtype)
            optimizer.step()
        return param.detach()

    whole = slice(None)
    exact = after_steps(torch.float64, whole, fused=False)
    fused, loop = (after_steps(torch.float32, whole, fused) for fused in (True, False))
    assert not torch.equal(fused, loop)  # or DYNMOE_KERNELS=0 decides nothing
    errors = [(found - exact).abs().mean() for found in (fused, loop)]
    assert errors[0] < 1.1 * errors[1]
    for part in (slice(1, 2000), slice(8, 3011), slice(17, None)):
        assert torch.equal(after_steps(torch.float32, part, fused=True), fused[part])


@pytest.mark.parametrize("is_fused", [True, False])
def test_loading_does_not_change_how_steps_are_made(fewer_kernels, is_fused) -> None:
    def stepped(fused: bool) -> torch.optim.AdamW:
        params = [torch.nn.Parameter(grad) for grad in gradients()]
        optimizer = torch.optim.AdamW(params, fused=fused)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return optimizer

    optimizer = stepped(is_fused)
    optimizer.load_state_dict(stepped(not is_fused).state_dict())
    assert bool(optimizer.param_groups[0]["fused"]) is not is_fused
    fewer_kernels.keep_fused(optimizer)
    assert bool(optimizer.param_groups[0]["fused"]) is is_fused
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_upstream_calls_them(fewer_kernels) -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads

    from megatron_dynmoe.upstream import patches

    patches.install()
    assert clip_grads.l2_norm_impl is fewer_kernels.l2_norm
    assert clip_grads.multi_tensor_scale_impl is fewer_kernels.scale
    assert optimizer._get_megatron_optimizer_based_on_param_groups.__wrapped__
