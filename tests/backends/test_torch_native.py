"""The parts of the torch_native back end against upstream's local ones."""

import pytest
import torch

from tests.backends.model import config

pytestmark = pytest.mark.megatron

S, B = 6, 3


def assert_alike(ours, theirs, *inputs, rtol=1e-5, atol=1e-6):
    """Same outputs and gradients, by inputs and parameters."""
    results = []
    for module in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = module(*leaves)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        output.backward(direction.to(output.dtype))
        parameters = module.parameters() if isinstance(module, torch.nn.Module) else []
        gradients = [leaf.grad for leaf in leaves]
        results.append([output, *gradients, *(p.grad for p in parameters)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# --- attention -----------------------------------------------------------------------------------


def attentions(settings, layer_number=2):
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_dynmoe.backends.torch_native import ScaledDotProductAttention

    return [
        cls(
            config=config(attention_dropout=0.0, masked_softmax_fusion=False, **settings),
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
        )
        for cls in (ScaledDotProductAttention, DotProductAttention)
    ]


def padded_mask() -> torch.Tensor:
    """Causal; the last two positions of the second sequence are padding."""
    mask = torch.ones(S, S, dtype=torch.bool).triu(1).repeat(B, 1, 1, 1)
    mask[1, :, :, -2:] = True
    return mask


@pytest.mark.parametrize("mask", [None, padded_mask], ids=["causal", "mask"])
@pytest.mark.parametrize("value_size", [4, 12])
def test_heads_of_two_sizes_attend_as_in_local(value_size, mask):
    """Local's knows its output by the size of its heads, which are the values'."""
    ours, theirs = attentions({"kv_channels": value_size})
    ours.softmax_scale = theirs.softmax_scale = 0.3
    generator = torch.Generator().manual_seed(1)
    qkv = [torch.randn(S, B, 4, size, generator=generator) for size in (8, 8, value_size)]
    mask = mask and mask()
    assert_alike(lambda *qkv: ours(*qkv, mask), lambda *qkv: theirs(*qkv, mask), *qkv)


@pytest.mark.parametrize("mask", [None, padded_mask], ids=["causal", "mask"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_query_groups": 2},
        {"apply_query_key_layer_scaling": True},
        {"kv_channels": 12},  # not hidden size / heads
    ],
    ids=str,
)
def test_attention_is_locals(settings, mask):
    ours, theirs = attentions(settings)
    heads, groups = ours.config.num_attention_heads, ours.config.num_query_groups
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(S, B, number, ours.config.kv_channels, generator=generator)
        for number in (heads, groups, groups)
    )
    mask = mask and mask()
    assert_alike(lambda *qkv: ours(*qkv, mask), lambda *qkv: theirs(*qkv, mask), query, key, value)


def test_a_row_that_is_masked_whole_stays_finite():
    ours, _ = attentions({})
    mask = padded_mask()
    mask[2, :, 0] = True
    qkv = torch.randn(3, S, B, 4, 8, requires_grad=True)
    output = ours(*qkv, mask)
    output.sum().backward()
    assert output.isfinite().all()
    assert qkv.grad.isfinite().all()


def test_dropout_draws_from_the_trackers_generator():
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    ours, _ = attentions({})
    ours.attention_dropout.p = 0.5
    qkv = torch.randn(3, S, B, 4, 8)
    before = get_cuda_rng_tracker().get_states()
    default = torch.cuda.get_rng_state()
    first, second = ours(*qkv, None), ours(*qkv, None)
    assert not torch.equal(first, second)
    assert torch.equal(torch.cuda.get_rng_state(), default)
    get_cuda_rng_tracker().set_states(before)
    assert torch.equal(ours(*qkv, None), first)
    ours.eval()
    assert torch.equal(ours(*qkv, None), ours(*qkv, None))


def test_attention_refuses_packed_sequences():
    ours, _ = attentions({})
    with pytest.raises(ValueError, match="packed sequences"):
        ours(*torch.randn(3, S, B, 4, 8), None, packed_seq_params=object())


# --- norms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["", "eps matters"])
@pytest.mark.parametrize("shape", [(S, B, 32), (S, B, 4, 8)], ids=["hidden", "heads"])
def test_rms_norm_is_pytorchs(dtype, scale, shape):
    from megatron_dynmoe.backends.torch_native import native_norm

    ours = native_norm(config=config(), hidden_size=shape[-1], eps=1e-5).to(dtype)
    theirs = torch.nn.RMSNorm(shape[-1], eps=1e-5, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    for norm in (ours, theirs):
        norm.weight.data.copy_(torch.linspace(0.5, 2, shape[-1]))
    hidden = (scale * torch.randn(shape, generator=generator)).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_alike(ours, theirs, hidden, rtol=tolerance, atol=tolerance * max(1.0, 0.1 / scale))


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_are_marked_for_sequence_parallelism(normalization, sequence_parallel):
    from types import SimpleNamespace

    from megatron_dynmoe.backends.torch_native import native_norm

    settings = SimpleNamespace(normalization=normalization, sequence_parallel=sequence_parallel)
    norm = native_norm(config=settings, hidden_size=8, eps=1e-5)
    assert {p.sequence_parallel for p in norm.parameters()} == {sequence_parallel}


# --- in the model ---------------------------------------------------------------------------------


def test_the_spec_has_the_planned_modules():

    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_dynmoe.backends import torch_native
    from megatron_dynmoe.moe.experts import GroupedExperts
    from megatron_dynmoe.settings.config import DynMoEConfig
    from tests.moe import one_rank

    model = config(moe_layer_freq=[1, 0], softmax_type="off-by-one")
    spec = one_rank.prepared_spec(model, DynMoEConfig())
    sparse, dense = (layer.submodules for layer in spec.layer_specs)
    assert sparse.mlp.keywords["submodules"].experts is GroupedExperts
    for layer in (sparse, dense):
        assert layer.input_layernorm is torch_native.native_norm
        assert layer.self_attention.submodules.core_attention is DotProductAttention
        assert layer.self_attention.submodules.q_layernorm is IdentityOp
    assert spec.layer_norm is torch_native.native_norm
