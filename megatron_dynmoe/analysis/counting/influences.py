"""Counts from which it follows what a token's number of experts goes along with.

Six things are known of a token besides its experts (:data:`INFLUENCES`). They go along with each
other, too: rare tokens surprise. For partial correlations of ranks one needs, of each two, how many
tokens have which values. So the counts are tables of bins against bins, for each bag of documents.

Letters of dimensions are those of counts.py, and C influences, P pairs of them, M bins of experts,
Q bins of an influence, D bags.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from megatron_dynmoe.analysis.counting.tokens import Letters

INFLUENCES = ("own_loss", "next_loss", "entropy", "frequency", "position", "word_start")
PAIRS = tuple(combinations(range(len(INFLUENCES)), 2))
NUM_BAGS = 32
NUM_BINS = 32  # of an influence
NUM_EXPERT_BINS = 16
# Frequencies are binned by their logarithm, down to this power of two.
_LEAST_FREQUENCY = -24


class Tokens(NamedTuple):
    """What is known of the tokens of a block that have a token before and after them, [T] each."""

    bag: np.ndarray
    experts_L: np.ndarray  # [L, T]
    bins_C: np.ndarray  # [C, T], of the influences


def sizes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """The shapes of both tables."""
    return {
        "influence_DLCMQ": (NUM_BAGS, num_layers, len(INFLUENCES), NUM_EXPERT_BINS, NUM_BINS),
        "influences_DPQQ": (NUM_BAGS, len(PAIRS), NUM_BINS, NUM_BINS),
    }


def count(
    experts_DLCMQ: np.ndarray, influences_DPQQ: np.ndarray, tokens: Tokens, num_experts: int
) -> None:
    """Add tokens to both tables."""
    bins_LT = _expert_bins(num_experts)[tokens.experts_L]
    for place, bins_T in enumerate(tokens.bins_C):
        for layer, experts_T in enumerate(bins_LT):
            _add(experts_DLCMQ[:, layer, place], tokens.bag, experts_T, bins_T)
    for place, (one, other) in enumerate(PAIRS):
        _add(influences_DPQQ[:, place], tokens.bag, tokens.bins_C[one], tokens.bins_C[other])


def frequency_bins(seen: np.ndarray, tokens: int, vocabulary: int) -> np.ndarray:
    """The bins of how often tokens have been seen before, as a share of all tokens before.

    Every token of the vocabulary starts with half a count, as in ``guessing_loss``.
    """
    share = np.log2((seen + 0.5) / (tokens + vocabulary / 2))
    bins = np.floor((share - _LEAST_FREQUENCY) / -_LEAST_FREQUENCY * NUM_BINS)
    return np.clip(bins, 0, NUM_BINS - 1).astype(np.int64)


def position_bins(length: int, positions: int) -> np.ndarray:
    """The bin of each of the first ``length`` positions of a window of ``positions``, [length]."""
    return np.arange(length) * NUM_BINS // positions


def word_starts(before: np.ndarray, here: np.ndarray, letters: Letters) -> np.ndarray:
    """Which tokens begin after a space, or with a letter after something that is none."""
    return letters.after_space[here] | (letters.begin[here] & ~letters.end[before])


def _expert_bins(num_experts: int) -> np.ndarray:
    """The bin of each number of experts 0 .. E: one each, or equal ratios above 0."""
    numbers = np.arange(num_experts + 1)
    if num_experts < NUM_EXPERT_BINS:
        return numbers
    ratios = np.log(np.maximum(numbers, 1)) / np.log(num_experts)
    bins = 1 + np.floor(ratios * (NUM_EXPERT_BINS - 2)).astype(np.int64)
    return np.where(numbers == 0, 0, bins)


def _add(table_DMQ: np.ndarray, *places: np.ndarray) -> None:
    flat = np.ravel_multi_index(places, table_DMQ.shape)
    table_DMQ += np.bincount(flat, minlength=table_DMQ.size).reshape(table_DMQ.shape)
