"""Rules whose knob is a share, against routers whose logits drift: law, rule and count.

A plant here is what a training does to logits: their means move by a constant way in each step, and
their spread grows. The count is that of the rule itself.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dynmoe.control import PIController
from megatron_dynmoe.control.settle import settle, started_rule
from megatron_dynmoe.settings.config import DynMoEConfig

STEPS, SETTLED = 64, 30
STD = 0.02 * 128**0.5  # of the first step's logits, as the rule expects it


def counts_of(
    dynmoe: DynMoEConfig, num_experts: int, layers: list[Callable[[int], Tensor]]
) -> tuple[list[float], float]:
    """The mean count of every step, and the target.

    Args:
        layers: each makes the logits [T, E + X] of a step. All of them have one state.
    """
    model = SimpleNamespace(num_moe_experts=num_experts, hidden_size=128, init_method_std=0.02)
    settled, law = settle(dynmoe.resolve(num_experts), model)
    assert isinstance(law, PIController)
    rule = started_rule(settled, law, model)
    state = {name: torch.tensor([values]) for name, values in rule.first_state.items()}
    integral, target, means = torch.zeros(1), settled.control.target.at(0), []
    for step in range(STEPS):
        sums_W = torch.zeros(rule.num_sums, dtype=torch.float64)
        experts = 0.0
        for logits_of in layers:
            routed = rule.route(
                logits_of(step),
                {name: values[0] for name, values in state.items()},
                theta=None,
                num_sequences=1,
                valid_T=None,
                training=True,
                group=None,
            )
            experts += float(routed.experts_T.double().mean()) / len(layers)
            sums_W += routed.sums_W
        means.append(experts)
        share, integral = law.step(state["share"][0], integral, torch.tensor([experts]), target)
        moved = rule.next_state(state, sums_W[None], share[None])
        state = {**state, "share": share[None], **moved}
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
def test_the_count_of_null_experts_is_at_its_target_after_the_settling_time(
    num_experts: int, share: float, velocity: float, apart: float, growth: float, seed: int
) -> None:
    """At up to 0.3 standard deviations a step, with spreads that grow up to sixfold."""
    generator = torch.Generator().manual_seed(seed)

    def layer(own_velocity: float) -> Callable[[int], Tensor]:
        def logits(step: int) -> Tensor:
            scale = STD * (1 + growth) ** step
            logits_TL = scale * torch.randn(768, num_experts + 1, generator=generator)
            logits_TL[:, -1] -= scale * own_velocity * step
            return logits_TL

        return logits

    dynmoe = DynMoEConfig(routing="null_experts", target_experts_per_token=share * num_experts)
    means, target = counts_of(dynmoe, num_experts, [layer(velocity), layer(velocity + apart)])
    settled = means[SETTLED:]
    assert sum(settled) / len(settled) == pytest.approx(target, rel=0.02)


@settings(max_examples=8)
@given(
    num_experts=st.sampled_from([4, 16, 64]),
    share=st.floats(0.1, 0.45),
    scale=st.floats(-1.5, 1.5).map(lambda power: 10**power),
    drift=st.floats(-0.05, 0.05),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_count_of_expert_threshold_is_at_its_target_after_the_settling_time(
    num_experts: int, share: float, scale: float, drift: float, seed: int
) -> None:
    """Logits 30 times larger or smaller than expected, of which half drift faster than others.

    The first thresholds are those of the expected size, so a first batch may use no experts, or
    nearly half of all.
    """
    generator = torch.Generator().manual_seed(seed)
    way_E = torch.linspace(-1, 1, num_experts).sign() + 0.5

    def logits(step: int) -> Tensor:
        logits_TE = torch.randn(1024, num_experts, generator=generator)
        return scale * STD * (logits_TE + drift * step * way_E)

    dynmoe = DynMoEConfig(routing="expert_threshold", target_experts_per_token=share * num_experts)
    means, target = counts_of(dynmoe, num_experts, [logits])
    settled = means[SETTLED:]
    assert sum(settled) / len(settled) == pytest.approx(target, rel=0.02)
    # A batch of these few tokens has a noise of its own, up to 4 % with 4 experts.
    assert all(abs(mean - target) < 0.15 * target for mean in settled)
