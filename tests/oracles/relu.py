"""ReLU routing as the ReMoE paper writes it: plain loops, one token and one expert at a time.

Slow on purpose, and shares no code with the package. Logits are rows of numbers or 0-d tensors.
"""

from collections.abc import Sequence


def gates(logits: Sequence) -> list:
    """One token's gates, ``ReLU(x W)``, which are the weights."""
    return [logit if logit > 0 else logit * 0 for logit in logits]


def choice(logits: Sequence[float], max_experts: int | None = None) -> set[int]:
    """The experts of one token: those with a positive gate, the largest ones under a cap."""
    positive = [expert for expert, logit in enumerate(logits) if logit > 0]
    positive.sort(key=lambda expert: (-logits[expert], expert))
    return set(positive[:max_experts])


def l1_loss(rows: Sequence[Sequence]):
    """The mean over tokens of the L1 norm of their gates, one layer."""
    total = 0
    for row in rows:
        for gate in gates(row):
            total = total + gate
    return total / len(rows)


def balanced_l1_loss(rows: Sequence[Sequence], choices: Sequence[set[int]], target: float):
    """The same with each gate times its expert's load f, which is 1 for an expert's fair share."""
    num_tokens, num_experts = len(rows), len(rows[0])
    total = 0
    for expert in range(num_experts):
        used_by = sum(1 for chosen in choices if expert in chosen)
        load = num_experts / (target * num_tokens) * used_by
        for row in rows:
            total = total + load * gates(row)[expert]
    return total / num_tokens


def next_coefficient(
    coefficient: float, choices: Sequence[set[int]], num_experts: int, target: float, factor: float
) -> float:
    """The paper's law: times or over ``factor`` by the sign of the missing sparsity."""
    used = sum(len(chosen) for chosen in choices)
    sparsity = 1 - used / (len(choices) * num_experts)
    missing = (1 - target / num_experts) - sparsity
    if missing > 0:
        return coefficient * factor
    return coefficient / factor if missing < 0 else coefficient
