"""Null experts' share and bias against routers whose logits drift: the law, the rule, and a count.

A plant here is what a training does to logits: their mean moves by a constant way in each step,
each layer's its own, and their spread grows. The count is that of the rule itself.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmoe.control import PIController
from megatron_dynmoe.control.settle import settle, started_rule
from megatron_dynmoe.settings.config import DynMoEConfig

TOKENS, LAYERS, STEPS, SETTLED = 768, 2, 64, 30


def counts_of(
    dynmoe: DynMoEConfig, num_experts: int, velocities: list[float], growth: float, seed: int
) -> tuple[list[float], float]:
    """The mean count of every step, and the target."""
    model = SimpleNamespace(num_moe_experts=num_experts, hidden_size=128, init_method_std=0.02)
    settled, law = settle(dynmoe.resolve(num_experts), model)
    assert isinstance(law, PIController)
    rule = started_rule(settled, law, model)
    share, integral = torch.tensor([law.initial_threshold]), torch.zeros(1)
    bias = torch.tensor(rule.first_state["null_bias"])
    generator = torch.Generator().manual_seed(seed)
    std, target, means = 0.02 * 128**0.5, settled.control.target.at(0), []
    for step in range(STEPS):
        scale = std * (1 + growth) ** step
        sums_W = torch.zeros(rule.num_sums, dtype=torch.float64)
        experts = 0.0
        for velocity in velocities:
            logits_TL = scale * torch.randn(TOKENS, num_experts + 1, generator=generator)
            logits_TL[:, -1] -= scale * velocity * step
            routed = rule.route(
                logits_TL,
                {"null_bias": bias},
                theta=None,
                num_sequences=1,
                valid_T=None,
                training=True,
                group=None,
            )
            experts += float(routed.experts_T.double().mean()) / len(velocities)
            sums_W += routed.sums_W
        means.append(experts)
        share, integral = law.step(share, integral, torch.tensor([experts]), target)
        bias = rule.next_state({"null_bias": bias[None]}, sums_W[None], share[None])["null_bias"][0]
    return means, target


@settings(max_examples=8)
@given(
    num_experts=st.sampled_from([4, 16, 64]),
    share=st.floats(0.1, 0.45),
    velocity=st.floats(-0.3, 0.3),
    apart=st.floats(0, 0.02),
    growth=st.floats(-0.01, 0.03),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_count_is_at_its_target_after_the_settling_time(
    num_experts: int, share: float, velocity: float, apart: float, growth: float, seed: int
) -> None:
    """At up to 0.3 standard deviations a step, with spreads that grow up to sixfold."""
    dynmoe = DynMoEConfig(routing="null_experts", target_experts_per_token=share * num_experts)
    velocities = [velocity + apart * layer for layer in range(LAYERS)]
    means, target = counts_of(dynmoe, num_experts, velocities, growth, seed)
    settled = means[SETTLED:]
    assert sum(settled) / len(settled) == pytest.approx(target, rel=0.02)
