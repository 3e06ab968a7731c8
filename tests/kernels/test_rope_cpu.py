"""Rotary embedding on a CPU has the bits of Megatron's, in every form that it takes."""

import pytest
import torch

pytestmark = pytest.mark.megatron

S, B, HEADS, WIDTH = 7, 3, 2, 8


def both():
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from megatron_dynmoe.upstream.shortcuts import rotating_halves

    theirs = getattr(_apply_rotary_pos_emb_bshd, "__wrapped__", _apply_rotary_pos_emb_bshd)
    return theirs, rotating_halves(theirs)


@pytest.mark.parametrize("angles_batch", [1, B])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"mscale": 1.3}], ids=str)
def test_values_and_gradients_have_megatrons_bits(angles_batch, dtype, settings) -> None:
    mixed = torch.randn(S, B, HEADS, 3 * WIDTH, dtype=dtype).requires_grad_()
    gradient = torch.randn(S, B, HEADS, WIDTH, dtype=dtype)
    angles = 100 * torch.randn(S, angles_batch, 1, WIDTH)
    before = angles.clone()
    found = []
    for rotate in both():
        rotated = rotate(mixed.split(WIDTH, dim=-1)[1], angles, **settings)
        found.append((rotated, *torch.autograd.grad(rotated, mixed, gradient)))
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs, ours) and theirs.dtype == ours.dtype
    assert torch.equal(angles, before)
    assert type(found[1][0].grad_fn).__name__ == "_RotateHalvesBackward"


@pytest.mark.parametrize(
    ("width", "settings"),
    [
        (WIDTH - 2, {}),  # the rest stays as it is
        (WIDTH, {"rotary_interleaved": True}),
        (WIDTH, {"mla_rotary_interleaved": True}),
    ],
    ids=str,
)
def test_other_forms_are_left_to_megatron(width, settings) -> None:
    values, angles = torch.randn(S, B, HEADS, WIDTH), torch.randn(S, 1, 1, width)
    theirs, ours = (rotate(values, angles, **settings) for rotate in both())
    assert torch.equal(theirs, ours)


def test_values_with_fewer_dimensions_than_the_angles_are_left_to_megatron() -> None:
    """Megatron 0.19 fails; later ones take a dimension of the angles away."""
    from megatron_dynmoe.kernels.rope_cpu import rotates_all

    values, angles = torch.randn(S, B, WIDTH), torch.randn(S, 1, 1, WIDTH)
    assert rotates_all(values.unsqueeze(1), angles)
    assert not rotates_all(values, angles)


def test_megatron_calls_it() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    from tests.moe.one_rank import megatron_on_cpu

    megatron_on_cpu()
    assert rope_utils._apply_rotary_pos_emb_bshd.__wrapped__
