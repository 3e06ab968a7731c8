"""Expert thresholds against plain loops, over layouts, and in a closed loop."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch

from megatron_dynmoe.control import PIController, default_gains
from megatron_dynmoe.moe.rules.expert_threshold import START, route
from megatron_dynmoe.routing.rules import quantiles
from megatron_dynmoe.routing.rules.expert_threshold import select
from tests.oracles import expert_threshold as oracle
from tests.oracles import routing as plain

T, E, B = 12, 5, 3
THRESHOLDS = [0.4, 0.3, 0.0, 5.0, 0.9]


def random_logits(num_tokens: int = T, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, E, generator=generator, dtype=dtype)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("cap", [None, 2])
@pytest.mark.parametrize("theta", [None, 1.5])
@pytest.mark.parametrize("padded", [False, True])
def test_a_routing_is_that_of_plain_loops(renormalize, cap, theta, padded):
    logits = random_logits()
    valid = torch.arange(T) % 4 != 1 if padded else None
    routed = route(
        logits,
        torch.tensor(THRESHOLDS, dtype=torch.float64),
        theta=None if theta is None else torch.tensor([theta], dtype=torch.float64),
        max_experts=cap,
        renormalize=renormalize,
        num_sequences=B,
        valid_T=valid,
    )
    prob_sums, assignments, entropy = torch.zeros(B, E), torch.zeros(B, E), 0.0
    for token in range(T):
        row = [*logits[token]] if theta is None else plain.normalize([*logits[token]], theta)
        chosen = oracle.choose(row, THRESHOLDS, cap)
        assert set(routed.map_TE[token].nonzero().flatten().tolist()) == chosen
        assert routed.experts_T[token] == len(chosen)
        scores = [oracle.sigmoid(logit) for logit in row]
        total = sum(scores[e] for e in chosen) if renormalize and chosen else 1
        weights = torch.stack([s / total if e in chosen else s * 0 for e, s in enumerate(scores)])
        torch.testing.assert_close(routed.weights_TE[token], weights)
        if valid is not None and not valid[token]:
            continue
        for expert in range(E):
            probability = scores[expert] / sum(scores)
            prob_sums[token % B, expert] += probability
            entropy -= float(probability * probability.log())
            assignments[token % B, expert] += expert in chosen
    torch.testing.assert_close(routed.prob_sums_BE.float(), prob_sums)
    assert torch.equal(routed.assignments_BE.float(), assignments)
    assert float(routed.entropy) == pytest.approx(entropy)
    assert (routed.experts_T == 0).any() and (routed.experts_T > 1).any()


def test_a_logit_on_the_threshold_is_not_taken_and_ties_under_a_cap_go_by_index():
    thresholds = torch.tensor([0.5, 0.25, 0.25, -1.0])
    logits = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.6, 0.25, 0.0, -1.0]])
    chosen = torch.tensor([[False, True, True, True], [True, False, False, False]])
    assert torch.equal(select(logits, thresholds), chosen)
    chosen[0, 3] = False
    assert torch.equal(select(logits, thresholds, 2), chosen)
    counts = quantiles.count(logits, thresholds, None).view(4, -1)
    zero = quantiles.EDGES.index(0.0) + 1
    assert torch.equal(counts[:, zero:].sum(-1), select(logits, thresholds).sum(0))


def test_the_edges_on_a_device_are_those_that_are_written_down():
    for dtype in (torch.float32, torch.float64):
        assert quantiles._edges(torch.empty(0, dtype=dtype)).tolist() == list(quantiles.EDGES)
    assert len(quantiles.EDGES) + 1 == quantiles.NUM_BINS


def test_no_token_and_no_expert_give_finite_gradients():
    logits = random_logits().requires_grad_()
    routed = route(logits, torch.full((E,), 9.0), renormalize=True)
    assert not routed.map_TE.any() and not routed.weights_TE.any()
    (routed.weights_TE.sum() + routed.prob_sums_BE[0, 0] + routed.entropy).backward()
    assert logits.grad.isfinite().all()
    assert route(random_logits(0), torch.zeros(E)).sums_W.sum() == 0


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients(renormalize):
    values = random_logits(seed=1)

    def losses(logits, theta):
        routed = route(
            logits,
            torch.tensor(THRESHOLDS),
            theta=theta,
            renormalize=renormalize,
            max_experts=3,
            num_sequences=B,
        )
        return (routed.weights_TE * values).sum().tanh(), routed.prob_sums_BE, routed.entropy

    logits = random_logits().requires_grad_()
    for theta in (None, torch.tensor([1.5], dtype=torch.float64, requires_grad=True)):
        assert torch.autograd.gradcheck(losses, (logits, theta))


def test_logits_that_are_not_finite_are_counted_and_have_a_bin():
    logits = random_logits(dtype=torch.float32)
    logits[0, 0], logits[1, 1], logits[2, 2] = torch.nan, torch.inf, -torch.inf
    routed = route(logits, torch.zeros(E))
    assert routed.not_finite == 3
    assert not routed.map_TE[0, 0] and routed.map_TE[1, 1] and not routed.map_TE[2, 2]
    assert routed.sums_W.sum() == T * E


def test_counts_and_thresholds_are_those_of_plain_loops_in_any_layout():
    # Two micro-batches on three ranks each, in another order, with padding between.
    logits = random_logits(600, dtype=torch.float32) * torch.tensor([0.01, 0.1, 1, 3, 40])
    valid = torch.ones(600, dtype=torch.bool)
    valid[7::11] = False
    thresholds = torch.tensor([0.01, 0.0, 0.7, -2.0, 30.0])
    counts = quantiles.count(logits, thresholds, valid)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(3))
    parts = [
        quantiles.count(logits[p], thresholds, valid[p]) for p in order.split([100, 7, 193, 299, 1])
    ]
    total = torch.zeros(E * quantiles.NUM_BINS, dtype=torch.float64)
    for part in reversed(parts):
        total += part.double()
    assert torch.equal(total, counts.double())
    for expert in range(E):
        own = logits[valid, expert].tolist()
        mine = counts.view(E, -1)[expert].tolist()
        assert mine == oracle.bins(own, thresholds[expert].item(), quantiles.EDGES)
    for share, next_share, weight in [(0.2, 0.2, 0.01), (0.2, 0.25, 1), (0.0, 0.3, 0.5), (1, 0, 0)]:
        found = quantiles.next_thresholds(
            thresholds,
            total.view(E, -1),
            torch.tensor([float(share)]),
            torch.tensor([next_share]),
            weight,
        )
        shares = torch.tensor([share, next_share]).tolist()
        expected = [
            oracle.next_threshold(row.tolist(), c.item(), quantiles.EDGES, *shares, weight)
            for row, c in zip(counts.view(E, -1), thresholds, strict=True)
        ]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("share", [0.01, 0.125, 0.5, 0.9])
@pytest.mark.parametrize("scale, shift", [(1e-3, 0.0), (0.2, 3.0), (4.0, -7.0)])
def test_the_quantile_of_the_bins_is_near_that_of_the_logits(share, scale, shift):
    logits = random_logits(4096, dtype=torch.float32) * scale + shift
    thresholds = torch.full((E,), shift)
    for _ in range(8):  # each batch's bins lie around the thresholds of the one before
        q = torch.tensor([share])
        thresholds = quantiles.next_thresholds(
            thresholds, quantiles.count(logits, thresholds, None).view(E, -1), q, q, 1.0
        )
    exact = [oracle.exact_quantile(logits[:, e].tolist(), share) for e in range(E)]
    taken = select(logits, thresholds).double().mean(0)
    torch.testing.assert_close(taken, torch.full((E,), share).double(), rtol=0, atol=4 / 4096)
    torch.testing.assert_close(thresholds, torch.tensor(exact), rtol=0, atol=0.05 * scale)


def test_at_a_constant_share_it_is_the_moving_average_of_the_paper():
    thresholds, q = torch.tensor(THRESHOLDS), torch.tensor([0.3])
    expected, decay = thresholds.double(), 0.9
    for step in range(20):
        logits = random_logits(512, seed=step, dtype=torch.float32)
        counts = quantiles.count(logits, thresholds, None).view(E, -1)
        at_share = quantiles.quantile(counts, thresholds, 0.3)
        thresholds = quantiles.next_thresholds(thresholds, counts, q, q, 1 - decay)
        expected = decay * expected + (1 - decay) * at_share
    torch.testing.assert_close(thresholds.double(), expected, rtol=0, atol=1e-5)


def test_an_expert_without_tokens_keeps_its_threshold():
    thresholds, q = torch.tensor(THRESHOLDS), torch.tensor([0.3])
    empty = torch.zeros(E, quantiles.NUM_BINS, dtype=torch.float64)
    assert torch.equal(quantiles.next_thresholds(thresholds, empty, q, q / 2, 1.0), thresholds)


def closed_loop(target, *, start=None, scale=0.25, steps=90, age=0, change=None, drift=0.0):
    """The counts of a run whose logits are normal, steered by the default gains.

    ``change`` is another target from step 40 on; ``age`` is the number of batches before, which
    makes the average slow; the means of the logits move by ``drift`` standard deviations a step,
    each expert's its own way.
    """
    num_experts, num_tokens = 16, 2048
    plant = {"normalized": False, "logits_std": scale, "routing": "expert_threshold"}
    gains = default_gains(num_experts, target, **plant)
    law = PIController(num_experts, target / num_experts, *gains)
    share, integral = torch.tensor([law.initial_threshold]), torch.zeros(1)
    first = NormalDist(0, scale).inv_cdf(1 - law.initial_threshold) if start is None else start
    thresholds = torch.full((num_experts,), first)
    generator = torch.Generator().manual_seed(7)
    way = torch.linspace(-1, 1, num_experts).sign() + 0.5
    means = []
    for step in range(steps):
        logits = torch.randn(num_tokens, num_experts, generator=generator) + drift * step * way
        logits *= scale
        counts = quantiles.count(logits, thresholds, None).view(num_experts, -1)
        means.append(float(select(logits, thresholds).sum() / num_tokens))
        now = change if change is not None and step >= 40 else target
        measured = torch.tensor([means[-1]])
        next_share, integral = law.step(share, integral, measured, now)
        weight = max(0.001, START / (START + age + step))
        thresholds = quantiles.next_thresholds(thresholds, counts, share, next_share, weight)
        share = next_share
    return means


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"target": 2.0}, id="as it starts"),
        pytest.param({"target": 2.0, "start": 0.0}, id="every second token at first"),
        pytest.param({"target": 2.0, "start": 3.0}, id="no token at first"),
        pytest.param({"target": 2.0, "scale": 5.0, "start": 0.0}, id="large logits"),
        pytest.param({"target": 2.0, "change": 4.0}, id="another target"),
        pytest.param({"target": 6.0, "change": 1.0, "age": 10_000}, id="a much smaller target"),
        pytest.param({"target": 2.0, "change": 4.0, "age": 100_000}, id="a long average"),
        pytest.param({"target": 2.0, "drift": 0.02}, id="drift"),
    ],
)
def test_the_default_gains_hold_the_target_within_30_steps(case):
    means = closed_loop(**case)
    target = case.get("change", case["target"])
    since = 40 if "change" in case else 0
    settled = means[since + 30 :]
    # The loop settles to 2 % of the way that it has to go.
    way = abs(target - means[since])
    assert sum(settled) / len(settled) == pytest.approx(target, abs=0.02 * max(target, way))
    # A batch of 2048 tokens has noise of its own: about 2 % of the count.
    assert all(abs(mean - target) < 0.1 * target for mean in settled)
