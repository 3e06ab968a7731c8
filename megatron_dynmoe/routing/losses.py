"""The two losses of a router whose tokens use a varying number of experts.

Both are functions of sums over tokens. A rank that holds a part of the tokens computes its share
of the loss from its own sums and the counts of all tokens. The shares add up to the whole loss.
"""

import torch
from torch import Tensor


def fractions(
    assignments_BE: Tensor, tokens_B: Tensor | int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``f_i`` of equation 7: the fraction of a sequence's tokens that chose expert i.

    Args:
        assignments_BE: [B, E], the valid tokens that chose each expert.
        tokens_B: as for :func:`load_balance_loss`.

    Returns:
        [B, E] of the dtype.
    """
    if dtype != torch.get_default_dtype():  # which whole numbers become by division
        assignments_BE = assignments_BE.to(dtype)
    return (assignments_BE / _per_sequence(tokens_B)).to(dtype)


def load_balance_loss(prob_sums_BE: Tensor, fractions_BE: Tensor, tokens_B: Tensor | int) -> Tensor:
    """``N * sum_i f_i Q_i``, averaged over sequences (equations 6 to 8 of Dynamic MoE).

    ``f_i`` is not divided by the number of experts that a token uses: a balanced router that uses k
    experts has a loss of k.

    Args:
        prob_sums_BE: [B, E], the probabilities, summed over this part's valid tokens.
        fractions_BE: [B, E], f over all tokens of a sequence, including those on other ranks.
        tokens_B: [B], the number of valid tokens of each sequence, including those on other ranks,
            or one number if all have as many. Sequences without tokens do not count.

    Returns:
        A scalar: this part's share of the loss. Gradients flow through Q only.
    """
    num_sequences: Tensor | int
    num_sequences, num_experts = fractions_BE.shape
    if isinstance(tokens_B, Tensor):
        num_sequences = (tokens_B > 0).sum().clamp(min=1)
    # The sums come last: each operation on them is two or three more of autograd's.
    by_token_BE = fractions_BE * num_experts / (num_sequences * _per_sequence(tokens_B))
    return (by_token_BE * prob_sums_BE).sum()


def _per_sequence(tokens_B: Tensor | int) -> Tensor | int:
    """A divisor of [B, E] that is never zero."""
    if isinstance(tokens_B, Tensor):
        return tokens_B.clamp(min=1).unsqueeze(-1)
    return max(tokens_B, 1)


def dynamic_loss(entropy: Tensor, tokens: Tensor | int) -> Tensor:
    """Mean entropy of the router's distribution, in nats (equation 5 of Dynamic MoE).

    Args:
        entropy: a scalar, the sum over this part's valid tokens.
        tokens: the number of valid tokens of all sequences, including those on other ranks.

    Returns:
        A scalar: this part's share of the mean over tokens.
    """
    return entropy / (tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1))


def sum_by_sequence(values_TE: Tensor, num_sequences: int, valid_T: Tensor | None) -> Tensor:
    """Sum over the valid tokens of each sequence. A routing map gives its assignments.

    Args:
        values_TE: [T, E], tokens ordered as ``position * num_sequences + sequence``.
        num_sequences: B; 1 treats all tokens as one sequence.
        valid_T: [T], bool, False for padding; None: no padding.

    Returns:
        [B, E], dtype of the values; int64 if they are bool.
    """
    if valid_T is not None:
        values_TE = values_TE * valid_T.unsqueeze(-1)
    return values_TE.view(-1, num_sequences, values_TE.shape[-1]).sum(dim=0)


def sum_entropy(probs_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """The entropy of each token's probabilities, in nats, summed over valid tokens: a scalar."""
    # A probability that has underflowed to 0 must not send log(0) into the gradient.
    log_probs_TE = probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny).log()
    entropy_T = -(probs_TE * log_probs_TE).sum(dim=-1)
    return (entropy_T if valid_T is None else entropy_T * valid_T).sum()


def count_tokens(
    values_TE: Tensor, num_sequences: int, valid_T: Tensor | None
) -> tuple[Tensor | int, Tensor | int]:
    """Count valid tokens; arguments as for :func:`sum_by_sequence`.

    Returns:
        Those of each sequence, and those of all. Without padding the host knows both numbers, and
        the device has nothing to compute; else they are [B] and a scalar, int64.
    """
    if valid_T is None:
        return len(values_TE) // num_sequences, len(values_TE)
    tokens_B = valid_T.view(-1, num_sequences).sum(dim=0)
    return tokens_B, tokens_B.sum()
