"""torch_native's attention and RMSNorm against their formulas in float64."""

import math

import pytest
import torch

from megatron_dynmoe.backends.torch_native import ScaledDotProductAttention, native_norm
from tests.backends.model import config
from tests.gpu.stand_in import ON_GPU
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.megatron

S, B, HEADS, WIDTH = (300, 2, 8, 64) if ON_GPU else (7, 2, 4, 8)
# Of the largest value of a tensor. A GPU's fused attention may take a float32 product apart.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

either_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16"])


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype).requires_grad_()


def assert_same(function, formula, *leaves: torch.Tensor) -> None:
    """Outputs and gradients."""
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got, want = function(*leaves), formula(*doubles)
    direction = torch.randn(got.shape).to(DEVICE, got.dtype)
    got.backward(direction)
    want.backward(direction.double())
    pairs = [(got, want)] + [(a.grad, b.grad) for a, b in zip(leaves, doubles, strict=True)]
    for one, other in pairs:
        tolerance = TOLERANCES[got.dtype] * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("groups", "value_width", "lengths"),
    [
        (HEADS, WIDTH, None),
        (2, WIDTH, None),
        (HEADS, WIDTH // 2, None),  # as in latent attention
        (2, WIDTH, [S - 2, 2, 1, S - 1]),  # documents of two rows
    ],
    ids=["", "groups", "two sizes", "documents"],
)
@either_dtype
def test_attention_is_causal_and_softmax_of_products(dtype, groups, value_width, lengths):
    from megatron.core.transformer.enums import AttnMaskType

    settings = {"hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS}
    attention = ScaledDotProductAttention(
        config=config(attention_dropout=0.0, num_query_groups=groups, **settings),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
    )
    ends = torch.tensor(lengths or [S] * B).cumsum(0)
    document = torch.searchsorted(ends, torch.arange(B * S), right=True).view(B, 1, S)
    others = (document.mT != document).unsqueeze(1).to(DEVICE)

    def formula(query, key, value):
        key, value = (x.repeat_interleave(HEADS // groups, dim=2) for x in (key, value))
        scores = torch.einsum("sbnh,tbnh->bnst", query, key) / math.sqrt(WIDTH)
        later = torch.ones(S, S, dtype=torch.bool, device=DEVICE).triu(1)
        probs = scores.masked_fill(later | others, -math.inf).softmax(-1)
        return torch.einsum("bnst,tbnh->sbnh", probs, value).flatten(2)

    sizes = (HEADS, WIDTH), (groups, WIDTH), (groups, value_width)
    leaves = [leaf(S, B, *size, dtype=dtype) for size in sizes]
    given = lengths and torch.tensor(lengths)
    assert_same(lambda *qkv: attention(*qkv, given), formula, *leaves)


@either_dtype
def test_rms_norm_divides_by_the_root_of_the_mean_square(dtype):
    norm = native_norm(config=config(), hidden_size=WIDTH, eps=1e-5).to(DEVICE, dtype)

    def ours(hidden, weight):
        return torch.func.functional_call(norm, {"weight": weight}, hidden)

    def formula(hidden, weight):
        return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    assert_same(ours, formula, leaf(S, B, WIDTH, dtype=dtype), leaf(WIDTH, dtype=dtype))
