"""Runs the model on windows of text and counts its routing. The model reads each token once.

Letters of dimensions are those of counts.py, and W windows of a block, T tokens.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_dynmoe.analysis.counting.counts import (
    LOSS_UNIT,
    NUM_LOSS_BINS,
    RoutingCounts,
    Shape,
    bag_of,
    expert_bins,
    loss_bins,
)
from megatron_dynmoe.analysis.counting.influences import (
    INFLUENCES,
    NUM_BAGS,
    NUM_BINS,
    Tokens,
    count,
    frequency_bins,
    position_bins,
    word_starts,
)
from megatron_dynmoe.analysis.counting.tokens import Letters, whole_words
from megatron_dynmoe.analysis.counting.windows import Window, in_blocks
from megatron_dynmoe.kernels.choose_cpu import choose, choose_top_k
from megatron_dynmoe.layers.rules import chooser

BLOCK_TOKENS = 4096
# How many logits exist at a time. They are by far the largest tensor: 16 MiB in float32.
LOGITS_AT_ONCE = 2**22


class Sample(NamedTuple):
    """A group's first window, token by token."""

    tokens: list[int]
    experts_LT: np.ndarray
    loss_T: list[float | None]  # nats


@dataclass(frozen=True)
class Collected:
    """What the model did with some windows."""

    groups: dict[str, RoutingCounts]
    samples: dict[str, Sample]


class _BlockResult(NamedTuple):
    """What the model did with a block of windows of a group, padded to the longest of them."""

    windows: list[Window]
    tokens_WS: np.ndarray
    documents_WS: np.ndarray
    map_LWSE: np.ndarray  # bool
    loss_WS: np.ndarray  # [windows, S - 1] int64, in LOSS_UNIT
    entropy_WS: np.ndarray  # the same of what is predicted from each token but the last

    @property
    def group(self) -> str:
        return self.windows[0].group


def shape_of(config: Any, positions: int) -> Shape:
    """The sizes of a model's counts with windows of ``positions`` tokens."""
    layers = config.mlp_layer_types.count("sparse")
    return Shape(layers, config.num_experts, positions, config.vocab_size)


def collect(
    model: Any,
    windows: Iterable[Window],
    shape: Shape,
    letters: Letters,
    *,
    sample_tokens: int = 0,
    on_tokens: Callable[[int], Any] = lambda _: None,
) -> Collected:
    """Count the routing of every token of every window.

    Args:
        model: a causal language model of ours, with routers, in evaluation mode.
        windows: windows of at most ``shape.positions`` tokens.
        letters: those of the tokenizer, see :mod:`megatron_dynmoe.analysis.counting.tokens`.
        sample_tokens: how many tokens of each group's first window to keep.
        on_tokens: called with the number of tokens that were counted since the last call.

    Raises:
        ValueError: routers or output give NaN or infinity.
    """
    groups: dict[str, RoutingCounts] = {}
    samples: dict[str, Sample] = {}

    def in_order() -> Iterator[Window]:
        """Order the groups as in the text, because the only block of a small group comes last."""
        for window in windows:
            if window.group not in groups:
                groups[window.group] = RoutingCounts(shape)
            yield window

    for result in _in_workers(model, in_blocks(in_order(), BLOCK_TOKENS)):
        if result.group not in samples:
            samples[result.group] = _sample(result, sample_tokens)
        _count(groups[result.group], result, letters)
        on_tokens(sum(len(window.tokens) for window in result.windows))
    return Collected(groups, {group: samples[group] for group in groups})


def _count(counts: RoutingCounts, result: _BlockResult, letters: Letters) -> None:
    """Add a block's windows, all of them at once: workers wait for each call."""
    shape, tokens_WS, loss_WS = counts.shape, result.tokens_WS, result.loss_WS
    lengths_W = np.array([len(window.tokens) for window in result.windows])
    length = tokens_WS.shape[1]
    valid_WS = np.arange(length) < lengths_W[:, None]
    predicted_WS = valid_WS[:, 1:]
    experts_LWS = result.map_LWSE.sum(axis=3) * valid_WS
    total_WS = experts_LWS.sum(axis=0)
    loss_T = loss_WS[predicted_WS]

    # Documents come in order: their number is that of the last one
    counts.documents = max(counts.documents, 1 + int(result.documents_WS.max()))
    places = np.unique(result.documents_WS, return_inverse=True)
    bags = np.array([bag_of(result.group, document) for document in places[0].tolist()])
    bag_WS = bags[places[1]].reshape(total_WS.shape)

    counts.windows += len(result.windows)
    counts.tokens += int(lengths_W.sum())
    counts.predicted += len(loss_T)
    counts.loss += int(loss_T.sum())
    for layer, experts_T in enumerate(experts_LWS[:, valid_WS]):
        counts.experts_LK[layer] += np.bincount(experts_T, minlength=shape.experts + 1)
    counts.total_K += np.bincount(total_WS[valid_WS], minlength=len(counts.total_K))

    # Sums of zeros and ones are exact in float32 up to 2**24 tokens.
    for layer, map_WSE in enumerate(result.map_LWSE):
        map_TE = map_WSE[valid_WS].astype(np.float32)
        counts.together_LEE[layer] += (map_TE.T @ map_TE).astype(np.int64)
    counts.load_LE[:] = counts.together_LEE.diagonal(axis1=1, axis2=2)

    bin_WS = np.stack([bag_WS, expert_bins(shape)[total_WS]])
    loss_bin_T = loss_bins(loss_T)
    for table_BKN, bins in (
        (counts.own_loss_BKN, bin_WS[:, :, 1:]),
        (counts.next_loss_BKN, bin_WS[:, :, :-1]),
    ):
        np.add.at(table_BKN, (*bins[:, predicted_WS], loss_bin_T), 1)
    _count_influences(counts, result, letters, valid_WS[:, 2:], experts_LWS, bag_WS)

    counts.position_S[:length] += valid_WS.sum(axis=0)
    counts.position_LS[:, :length] += experts_LWS.sum(axis=1)
    np.add.at(counts.vocab_V, tokens_WS[valid_WS], 1)
    np.add.at(counts.vocab_experts_V, tokens_WS[valid_WS], total_WS[valid_WS])
    np.add.at(counts.vocab_predicted_V, tokens_WS[:, 1:][predicted_WS], 1)
    np.add.at(counts.vocab_loss_V, tokens_WS[:, 1:][predicted_WS], loss_T)
    between_WS = valid_WS[:, 2:]
    judged_T = tokens_WS[:, 1:-1][between_WS]
    np.add.at(counts.vocab_judged_V, judged_T, 1)
    np.add.at(counts.vocab_word_V, judged_T, whole_words(tokens_WS, letters)[between_WS])


def _count_influences(
    counts: RoutingCounts,
    result: _BlockResult,
    letters: Letters,
    between_WS: np.ndarray,
    experts_LWS: np.ndarray,
    bag_WS: np.ndarray,
) -> None:
    """Add the tokens that have one before and one after; ``between_WS`` says which do."""
    tokens_WS, length = result.tokens_WS, result.tokens_WS.shape[1]
    # What came before is what came in windows before: the size of a block may not matter.
    frequency_WS = np.empty_like(tokens_WS)
    seen_V, num_seen = counts.vocab_V.copy(), int(counts.vocab_V.sum())
    for place, window in enumerate(result.windows):
        seen = seen_V[tokens_WS[place]]
        frequency_WS[place] = frequency_bins(seen, num_seen, counts.shape.vocabulary)
        np.add.at(seen_V, window.tokens, 1)
        num_seen += len(window.tokens)
    loss_bin_WS, entropy_bin_WS = (
        loss_bins(units_WS) * NUM_BINS // NUM_LOSS_BINS
        for units_WS in (result.loss_WS, result.entropy_WS)
    )
    influences = {
        "own_loss": loss_bin_WS[:, :-1],
        "next_loss": loss_bin_WS[:, 1:],
        "entropy": entropy_bin_WS[:, 1:],
        "frequency": frequency_WS[:, 1:-1],
        "position": np.broadcast_to(
            position_bins(length, counts.shape.positions)[1:-1], between_WS.shape
        ),
        "word_start": word_starts(tokens_WS[:, :-2], tokens_WS[:, 1:-1], letters).astype(int),
    }
    tokens = Tokens(
        bag_WS[:, 1:-1][between_WS] % NUM_BAGS,
        experts_LWS[:, :, 1:-1][:, between_WS],
        np.stack([influences[name][between_WS] for name in INFLUENCES]),
    )
    count(counts.influence_DLCMQ, counts.influences_DPQQ, tokens, counts.shape.experts)


def _sample(result: _BlockResult, num_tokens: int) -> Sample:
    tokens = result.windows[0].tokens[:num_tokens]
    losses = [None, *(result.loss_WS[0] * LOSS_UNIT).tolist()]
    return Sample(
        tokens, result.map_LWSE[:, 0].sum(axis=2)[:, : len(tokens)], losses[: len(tokens)]
    )


def _in_workers(model: Any, blocks: Iterator[list[Window]]) -> Iterator[_BlockResult]:
    """What the model does with each block, in order.

    On a CPU each core reads a block of its own with one thread. Threads that shared the many small
    products of one block would wait for each other more than they work, and rounding would depend
    on their number. Blocks are read only when they are needed.
    """
    on_cpu = model.device.type == "cpu"
    num_workers = len(os.sched_getaffinity(0)) if on_cpu else 1
    threads = torch.get_num_threads()
    waiting: deque[Future[_BlockResult]] = deque()
    pool = ThreadPoolExecutor(num_workers, initializer=_one_thread if on_cpu else None)
    try:
        for block in islice(blocks, 2 * num_workers):
            waiting.append(pool.submit(_run_block, model, block))
        while waiting:
            yield waiting.popleft().result()
            for block in islice(blocks, 1):
                waiting.append(pool.submit(_run_block, model, block))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _one_thread() -> None:
    torch.set_num_threads(1)


@torch.inference_mode()
def _run_block(model: Any, block: list[Window]) -> _BlockResult:
    # Nothing is masked: no token sees the padding after it.
    longest = max(len(window.tokens) for window in block)
    rows = [window.tokens + [0] * (longest - len(window.tokens)) for window in block]
    tokens_WS = torch.tensor(rows, device=model.device)
    output = model.model(tokens_WS, use_cache=False, output_router_logits=True)
    layers = [i for i, kind in enumerate(model.config.mlp_layer_types) if kind == "sparse"]
    maps = []
    for layer, logits_WSE in zip(layers, output.router_logits, strict=True):
        if not logits_WSE.isfinite().all():
            _refuse(block, f"the router of layer {layer + 1}")
        maps.append(_routing_map(model.config, layer, logits_WSE))
    map_LWSE = torch.stack(maps)
    if not torch.equal(map_LWSE.sum(dim=-1), output.experts_per_token):
        raise ValueError(
            "the experts that follow from the routers' logits are not those that the model used. "
            "Either the folder's code and this package differ, or the device computes differently "
            "each time: try --dtype float32 or --device cpu"
        )
    loss_WS, entropy_WS = _losses(model, output.last_hidden_state[:, :-1], tokens_WS[:, 1:])
    if not loss_WS.isfinite().all():
        _refuse(block, "the output layer")
    units = [(nats_WS.double() / LOSS_UNIT).round().long() for nats_WS in (loss_WS, entropy_WS)]
    documents = [
        window.documents + window.documents[-1:] * (longest - len(window.tokens))
        for window in block
    ]
    return _BlockResult(
        block,
        np.array(rows),
        np.array(documents),
        map_LWSE.cpu().numpy(),
        *(units_WS.cpu().numpy() for units_WS in units),
    )


def _routing_map(config: Any, layer: int, logits_WSE: Tensor) -> Tensor:
    """Which experts the layer chose, [W, S, E] bool, by the same functions that chose them."""
    if config.rule is not None:
        choose_by = chooser(vars(config), layer, config.cap(training=False), logits_WSE.device)
        map_TE = choose_by(logits_WSE.flatten(0, 1)).map_TE
        return map_TE.view(*logits_WSE.shape[:2], -1)
    probs_TE = logits_WSE.softmax(dim=-1).flatten(0, 1)
    if config.routing == "top_k":
        ids_TK, used_TK = choose_top_k(probs_TE, config.num_experts_per_tok)
    else:
        threshold, cap = config.threshold_and_cap(layer, training=False)
        ids_TK, used_TK = choose(probs_TE.float(), threshold, cap)
    map_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(-1, ids_TK, used_TK)
    return map_TE.view(logits_WSE.shape)


def _losses(model: Any, hidden_WSD: Tensor, labels_WS: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each token, and entropy of its prediction, [W, S] float32 nats each."""
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    losses, entropies = [], []
    for hidden_TD, labels_T in zip(
        hidden_WSD.flatten(0, 1).split(rows), labels_WS.flatten().split(rows), strict=True
    ):
        logits_TV = model.lm_head(hidden_TD).float()
        losses.append(torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none"))
        predicted = torch.distributions.Categorical(logits=logits_TV, validate_args=False)
        entropies.append(predicted.entropy())
    return torch.cat(losses).view(labels_WS.shape), torch.cat(entropies).view(labels_WS.shape)


def _refuse(block: list[Window], where: str) -> None:
    first, last = block[0], block[-1]
    raise ValueError(
        f"{where} gives NaN or infinity between the windows {first.number} and {last.number} of "
        f"{first.group!r}: the weights are damaged, or the numbers leave "
        "the range of their type: try --dtype float32"
    )
