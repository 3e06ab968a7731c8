"""Null experts as the papers write them: every null slot is there, one token and slot at a time.

Slow on purpose, and shares no code with the package. Slots are numbered: E experts, then M null
slots, which all have the token's null logit.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from tests.oracles.routing import softmax


def slots_of(logits: Sequence, null_slots: int) -> list:
    """One token's logits, the null logit last, with the null logit once for each null slot."""
    return [*logits[:-1], *[logits[-1]] * null_slots]


def choose(logits: Sequence, bias: float, null_slots: int, num_slots: int) -> set[int]:
    """The token's ``num_slots`` highest slots, null logits with the bias, ties by index."""
    num_experts = len(logits) - 1
    slots = slots_of(logits, null_slots)
    scores = [float(logit) + bias * (slot >= num_experts) for slot, logit in enumerate(slots)]
    order = sorted(range(len(scores)), key=lambda slot: (-scores[slot], slot))
    return set(order[:num_slots])


def probabilities(logits: Sequence[Tensor], null_slots: int) -> list[Tensor]:
    """One token's probabilities over all slots, without the bias."""
    return softmax(slots_of(logits, null_slots))


def outputs(
    probs: Sequence, chosen: set[int], num_experts: int, identity: bool, renormalize: bool
) -> tuple[list, Tensor | float]:
    """One token's weights of the experts, and that of the token itself."""
    speaking = [slot for slot in sorted(chosen) if slot < num_experts or identity]
    total = sum(probs[slot] for slot in speaking) if renormalize else 1
    weights = [
        probs[slot] / total if slot in speaking else probs[slot] * 0 for slot in range(len(probs))
    ]
    return weights[:num_experts], sum(weights[num_experts:])


def load_balance_loss(
    probs: Sequence[Sequence], choices: Sequence[set[int]], num_experts: int
) -> Tensor:
    """The loss of 2601.15370 over all E + M slots; equal null slots share what they were given."""
    num_tokens, num_slots = len(probs), len(probs[0])
    chosen = [sum(slot in choice for choice in choices) / num_tokens for slot in range(num_slots)]
    nulls = chosen[num_experts:]
    chosen[num_experts:] = [sum(nulls) / len(nulls)] * len(nulls)
    allocated = [sum(row[slot] for row in probs) / num_tokens for slot in range(num_slots)]
    return num_slots * sum(f * q for f, q in zip(chosen, allocated, strict=True))


def entropy(probs: Sequence[Tensor]) -> float:
    """One token's entropy over all slots, in nats."""
    return -sum(prob.item() * math.log(prob.item()) for prob in probs)
