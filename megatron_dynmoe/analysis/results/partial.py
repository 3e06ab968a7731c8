"""Partial rank correlations: what a token's number of experts goes along with, all else equal.

Letters of dimensions are those of counting/influences.py, and R resamples, N variables: the number
of experts first, then the influences.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_dynmoe.analysis.counting.counts import RoutingCounts
from megatron_dynmoe.analysis.counting.influences import INFLUENCES, PAIRS

RESAMPLES = 500
SEED = 20260518
# Of the matrix of correlations, above which no influence can be told from the others.
MAX_CONDITION = 1e8


def partial_correlations(
    counts: RoutingCounts, moe_layers: list[int], with_interval: bool
) -> list[dict[str, Any]]:
    """For each layer and influence: plain and partial rank correlation, and its 95 % interval.

    The partial correlation is that of the ranks of both, after what the ranks of the other
    influences explain linearly has been taken from each. The bootstrap draws bags of documents.

    Returns:
        A row for each layer: ``layer`` and, under the name of each influence, ``plain``,
        ``partial``, ``low`` and ``high``. Numbers are None if experts or the influence are the same
        for every token, and the interval also without ``with_interval``.
    """
    bags = np.flatnonzero(counts.influences_DPQQ.any(axis=(1, 2, 3)))
    draws_RD = np.ones((1, len(bags)))
    if with_interval and len(bags) > 1:
        generator = np.random.RandomState(SEED)  # its stream is the same in every version of NumPy
        share = np.full(len(bags), 1 / len(bags))
        drawn_RD = generator.multinomial(len(bags), share, RESAMPLES)
        draws_RD = np.concatenate([draws_RD, drawn_RD])
    between = {
        pair: rank_correlations(counts.influences_DPQQ[bags, place], draws_RD)
        for place, pair in enumerate(PAIRS)
    }
    rows = []
    for index, layer in enumerate(moe_layers):
        matrix_RNN = np.tile(np.eye(1 + len(INFLUENCES)), (len(draws_RD), 1, 1))
        for (one, other), values_R in between.items():
            matrix_RNN[:, 1 + one, 1 + other] = matrix_RNN[:, 1 + other, 1 + one] = values_R
        for place in range(len(INFLUENCES)):
            with_experts = counts.influence_DLCMQ[bags, index, place]
            values_R = rank_correlations(with_experts, draws_RD)
            matrix_RNN[:, 0, 1 + place] = matrix_RNN[:, 1 + place, 0] = values_R
        rows.append({"layer": layer} | _row(matrix_RNN))
    return rows


def _row(matrix_RNN: np.ndarray) -> dict[str, Any]:
    """The numbers of a layer; the first matrix is that of all tokens, the others are resamples."""
    partial_RC = np.stack([_partial(matrix_NN) for matrix_NN in matrix_RNN])
    row = {}
    for place, name in enumerate(INFLUENCES):
        value, resampled = partial_RC[0, place], partial_RC[1:, place]
        known = resampled[np.isfinite(resampled)]
        has_interval = bool(len(known)) and np.isfinite(value)
        low, high = np.percentile(known, (2.5, 97.5)) if has_interval else (np.nan, np.nan)
        numbers = {
            "plain": matrix_RNN[0, 0, 1 + place], "partial": value, "low": low, "high": high
        }  # fmt: skip
        row[name] = {
            key: float(number) if np.isfinite(number) else None for key, number in numbers.items()
        }
    return row


def _partial(matrix_NN: np.ndarray) -> np.ndarray:
    """Partial correlations of the first variable with each other one, [C]; NaN if undefined."""
    result = np.full(len(matrix_NN) - 1, np.nan)
    varies = [0, *(1 + np.flatnonzero(np.isfinite(matrix_NN[0, 1:])))]
    known_NN = matrix_NN[np.ix_(varies, varies)]
    if len(varies) == 1 or np.linalg.cond(known_NN) > MAX_CONDITION:
        return result
    inverse = np.linalg.inv(known_NN)
    spread = np.sqrt(inverse[0, 0] * inverse.diagonal()[1:])
    result[np.array(varies[1:]) - 1] = -inverse[0, 1:] / spread
    return result


def rank_correlations(table_DMQ: np.ndarray, draws_RD: np.ndarray) -> np.ndarray:
    """Spearman's correlation of rows with columns of each weighted sum of tables, [R].

    Ties have their mean rank. NaN if rows or columns are the same for every token.
    """
    tables_RMQ = np.tensordot(draws_RD, table_DMQ.astype(np.float64), axes=1)
    ranks_RM, spread_RM = _ranks(tables_RMQ.sum(axis=2))
    ranks_RQ, spread_RQ = _ranks(tables_RMQ.sum(axis=1))
    together_R = np.einsum("rm,rmq,rq->r", ranks_RM, tables_RMQ, ranks_RQ)
    spread_R = spread_RM * spread_RQ
    return np.where(spread_R > 0, together_R / np.sqrt(np.where(spread_R > 0, spread_R, 1)), np.nan)


def _ranks(counts_RM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean rank of each value, less the mean of all, and the sum of their squares."""
    middle_RM = counts_RM.cumsum(axis=1) - counts_RM / 2
    ranks_RM = middle_RM - counts_RM.sum(axis=1, keepdims=True) / 2
    return ranks_RM, (counts_RM * ranks_RM**2).sum(axis=1)
