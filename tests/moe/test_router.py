"""DynamicRouter inside real Megatron, on one rank."""

import pytest
import torch

from megatron_dynmoe.routing.counters import clear
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank
from tests.oracles import routing as oracle

pytestmark = pytest.mark.megatron

S, B, D, E = 6, 3, 8, 4


@pytest.fixture(autouse=True)
def megatron():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()


def top_p(**settings) -> DynMoEConfig:
    defaults = {"threshold": 0.6, "balance_loss_coeff": 0, "dynamic_loss_coeff": 0}
    return DynMoEConfig(routing="top_p", **(defaults | settings))


def hidden_states(seed: int = 0, sequences: int = B) -> torch.Tensor:
    return torch.randn(S, sequences, D, generator=torch.Generator().manual_seed(seed))


def padding() -> torch.Tensor:
    """[S, B], True for padding: sequences of length 6, 4 and 1."""
    return torch.arange(S).unsqueeze(-1) >= torch.tensor([6, 4, 1])


def logits_and_map(router, hidden):
    """What reaches and what leaves ``routing``."""
    seen = {}
    routing = router.routing

    def spy(logits, padding_mask=None):
        seen["logits"] = logits
        return routing(logits, padding_mask)

    router.routing = spy
    _, routing_map = router(hidden)
    router.routing = routing
    return seen["logits"], routing_map


# --- gate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_routes_in_float32_whatever_the_models_dtype(dtype):
    router = one_rank.router(top_p()).to(dtype)
    hidden = hidden_states().to(dtype)
    logits, _ = logits_and_map(router, hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ router.weight.float().T)
    weights, routing_map = router(hidden)
    assert weights.dtype == torch.float32
    assert routing_map.dtype == torch.bool


def test_jitter_is_applied_to_the_gates_input():
    router = one_rank.router(top_p(), moe_input_jitter_eps=0.1)
    hidden = hidden_states()
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))
    logits, _ = logits_and_map(router, hidden)
    ratio = logits / hidden[..., :E]
    assert ratio.min() > 0.899
    assert ratio.max() < 1.101
    assert ratio.std() > 0.03


@pytest.mark.parametrize("padded", [False, True])
def test_z_loss_is_upstreams_on_the_raw_logits_without_padding(padded):
    """Upstream's docstrings say both; its z-loss takes True for padding, as we do."""
    dynmoe = DynMoEConfig(
        routing="dtop_p", target_experts_per_token=2, balance_loss_coeff=0, dynamic_loss_coeff=0
    )
    router = one_rank.router(dynmoe, moe_z_loss_coeff=0.1)
    hidden = hidden_states()
    weights, _ = router(hidden, padding() if padded else None)
    (0 * weights).sum().backward()

    weight = router.weight.detach().clone().requires_grad_()
    logits = hidden.view(-1, D) @ weight.T
    if padded:
        logits = logits[~padding().view(-1)]
    (0.1 * torch.logsumexp(logits, dim=-1).square().mean()).backward()
    torch.testing.assert_close(router.weight.grad, weight.grad)


# --- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 2])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_weights_and_map_follow_the_loops(normalized, renormalize, cap):
    dynmoe = top_p(
        normalization="drn" if normalized else "none",
        weights="renormalized" if renormalize else "raw",
        max_experts_per_token=cap,
    )
    router = one_rank.router(dynmoe).double()
    router.config.moe_router_dtype = "fp64"
    hidden = hidden_states().double()
    if normalized:
        torch.nn.init.constant_(router.theta_offset, 0.5)
    weights, routing_map = router(hidden)
    for t, token in enumerate(hidden.view(-1, D)):
        logits = list((router.weight @ token).detach())
        if normalized:
            logits = oracle.normalize(logits, 1.5)
        probs = [prob.item() for prob in oracle.softmax(logits)]
        selected = oracle.algorithm_1(probs, router.threshold.item(), cap)
        assert oracle.choices_of(routing_map[t : t + 1]) == [selected]
        want = oracle.weights(probs, selected, renormalize)
        torch.testing.assert_close(weights[t], torch.tensor(want, dtype=torch.float64))


def test_thresholds_of_zero_and_one():
    for threshold, experts in [(0, 1), (1, E)]:
        _, routing_map = one_rank.router(top_p(threshold=threshold))(hidden_states())
        assert (routing_map.sum(-1) == experts).all()


def test_evaluation_has_its_own_threshold_and_cap_where_they_are_set():
    router = one_rank.router(
        top_p(threshold=0, inference_threshold=1, inference_max_experts_per_token=3)
    )
    hidden = hidden_states()
    assert (router(hidden)[1].sum(-1) == 1).all()
    router.eval()
    assert (router(hidden)[1].sum(-1) == 3).all()

    router = one_rank.router(top_p(threshold=1, max_experts_per_token=2)).eval()
    assert (router(hidden)[1].sum(-1) == 2).all()


def test_the_threshold_in_force_is_the_buffers():
    router = one_rank.router(top_p())
    router.threshold.fill_(1.0)
    assert router(hidden_states())[1].all()


@pytest.mark.parametrize("normalization", ["none", "drn"])
def test_one_expert(normalization):
    router = one_rank.router(
        top_p(normalization=normalization, balance_loss_coeff=1, dynamic_loss_coeff=1),
        num_experts=1,
    )
    weights, routing_map = router(hidden_states())
    assert routing_map.all()
    torch.testing.assert_close(weights, torch.ones(S * B, 1))
    weights.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())
    assert router.counters.sums.balance_loss == pytest.approx(1)
    assert router.counters.sums.dynamic_loss == pytest.approx(0)


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_counts(padded):
    router = one_rank.router(top_p(max_experts_per_token=2))
    maps = []
    for seed in (0, 1):
        mask = padding() if padded else None
        _, routing_map = router(hidden_states(seed), mask)
        maps.append(routing_map[~mask.view(-1)] if padded else routing_map)
    counted = torch.cat(maps)
    counters, experts = router.counters, counted.sum(-1)
    assert counters.sums.tokens == len(counted) == (2 * 11 if padded else 2 * S * B)
    assert counters.sums.assignments.tolist() == counted.sum(0).tolist()
    assert counters.sums.squared_experts == experts.square().sum()
    assert counters.sums.tokens_at_cap == (experts == 2).sum() > 0
    assert counters.sums.micro_batches == 2
    assert router.evaluation_counters.sums.tokens == 0
    clear([counters])
    assert not counters.row.any()


def test_without_gradients_nothing_is_counted():
    router = one_rank.router(top_p())
    with torch.no_grad():
        router(hidden_states())
    assert router.counters.sums.tokens == router.evaluation_counters.sums.tokens == 0


def test_evaluation_is_counted_apart():
    router = one_rank.router(top_p()).eval()
    with torch.no_grad():
        _, routing_map = router(hidden_states())
    assert router.counters.sums.tokens == 0
    assert router.counters.sums.micro_batches == 0
    assert router.evaluation_counters.sums.tokens == S * B
    assert router.evaluation_counters.sums.assignments.tolist() == routing_map.sum(0).tolist()


def test_recomputation_counts_once_and_gives_the_same_gradients():
    from megatron.core import tensor_parallel

    gradients = []
    for recompute in (False, True):
        router = one_rank.router(top_p(balance_loss_coeff=0.1, dynamic_loss_coeff=0.1))
        with torch.no_grad():
            router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(4)))
        hidden = hidden_states().requires_grad_()
        if recompute:
            weights = tensor_parallel.checkpoint(lambda h, r=router: r(h)[0], False, hidden)
        else:
            weights, _ = router(hidden)
        weights.square().sum().backward()
        assert router.counters.sums.tokens == S * B
        assert router.counters.sums.micro_batches == 1
        gradients.append((router.weight.grad, hidden.grad))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_upstreams_recomputation_of_the_moe_layer_counts_once():
    layer = one_rank.moe_layer(
        top_p(), recompute_granularity="selective", recompute_modules=["moe"]
    )
    assert layer.moe_layer_recompute
    output, _ = layer(hidden_states().requires_grad_())
    output.sum().backward()
    assert layer.router.counters.sums.tokens == S * B


def test_the_layers_padding_mask_reaches_the_router_the_right_way_round():
    """MoELayer takes [B, S], True for padding."""
    layer = one_rank.moe_layer(top_p())
    layer(hidden_states(), padding_mask=padding().T)
    assert layer.router.counters.sums.tokens == 11


# --- state ----------------------------------------------------------------------------------------

CASTS = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "to": lambda module: module.to(torch.bfloat16),
    "to_device_and_dtype": lambda module: module.to("cpu", torch.float16),
    "double": lambda module: module.double(),
    "half_and_back": lambda module: module.half().float(),
}


def full_state(router) -> dict[str, torch.Tensor]:
    """A router with a state that bf16 and fp16 cannot hold."""
    router.threshold.fill_(0.2374)
    router.integral.fill_(-3.14159)
    router.counters.sums.assignments.fill_(2**40 + 1)
    router.counters.sums.balance_loss.fill_(1 / 3)
    return {name: buffer.clone() for name, buffer in router.named_buffers()}


@pytest.mark.parametrize("cast", CASTS)
def test_state_keeps_dtype_and_value_when_the_model_is_cast(cast):
    router = one_rank.router(top_p(normalization="drn"))
    before = full_state(router)
    assert before["threshold"].dtype == before["integral"].dtype == torch.float32
    assert before["counters.row"].dtype == torch.float64
    CASTS[cast](router)
    for name, buffer in router.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_state_keeps_dtype_and_value_in_float16module(dtype):
    from megatron.core.transformer.module import Float16Module

    layer = one_rank.moe_layer(top_p(normalization="drn"), **{dtype: True})
    before = full_state(layer.router)
    Float16Module(layer.config, layer)
    assert layer.router.weight.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, buffer in layer.router.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name
    assert layer.router.theta.dtype == torch.float32


def test_the_state_dict_holds_what_training_needs_and_loads_without_rounding():
    settings = DynMoEConfig(routing="dtop_p", target_experts_per_token=2)
    router = one_rank.router(settings)
    assert set(router.state_dict()) == {
        *("weight", "theta_offset"),
        *("threshold", "integral", "measured"),
    }
    full_state(router)
    other = one_rank.router(settings).bfloat16()
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.threshold, router.threshold)
    assert torch.equal(other.integral, router.integral)
    assert "theta_offset" not in one_rank.router(top_p()).state_dict()


def test_a_fixed_threshold_wins_over_the_checkpoints_and_says_so(caplog):
    router, saved = one_rank.router(top_p(threshold=0.3)), one_rank.router(top_p(threshold=0.6))
    router.load_state_dict(saved.state_dict())
    assert router.threshold.item() == pytest.approx(0.3)
    assert "0.6" in caplog.text and "--moe-dynamic-threshold 0.3" in caplog.text
    caplog.clear()
    saved.load_state_dict(saved.state_dict())
    assert not caplog.text


def test_state_is_float32_under_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        router = one_rank.router(top_p())
    finally:
        torch.set_default_dtype(torch.float32)
    assert router.threshold.dtype == router.integral.dtype == torch.float32


def test_theta_starts_at_one_and_gets_no_weight_decay():
    from megatron.core.optimizer import (
        OptimizerConfig,
        _get_param_groups,
        get_standard_config_overrides,
    )

    layer = one_rank.moe_layer(top_p(normalization="drn"))
    assert layer.router.theta.tolist() == [1.0]
    config = OptimizerConfig(lr=1e-3, min_lr=1e-4, weight_decay=0.1)
    groups = _get_param_groups([layer], config, get_standard_config_overrides(config))
    decay = {id(p): group["wd_mult"] for group in groups for p in group["params"]}
    assert decay[id(layer.router.theta_offset)] == 0
    assert decay[id(layer.router.weight)] == 1


# --- losses ---------------------------------------------------------------------------------------


def loss_gradients(router, *micro_batches, mask=None):
    """Gradients of the auxiliary losses alone, per parameter, summed over micro-batches."""
    for hidden in micro_batches:
        weights, _ = router(hidden, mask)
        (0 * weights).sum().backward()
    return {name: parameter.grad for name, parameter in router.named_parameters()}


def looped_losses(router, hidden, mask, scope: str, fractions=None):
    """The router's losses as loops, and its parameters as float64 leaves."""
    parameters = {n: p.detach().double().requires_grad_() for n, p in router.named_parameters()}
    probs, choices = [], []
    for hidden_D in hidden.double().view(-1, D):
        logits = list(parameters["weight"] @ hidden_D)
        if "theta_offset" in parameters:
            logits = oracle.normalize(logits, 1 + parameters["theta_offset"][0])
        probs.append(oracle.softmax(logits))
        values = [prob.item() for prob in probs[-1]]
        choices.append(oracle.algorithm_1(values, router.threshold.item()))
    valid = [True] * len(probs) if mask is None else (~mask).reshape(-1).tolist()
    tokens = [t for t, keep in enumerate(valid) if keep]
    sequences = [[t for t in tokens if t % hidden.shape[1] == b] for b in range(hidden.shape[1])]
    groups = sequences if scope == "seq_aux_loss" else [tokens]
    balance = sum(
        oracle.load_balance_loss([probs[t] for t in g], [choices[t] for t in g], fractions)
        for g in groups
    ) / len(groups)  # fmt: skip
    return balance, oracle.dynamic_loss([probs[t] for t in tokens]), parameters


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("normalization", ["none", "drn"])
@pytest.mark.parametrize("scope", ["seq_aux_loss", "aux_loss", "global_aux_loss", "none"])
def test_gradient_of_the_losses_is_that_of_the_loops(scope, normalization, padded):
    coefficient = 0 if scope == "none" else 0.3
    dynmoe = top_p(
        normalization=normalization,
        balance_loss=scope,
        balance_loss_coeff=coefficient,
        dynamic_loss_coeff=0.2,
    )
    router, mask = one_rank.router(dynmoe), padding() if padded else None
    hidden = hidden_states()
    gradients = loss_gradients(router, hidden, mask=mask)
    balance, dynamic, parameters = looped_losses(router, hidden, mask, scope)
    (coefficient * balance + 0.2 * dynamic).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), parameters[name].grad, rtol=1e-4, atol=1e-6)
    assert router.counters.sums.balance_loss.item() == pytest.approx(balance.item(), rel=1e-5)
    assert router.counters.sums.dynamic_loss.item() == pytest.approx(dynamic.item(), rel=1e-5)


def test_the_losses_leave_weights_and_their_gradient_alone():
    quiet, loud = (
        one_rank.router(top_p(balance_loss_coeff=c, dynamic_loss_coeff=c)) for c in (0, 0.5)
    )
    loud.load_state_dict(quiet.state_dict())
    hidden = hidden_states()
    torch.testing.assert_close(quiet(hidden)[0], loud(hidden)[0], rtol=0, atol=0)


def test_the_sequence_loss_does_not_depend_on_the_micro_batch():
    router = one_rank.router(top_p(balance_loss_coeff=0.3, dynamic_loss_coeff=0.2))
    hidden = hidden_states(sequences=4)
    whole = loss_gradients(router, hidden)["weight"].clone()
    router.zero_grad()
    halves = [half.contiguous() for half in hidden.split(2, dim=1)]
    torch.testing.assert_close(whole, loss_gradients(router, *halves)["weight"] / 2)


def test_the_global_loss_takes_its_fractions_from_the_global_batch_so_far():
    router = one_rank.router(top_p(balance_loss="global_aux_loss", balance_loss_coeff=1))
    first, second = hidden_states(0), hidden_states(1)
    _, map_1 = router(first)
    loss_gradients(router, second)
    with torch.no_grad():
        _, map_2 = router(second)
    fractions = (torch.cat([map_1, map_2]).double().sum(0) / (2 * S * B)).tolist()
    balance, _, parameters = looped_losses(router, second, None, "global_aux_loss", fractions)
    balance.backward()
    torch.testing.assert_close(
        router.weight.grad.double(), parameters["weight"].grad, rtol=1e-4, atol=1e-6
    )
    clear([router.counters])
    router.zero_grad()
    loss_gradients(router, second)
    alone, _, parameters = looped_losses(router, second, None, "global_aux_loss")
    alone.backward()
    torch.testing.assert_close(
        router.weight.grad.double(), parameters["weight"].grad, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("scope", ["seq_aux_loss", "aux_loss"])
def test_scaled_as_upstream_scales_its_losses(monkeypatch, scope, per_token, padded):
    """With the map of top-2, our loss is upstream's times 2: equation 7 has no division by k."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    mask = None
    if padded:  # equally long, or upstream weighs sequences by their mean length
        mask = torch.arange(S).unsqueeze(-1).expand(S, B) >= 4
    ours = one_rank.router(
        top_p(balance_loss=scope, balance_loss_coeff=0.1), calculate_per_token_loss=per_token
    )
    upstream = TopKRouter(
        one_rank.transformer_config(
            moe_router_load_balancing_type=scope,
            moe_aux_loss_coeff=0.2,
            moe_router_topk=2,
            moe_router_dtype="fp32",
            calculate_per_token_loss=per_token,
        ),
        get_default_pg_collection(),
    )
    upstream.weight.data.copy_(ours.weight)
    hidden = hidden_states()
    _, top_2 = upstream(hidden, mask)
    monkeypatch.setenv("DYNMOE_KERNELS", "0")
    monkeypatch.setattr("megatron_dynmoe.routing.route.select", lambda *_: top_2)
    got = loss_gradients(ours, hidden, mask=mask)["weight"]
    want = loss_gradients(upstream, hidden, mask=mask)["weight"]
    assert want.abs().max() > 1e-4
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("asked_for", "name"),
    [("aux_loss", "load_balancing_loss"), ("seq_aux_loss", "seq_load_balancing_loss")],
)
def test_upstreams_tracker_shows_the_balance_loss_under_the_name_it_asks_for(asked_for, name):
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    settings = top_p(balance_loss="seq_aux_loss", balance_loss_coeff=0.1)
    router = one_rank.router(settings, moe_router_load_balancing_type=asked_for)
    router(hidden_states())
    recorded = get_moe_metrics_tracker().metrics
    assert list(recorded) == [name]
    assert recorded[name].values.tolist() == pytest.approx(
        [router.counters.sums.balance_loss.item(), 0]
    )


def test_no_balance_loss_is_recorded_or_trained_where_there_is_none():
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    router = one_rank.router(top_p(balance_loss="none"))
    gradients = loss_gradients(router, hidden_states())
    assert not gradients["weight"].any()
    assert not get_moe_metrics_tracker().metrics
    assert router.counters.sums.balance_loss > 0, "still measured, for the log"
