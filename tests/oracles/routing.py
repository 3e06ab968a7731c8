"""Routing as the papers write it: plain loops, one token and one expert at a time.

Slow on purpose, and shares no code with the package. Tests and benchmarks compare with it.
Probabilities are rows of numbers: floats, ``fractions.Fraction`` (exact), or 0-d tensors (so that
autograd gives the gradients to compare with). A choice is the set of a token's experts.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def algorithm_1(probs: Sequence, threshold, max_experts: int | None = None) -> set[int]:
    """Expert selection of "Harder Task Needs More Experts", ties by expert index, with a cap."""
    order = sorted(range(len(probs)), key=lambda expert: (-probs[expert], expert))
    selected: set[int] = set()
    cumulative_probability = 0
    for expert in order:
        cumulative_probability += probs[expert]
        selected.add(expert)
        if cumulative_probability > threshold or len(selected) == max_experts:
            break
    return selected


def seq_top_k(
    probs: Sequence[Sequence], mean: float, max_experts: int | None, valid: Sequence[bool]
) -> tuple[list[set[int]], float]:
    """The choices of one sequence's tokens by SeqTopK, and the best score that nobody got.

    Pairs of token and expert take their turns by probability, ties by position and then by expert,
    until there are ``mean`` per valid token, rounded down. A token at the cap lets its turn
    pass.
    """
    pairs = [
        (-prob, position, expert)
        for position, row in enumerate(probs)
        for expert, prob in enumerate(row)
        if valid[position]
    ]
    left = math.floor(mean * sum(valid))
    choices: list[set[int]] = [set() for _ in probs]
    for negative, position, expert in sorted(pairs):
        if len(choices[position]) == max_experts:
            continue
        if left == 0:
            return choices, -negative
        choices[position].add(expert)
        left -= 1
    return choices, 0.0


def normalize(logits: Sequence, theta, epsilon: float = 1e-6) -> list:
    """One token's logits with mean 0 and standard deviation 1 (population), times theta."""
    mean = sum(logits) / len(logits)
    variance = sum((logit - mean) ** 2 for logit in logits) / len(logits)
    return [theta * (logit - mean) / (variance + epsilon) ** 0.5 for logit in logits]


def softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    """One token's probabilities (equation 2)."""
    largest = max(float(logit) for logit in logits)
    exponentials = [torch.exp(logit - largest) for logit in logits]
    return [exponential / sum(exponentials) for exponential in exponentials]


def weights(probs: Sequence, selected: set[int], renormalize: bool) -> list:
    """One token's weights: equation 4, or renormalized over the selected experts."""
    total = sum(probs[expert] for expert in sorted(selected)) if renormalize else 1
    return [probs[e] / total if e in selected else probs[e] * 0 for e in range(len(probs))]


def load_balance_loss(
    probs: Sequence[Sequence], choices: Sequence[set[int]], fractions: Sequence | None = None
):
    """Equations 6 to 8 for the tokens of one sequence; ``fractions`` overrides equation 7."""
    num_tokens, num_experts = len(probs), len(probs[0])
    loss = 0
    for expert in range(num_experts):
        chosen = sum(1 for choice in choices if expert in choice)
        fraction = chosen / num_tokens if fractions is None else fractions[expert]
        allocated = sum(row[expert] for row in probs) / num_tokens
        loss = loss + fraction * allocated
    return num_experts * loss


def dynamic_loss(probs: Sequence[Sequence]):
    """Equation 5, averaged over tokens."""
    total = 0
    for row in probs:
        for prob in row:
            total = total - prob * (torch.log(prob) if isinstance(prob, Tensor) else math.log(prob))
    return total / len(probs)


def moe(
    hidden_TD: Tensor,
    weights_TE: Sequence[Sequence],
    choices: Sequence[set[int]],
    experts: Sequence[Callable[[Tensor], Tensor]],
) -> Tensor:
    """Equation 1: every token's weighted sum over its experts, [T, D]."""
    rows = []
    for token, selected in enumerate(choices):
        output_D = torch.zeros_like(hidden_TD[token])
        for expert in sorted(selected):
            output_D = output_D + weights_TE[token][expert] * experts[expert](hidden_TD[token])
        rows.append(output_D)
    return torch.stack(rows)


def choices_of(routing_map_TE: Tensor) -> list[set[int]]:
    """The choices that a boolean map stands for."""
    return [{e for e, chosen in enumerate(row) if chosen} for row in routing_map_TE.tolist()]


def map_of(choices: Sequence[set[int]], num_experts: int) -> Tensor:
    """The boolean map [T, E] of choices."""
    return torch.tensor([[e in choice for e in range(num_experts)] for choice in choices])


def select_by_sort(probs_TE: Tensor, threshold, max_experts: int | None = None) -> Tensor:
    """Algorithm 1 in its plainest vectorized form: a stable sort and exact cumulative sums.

    Sums are of whole numbers of 2**-60, as the rule defines them. For whole tensors, where
    :func:`algorithm_1` would take too long.
    """
    sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    units_TE = (sorted_TE.double() * 2.0**60).long()
    before_TE = units_TE.cumsum(dim=-1) - units_TE
    threshold = torch.as_tensor(threshold, dtype=probs_TE.dtype)
    units = (threshold.clamp(max=1).double() * 2.0**60).long()
    limit = torch.where(threshold >= 1, torch.iinfo(torch.int64).max, units)
    keep_TE = (before_TE <= limit) & (sorted_TE >= 0)
    keep_TE[:, 0] = True
    if max_experts is not None:
        keep_TE[:, max_experts:] = False
    return torch.zeros_like(keep_TE).scatter_(-1, order_TE, keep_TE)
