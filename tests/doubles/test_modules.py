"""Linear layers, norms, attention and rotary embeddings of Transformer Engine."""

import contextlib

import pytest
import torch

SPLITS = [[3, 0, 4], [0, 7, 0], [0, 0, 0]]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """With parameters that no two of which are alike."""
    for seed, parameter in enumerate(module.parameters()):
        parameter.data.copy_(numbers(*parameter.shape, seed=10 + seed))
    return module


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    direction = numbers(*output.shape, seed=5).to(output.device, output.dtype)
    return list(torch.autograd.grad(output, inputs, direction))


def oracle_norm(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
    hidden, weight = hidden.double(), weight.double()
    if bias is not None:
        hidden = hidden - hidden.mean(-1, keepdim=True)
    out = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    return out if bias is None else out + bias.double()


# --- linear layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [5, 0])
def test_linear(te, device, close, num_rows):
    layer = filled(te.Linear(8, 6, bias=False, device=device))
    assert dict(layer.named_parameters()).keys() == {"weight"}
    inp = numbers(num_rows, 2, 8).to(device).requires_grad_()
    output = layer(inp)
    d_inp, d_weight = gradients(output, inp, layer.weight)
    expected = inp.double() @ layer.weight.double().t()
    direction = numbers(*output.shape, seed=5).double().to(device)
    close(output, expected)
    close(d_inp, direction @ layer.weight.double())
    close(d_weight, torch.einsum("sbo,sbi->oi", direction, inp.double()))


def test_a_bias_that_is_returned_is_not_added(te, device, close):
    layer = filled(te.Linear(8, 6, return_bias=True, device=device))
    inp = numbers(3, 8).to(device)
    output, bias = layer(inp)
    assert bias is layer.bias
    close(output, inp.double() @ layer.weight.double().t())


def test_a_norm_before_a_linear_layer_is_in_its_module(te, device, close):
    layer = filled(te.LayerNormLinear(8, 6, bias=False, normalization="RMSNorm", device=device))
    assert [name for name, _ in layer.named_parameters()] == ["layer_norm_weight", "weight"]
    inp = numbers(3, 2, 8).to(device).requires_grad_()
    output = layer(inp)
    expected = oracle_norm(inp, layer.layer_norm_weight) @ layer.weight.double().t()
    close(output, expected)
    for ours, theirs in zip(
        gradients(output, inp, layer.layer_norm_weight, layer.weight),
        gradients(expected, inp, layer.layer_norm_weight, layer.weight),
        strict=True,
    ):
        close(ours, theirs)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_grouped_linear(te, device, close, splits, as_tensor):
    layer = filled(te.GroupedLinear(3, 8, 6, bias=False, device=device))
    assert [name for name, _ in layer.named_parameters()] == ["weight0", "weight1", "weight2"]
    inp = numbers(sum(splits), 8).to(device).requires_grad_()
    output = layer(inp, torch.tensor(splits) if as_tensor else splits)
    weights = list(layer.parameters())
    groups = zip(inp.double().split(splits), weights, strict=True)
    close(output, torch.cat([rows @ weight.double().t() for rows, weight in groups]))
    d_inp, *d_weights = gradients(output, inp, *weights)
    rows = zip(
        inp.detach().split(splits), numbers(*output.shape, seed=5).split(splits), strict=True
    )
    for d_weight, (group, direction) in zip(d_weights, rows, strict=True):
        close(d_weight, direction.double().t() @ group.double().cpu())
        assert len(group) or not d_weight.any()  # zero, and not missing
    assert d_inp.shape == inp.shape


def test_counts_have_to_fit(te, device):
    layer = te.GroupedLinear(3, 8, 6, bias=False, device=device)
    inp = numbers(7, 8).to(device)
    with pytest.raises(ValueError, match="does not match number of GEMMs"):
        layer(inp, [3, 4])
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        layer(inp, [3, 3, 3])


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_go_into_main_grad(te, device, close, grouped):
    """The first micro-batch of a step replaces what is there, later ones add to it."""
    arguments = {"bias": False, "device": device, "fuse_wgrad_accumulation": True}
    layer = te.GroupedLinear(1, 8, 6, **arguments) if grouped else te.Linear(8, 6, **arguments)
    (weight,) = filled(layer).parameters()
    inp = numbers(5, 8).to(device)
    weight.main_grad = torch.full_like(weight, 7.0)
    weight.grad_added_to_main_grad = False
    expected = torch.ones(5, 6).double().t() @ inp.double().cpu()
    for first, total in ((True, expected), (False, 2 * expected)):
        splits = ([5],) if grouped else ()
        layer(inp, *splits, is_first_microbatch=first).sum().backward()
        close(weight.main_grad, total)
        assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape  # a dummy


def test_input_and_weights_are_of_one_type(te, device):
    layer = te.Linear(8, 6, params_dtype=torch.bfloat16, device=device)
    with pytest.raises(TypeError, match="Data types for parameters must match"):
        layer(numbers(3, 8).to(device))


@pytest.mark.parametrize("kind", ["Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm"])
def test_the_state_of_low_precision_is_empty(te, device, kind):
    sizes = {"RMSNorm": (8,), "GroupedLinear": (2, 8, 6)}.get(kind, (8, 6))
    module = getattr(te, kind)(*sizes, device=device)
    state = module.state_dict()
    assert state["_extra_state"].dtype == torch.uint8 and not state["_extra_state"].numel()
    module.load_state_dict({**state, "_extra_state": None})  # of a checkpoint of other layers


def test_weights_are_drawn_in_a_fork_and_constants_are_not(te, device):
    forks = []

    class Tracker:
        @contextlib.contextmanager
        def fork(self, name="default"):
            forks.append(name)
            yield

    kwargs = {
        "device": device,
        "get_rng_state_tracker": Tracker,
        "init_method": lambda w: w.fill_(3),
    }
    layer = te.LayerNormLinear(8, 6, **kwargs)
    assert forks == ["default"]
    assert layer.weight.eq(3).all() and layer.layer_norm_weight.eq(1).all()
    te.GroupedLinear(2, 8, 6, bias=False, rng_tracker_name="experts", **kwargs)
    assert forks == ["default", "experts", "experts"]


# --- norms and activations -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms(te, device, close, kind, zero_centered):
    norm = filled(getattr(te, kind)(8, zero_centered_gamma=zero_centered, device=device))
    inp = numbers(5, 3, 8).to(device).requires_grad_()
    expected = oracle_norm(inp, norm.weight + zero_centered, getattr(norm, "bias", None))
    close(norm(inp), expected)
    parameters = list(norm.parameters())
    for ours, theirs in zip(
        gradients(norm(inp), inp, *parameters), gradients(expected, inp, *parameters), strict=True
    ):
        close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_are_marked_for_sequence_parallelism(te, device, sequence_parallel):
    norm = te.RMSNorm(8, sequence_parallel=sequence_parallel, device=device)
    assert norm.weight.sequence_parallel is sequence_parallel


def test_the_first_half_gates(te, device, close):
    inp = numbers(5, 12).to(device)
    gate, up = inp.double().chunk(2, dim=-1)
    close(te.ops.SwiGLU()(inp), torch.nn.functional.silu(gate) * up)


# --- attention -----------------------------------------------------------------------------------


def attend(te, device, dtype, mask, groups=4):
    attention = te.DotProductAttention(4, 16, num_gqa_groups=groups)
    heads = {"query": 4, "key": groups, "value": groups}
    qkv = [numbers(32, 2, n, 16, seed=i).to(device, dtype) for i, n in enumerate(heads.values())]
    output = attention(*qkv, attention_mask=mask, attn_mask_type="causal")
    q, k, v = (part.double() for part in qkv)
    k, v = (part.repeat_interleave(4 // groups, dim=2) for part in (k, v))
    scores = torch.einsum("sbnh,tbnh->bnst", q, k) / 4
    return output, scores, v


def oracle_attention(scores, masked, v):
    probs = scores.masked_fill(masked, -torch.inf).softmax(dim=-1)
    return torch.einsum("bnst,tbnh->sbnh", probs, v).flatten(2)


LATER = torch.ones(32, 32, dtype=torch.bool).triu(1)
# Two documents, the second of which begins at 20.
APART = LATER | (torch.arange(32) < 20).unsqueeze(0) & (torch.arange(32) >= 20).unsqueeze(1)


@pytest.mark.parametrize("groups", [4, 2])
def test_attention_is_causal(te, device, close, groups):
    output, scores, v = attend(te, device, torch.float32, None, groups)
    close(output, oracle_attention(scores, LATER.to(device), v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_beside_the_causal_type_is_read_in_float32_only(te, device, close, dtype):
    """Which is why ``--reset-attention-mask`` is refused."""
    mask = APART.to(device).expand(2, 1, 32, 32)
    output, scores, v = attend(te, device, dtype, mask)
    read = APART if dtype == torch.float32 else LATER
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    close(output, oracle_attention(scores, read.to(device), v), **tolerance)


def test_rotary_embeddings(te, device, close):
    rotate = te.attention.rope.apply_rotary_pos_emb
    t = numbers(6, 2, 3, 8).to(device)
    angles = torch.arange(6.0).view(6, 1, 1, 1) * torch.tensor([1.0, 0.1])
    output = rotate(t, torch.cat((angles, angles), -1).to(device), tensor_format="sbhd", fused=True)
    turned = torch.complex(t[..., :2].cpu(), t[..., 2:4].cpu()) * torch.exp(1j * angles)
    close(output[..., :4], torch.cat((turned.real, turned.imag), dim=-1))
    assert torch.equal(output[..., 4:], t[..., 4:])
    with pytest.raises(RuntimeError, match="Dtype of the freqs"):
        rotate(t, angles.double().to(device), tensor_format="sbhd", fused=True)
