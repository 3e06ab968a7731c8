"""DynMoELayer on one rank against a loop over tokens and experts: outputs and every gradient."""

import dataclasses

import pytest
import torch

from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank
from tests.oracles import routing as oracle

pytestmark = pytest.mark.megatron

S, B, D, E = 5, 2, 8, 4
TOP_P = DynMoEConfig(
    routing="top_p", threshold=0.6, balance_loss_coeff=0, dynamic_loss_coeff=0, weights="raw"
)
DTOP_P = DynMoEConfig(
    routing="dtop_p", target_experts_per_token=2, balance_loss_coeff=0, dynamic_loss_coeff=0
)


def random_map() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    routing_map = torch.rand(S * B, E, generator=generator) < 0.5
    routing_map[:, 2] |= ~routing_map.any(dim=-1)
    assert len(set(routing_map.sum(-1).tolist())) > 2
    return routing_map


def all_to_one() -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.full((S * B,), 2), E).bool()


def an_expert_without_tokens() -> torch.Tensor:
    routing_map = random_map()
    routing_map[:, 1] = False
    routing_map[:, 0] |= ~routing_map.any(dim=-1)
    return routing_map


def all_to_all() -> torch.Tensor:
    return torch.ones(S * B, E, dtype=torch.bool)


def one_token() -> torch.Tensor:
    return torch.tensor([[True, False, True, True]])


MAPS = [random_map, all_to_one, an_expert_without_tokens, all_to_all, one_token]


def hidden_states(tokens: int) -> torch.Tensor:
    """[S, B, D], or one token."""
    generator = torch.Generator().manual_seed(11)
    shape = (1, 1, D) if tokens == 1 else (S, B, D)
    return torch.randn(shape, generator=generator)


def force(monkeypatch, routing_map: torch.Tensor) -> None:
    """Route by this map; weights, gate and losses stay the router's own."""
    monkeypatch.setenv("DYNMOE_KERNELS", "0")
    monkeypatch.setattr("megatron_dynmoe.routing.route.select", lambda *_: routing_map)


def doubles(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters as float64 leaves, by name."""
    return {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in module.named_parameters()
    }


def gated_mlp(parameters: dict[str, torch.Tensor], name: str):
    """A function of one token [D]: fc2(silu(gate) * up), with (gate; up) = fc1."""
    if name.startswith("experts.") and "experts.weight1" in parameters:
        expert = int(name.rpartition(".")[2])
        fc1, fc2 = (parameters[f"experts.weight{i}"][expert] for i in (1, 2))
    else:
        fc1, fc2 = (parameters[f"{name}.linear_fc{i}.weight"] for i in (1, 2))

    def apply(hidden_D: torch.Tensor) -> torch.Tensor:
        gate, up = (fc1 @ hidden_D).chunk(2)
        return fc2 @ (torch.nn.functional.silu(gate) * up)

    return apply


def looped_layer(parameters, hidden_SBD, choices, dynmoe: DynMoEConfig) -> torch.Tensor:
    """The layer written out; float64."""
    hidden_TD = hidden_SBD.view(-1, D)
    num_experts = parameters["router.weight"].shape[0]
    experts = [
        gated_mlp(parameters, f"experts.local_experts.{expert}") for expert in range(num_experts)
    ]
    weights = []
    for hidden_D, choice in zip(hidden_TD, choices, strict=True):
        logits = list(parameters["router.weight"] @ hidden_D)
        if dynmoe.is_controlled:
            logits = oracle.normalize(logits, 1 + parameters["router.theta_offset"][0])
        probs = oracle.softmax(logits)
        weights.append(oracle.weights(probs, choice, renormalize=dynmoe.is_controlled))
    output_TD = oracle.moe(hidden_TD, weights, choices, experts)
    if any(name.startswith("shared_experts") for name in parameters):
        shared = gated_mlp(parameters, "shared_experts")
        output_TD = output_TD + torch.stack([shared(hidden_D) for hidden_D in hidden_TD])
    return output_TD.view_as(hidden_SBD)


def assert_equals_loops(layer, hidden: torch.Tensor, routing_map, dynmoe: DynMoEConfig) -> None:
    parameters = doubles(layer)
    hidden_64 = hidden.double().requires_grad_()
    want = looped_layer(parameters, hidden_64, oracle.choices_of(routing_map), dynmoe)

    hidden = hidden.clone().requires_grad_()
    got, bias = layer(hidden)
    assert bias is None
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)

    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    got.backward(direction)
    want.backward(direction.double())
    torch.testing.assert_close(hidden.grad.double(), hidden_64.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in layer.named_parameters():
        expected = parameters[name].grad
        if expected is None or parameter.grad is None:
            # Of an expert without tokens: no gradient, or one of zeros.
            for gradient in (expected, parameter.grad):
                assert gradient is None or not gradient.any(), name
            continue
        torch.testing.assert_close(
            parameter.grad.double(), expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("backend", ["local", "torch_native"])
@pytest.mark.parametrize("shared", [None, 6], ids=["", "shared"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("dynmoe", [TOP_P, DTOP_P], ids=["top_p", "dtop_p"])
@pytest.mark.parametrize("make_map", MAPS)
def test_equals_a_loop_over_tokens_and_experts(
    monkeypatch, make_map, dynmoe, dispatcher, shared, backend
):
    dynmoe = dataclasses.replace(dynmoe, backend=backend)
    layer = one_rank.moe_layer(
        dynmoe,
        num_experts=E,
        moe_token_dispatcher_type=dispatcher,
        moe_shared_expert_intermediate_size=shared,
    )
    routing_map = make_map()
    force(monkeypatch, routing_map)
    assert_equals_loops(layer, hidden_states(len(routing_map)), routing_map, dynmoe)


def test_shared_experts_overlapped_with_the_dispatch(monkeypatch):
    layer = one_rank.moe_layer(
        TOP_P,
        num_experts=E,
        moe_shared_expert_intermediate_size=6,
        moe_shared_expert_overlap=True,
    )
    force(monkeypatch, random_map())
    assert layer.token_dispatcher.shared_experts is layer.shared_experts
    assert_equals_loops(layer, hidden_states(S * B), random_map(), TOP_P)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_routes_by_its_own_threshold_without_being_forced(dispatcher):
    layer = one_rank.moe_layer(TOP_P, num_experts=E, moe_token_dispatcher_type=dispatcher)
    hidden = hidden_states(S * B)
    _, routing_map = layer.router(hidden)
    assert len(set(routing_map.sum(-1).tolist())) > 1
    assert_equals_loops(layer, hidden, routing_map, TOP_P)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_threshold_of_one_uses_all_experts(dispatcher):
    dynmoe = DynMoEConfig(routing="top_p", threshold=1)
    layer = one_rank.moe_layer(dynmoe, num_experts=E, moe_token_dispatcher_type=dispatcher)
    hidden = hidden_states(S * B)
    output, _ = layer(hidden)
    probs = (hidden.view(-1, D) @ layer.router.weight.T).softmax(-1)
    parameters = dict(layer.named_parameters())
    experts = [gated_mlp(parameters, f"experts.local_experts.{e}") for e in range(E)]
    dense = torch.stack(
        [
            sum(prob * expert(token_D) for prob, expert in zip(row, experts, strict=True))
            for row, token_D in zip(probs, hidden.view(-1, D), strict=True)
        ]
    )
    torch.testing.assert_close(output.view(-1, D), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize(
    "dynmoe",
    [TOP_P, DynMoEConfig(routing="dtop_p", target_experts_per_token=1)],
    ids=["top_p", "dtop_p"],
)
def test_one_expert_is_a_dense_mlp(dynmoe, dispatcher):
    layer = one_rank.moe_layer(dynmoe, num_experts=1, moe_token_dispatcher_type=dispatcher)
    hidden = hidden_states(S * B)
    output, _ = layer(hidden)
    output.sum().backward()
    mlp = gated_mlp(dict(layer.named_parameters()), "experts.local_experts.0")
    dense = torch.stack([mlp(hidden_D) for hidden_D in hidden.view(-1, D)])
    torch.testing.assert_close(output.view(-1, D), dense, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_stock_megatron_cannot_route_a_varying_number_of_experts(monkeypatch):
    """When this fails, upstream has learned it, and our dispatcher can go."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    layer = one_rank.moe_layer(TOP_P, num_experts=E)
    hidden, routing_map = hidden_states(S * B), random_map()
    force(monkeypatch, routing_map)
    want = looped_layer(
        doubles(layer), hidden.double(), oracle.choices_of(routing_map), TOP_P
    ).detach()
    ours, _ = layer(hidden)
    torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-5)
    layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
        layer.num_local_experts,
        layer.local_expert_indices,
        config=layer.config,
        pg_collection=get_default_pg_collection(),
    )
    try:
        output, _ = layer(hidden)
    except Exception:
        return
    assert not torch.allclose(output.double(), want, rtol=1e-3, atol=1e-3), (
        "upstream's all-to-all dispatcher now fits a routing map with a varying number of "
        "experts: VariableKAlltoAllTokenDispatcher may no longer be needed"
    )
