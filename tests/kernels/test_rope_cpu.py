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


@pytest.mark.parametrize("length", [1, S])
def test_the_input_stays_as_it_is(length: int) -> None:
    """With one position, or one sequence and head, the order by head is that of the memory."""
    from megatron_dynmoe.kernels.rope_cpu import rotate_halves

    for shape in ((length, B, HEADS, WIDTH), (length, 1, 1, WIDTH)):
        values = torch.randn(shape).requires_grad_()
        gradient, angles = torch.randn(shape), torch.randn(length, 1, 1, WIDTH)
        before = values.detach().clone(), gradient.clone()
        rotate_halves(values, angles).backward(gradient)
        assert torch.equal(values, before[0]) and torch.equal(gradient, before[1])


def test_waves_are_those_of_the_angles_as_they_are_now() -> None:
    from megatron_dynmoe.kernels import rope_cpu

    theirs, ours = both()
    values, angles = torch.randn(S, B, HEADS, WIDTH), torch.randn(S, 1, 1, WIDTH)
    for mscale in (1.0, 1.3):
        assert torch.equal(
            theirs(values, angles, mscale=mscale), ours(values, angles, mscale=mscale)
        )
    assert torch.equal(theirs(values.double(), angles), ours(values.double(), angles))
    angles.add_(1)
    assert torch.equal(theirs(values, angles), ours(values, angles))
    number = len(rope_cpu._WAVES)
    del angles
    assert len(rope_cpu._WAVES) == number - 1


def test_a_training_takes_angles_and_waves_of_an_inference() -> None:
    theirs, ours = both()
    with torch.inference_mode():
        within = torch.randn(S, 1, 1, WIDTH)
    for angles in (within, torch.randn(S, 1, 1, WIDTH)):
        with torch.inference_mode():
            ours(torch.randn(S, B, HEADS, WIDTH), angles)
        values = torch.randn(S, B, HEADS, WIDTH, requires_grad=True)
        rotated = ours(values, angles)
        assert torch.equal(rotated, theirs(values, angles.clone()))
        rotated.sum().backward()


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
