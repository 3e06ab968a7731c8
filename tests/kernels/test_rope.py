"""Rotary embedding in one kernel, against Megatron's in float64."""

from types import SimpleNamespace

import pytest
import torch

from tests.kernels.device import DEVICE

pytest.importorskip("triton")
from megatron_dynmoe.kernels.rope import rotate

pytestmark = [pytest.mark.triton, pytest.mark.megatron]

S, B = 5, 3


def megatrons(values: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    return _apply_rotary_pos_emb_bshd(values, angles, rotary_interleaved=interleaved)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "width", "rotated", "angles_batch"),
    [(4, 8, 8, 1), (1, 2, 2, 1), (3, 10, 6, 1), (2, 64, 16, B), (33, 128, 128, 1), (1, 7, 4, 1)],
)
def test_values_and_gradients_are_megatrons(
    heads: int, width: int, rotated: int, angles_batch: int, interleaved: bool
) -> None:
    values, gradient = drawn(S, B, heads, width), drawn(S, B, heads, width, seed=1)
    angles = 100 * drawn(S + 2, angles_batch, 1, rotated, seed=2).float()
    exact = values.clone().requires_grad_()
    expected = megatrons(exact, angles[:S].double(), interleaved)
    expected.backward(gradient)

    ours = values.float().to(DEVICE).requires_grad_()
    got = rotate(ours, angles.to(DEVICE), interleaved)
    got.backward(gradient.float().to(DEVICE))
    assert got.is_contiguous() and got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_parts_of_one_projection_are_taken_as_they_lie() -> None:
    """Queries, keys and values come from one matrix, and are no tensors of their own."""
    mixed = drawn(S, B, 2, 3 * 8).float().to(DEVICE)
    query = mixed.split(8, dim=-1)[1]
    angles = drawn(S, 1, 1, 8, seed=2).float().to(DEVICE)
    assert not query.is_contiguous()
    assert torch.equal(rotate(query, angles), rotate(query.contiguous(), angles))


def test_bf16_is_rounded_once() -> None:
    values = drawn(S, B, 2, 8).bfloat16()
    angles = drawn(S, 1, 1, 8, seed=2).float()
    expected = megatrons(values.double(), angles.double(), False).bfloat16()
    got = rotate(values.to(DEVICE), angles.to(DEVICE)).cpu()
    # One unit in the last place, because Triton's interpreter cuts off and does not round.
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("shape", [(S - 1, 1, 1, 8), (S, 2, 1, 8), (S, 1, 1, 10), (S, 1, 1, 3)])
def test_angles_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        rotate(torch.zeros(S, B, 2, 8, device=DEVICE), torch.zeros(shape, device=DEVICE))


def test_megatron_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it calls Transformer Engine's, so that the signature fits."""
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_dynmoe.upstream.fewer_kernels import rotation

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", rotation(None))
    config = SimpleNamespace(apply_rope_fusion=True, mrope_section=None, rotary_interleaved=False)
    values, angles = drawn(S, B, 2, 8).float(), drawn(S, 1, 1, 8, seed=2).float()
    rotated = rope_utils.apply_rotary_pos_emb(
        values.to(DEVICE), angles.to(DEVICE), config, cp_group=SimpleNamespace()
    )
    torch.testing.assert_close(rotated.cpu(), megatrons(values, angles, False))
