"""The two losses of a router whose tokens use a varying number of experts.

Both work on the part of the tokens that a rank holds: given the counts of the whole, the parts'
losses add up to the loss of the whole.
"""

import torch
from torch import Tensor


def count_assignments(
    routing_map_TE: Tensor, num_sequences: int, valid_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Count, for each sequence, the tokens that chose each expert and all tokens.

    Args:
        routing_map_TE: [T, E], bool, tokens ordered as ``position * num_sequences + sequence``.
        num_sequences: B; 1 treats all tokens as one sequence.
        valid_T: [T], bool, False for padding, which is not counted; None: no padding.

    Returns:
        Assignments [B, E] and tokens [B], int64.
    """
    num_experts = routing_map_TE.shape[-1]
    tokens_B = count_tokens(routing_map_TE, num_sequences, valid_T)
    if valid_T is not None:
        routing_map_TE = routing_map_TE & valid_T.unsqueeze(-1)
    return routing_map_TE.view(-1, num_sequences, num_experts).sum(dim=0), tokens_B


def count_tokens(routing_map_TE: Tensor, num_sequences: int, valid_T: Tensor | None) -> Tensor:
    """The valid tokens of each sequence, [B] int64; arguments as for :func:`count_assignments`."""
    if valid_T is not None:
        return valid_T.view(-1, num_sequences).sum(dim=0)
    tokens = len(routing_map_TE) // num_sequences
    return routing_map_TE.new_full((num_sequences,), tokens, dtype=torch.int64)


def load_balance_loss(
    probs_TE: Tensor,
    fractions_BE: Tensor,
    tokens_B: Tensor,
    valid_T: Tensor | None = None,
) -> Tensor:
    """``N * sum_i f_i Q_i``, averaged over sequences (equations 6 to 8 of Dynamic MoE).

    ``f_i``, the fraction of a sequence's tokens that chose expert i, is not divided by the number
    of experts a token uses: a balanced router that uses k experts has a loss of k.

    Args:
        probs_TE: [T, E], tokens ordered as ``position * B + sequence``.
        fractions_BE: f, [B, E]; over all tokens of a sequence, also those on other ranks.
        tokens_B: [B], the tokens of each sequence, also those on other ranks. Sequences without
            tokens do not count.
        valid_T: [T], bool, False for padding; None: no padding.

    Returns:
        A scalar: this part's share of the loss. Gradients flow through Q only.
    """
    num_sequences, num_experts = fractions_BE.shape
    if valid_T is not None:
        probs_TE = probs_TE * valid_T.unsqueeze(-1)
    prob_sums_BE = probs_TE.view(-1, num_sequences, num_experts).sum(dim=0)
    return load_balance_loss_of_sums(prob_sums_BE, fractions_BE, tokens_B)


def load_balance_loss_of_sums(
    prob_sums_BE: Tensor, fractions_BE: Tensor, tokens_B: Tensor
) -> Tensor:
    """:func:`load_balance_loss`, given the probabilities summed over valid tokens, [B, E]."""
    mean_probs_BE = prob_sums_BE / tokens_B.clamp(min=1).unsqueeze(-1)
    loss_B = fractions_BE.shape[-1] * (fractions_BE * mean_probs_BE).sum(dim=-1)
    return loss_B.sum() / (tokens_B > 0).sum().clamp(min=1)


def dynamic_loss(
    probs_TE: Tensor, num_tokens: Tensor | int, valid_T: Tensor | None = None
) -> Tensor:
    """Mean entropy of the router's distribution, in nats (equation 5 of Dynamic MoE).

    Args:
        probs_TE: [T, E].
        num_tokens: the number of valid tokens, also those on other ranks.
        valid_T: [T], bool, False for padding; None: no padding.

    Returns:
        A scalar: this part's share of the mean over tokens.
    """
    # A probability that has underflowed to 0 must not send log(0) into the gradient.
    log_probs_TE = probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny).log()
    entropy_T = -(probs_TE * log_probs_TE).sum(dim=-1)
    if valid_T is not None:
        entropy_T = entropy_T * valid_T
    return entropy_T.sum() / num_tokens
