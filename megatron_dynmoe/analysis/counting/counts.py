"""The counts of a model's routing: integers, so that any two counts can be added.

Letters: L MoE layers, E experts, S positions of a window, V vocabulary, B bags of documents, K bins
of experts, N bins of loss.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np

from megatron_dynmoe.analysis.counting import influences

# Losses are integers, too, in units of this many nats, so their sums are exact in any order.
LOSS_UNIT = 2.0**-20
# Documents are dealt to bags, and the bootstrap draws bags: their number bounds the memory.
NUM_BAGS = 64
# Ranks are those of bins: steps of about 6 % in the loss, and the number of experts of a token over
# all layers, exactly if it has no more values than this.
NUM_LOSS_BINS = 128
MAX_EXPERT_BINS = 256


class Shape(NamedTuple):
    """The sizes that counts share; only counts of equal sizes add up."""

    layers: int  # MoE layers
    experts: int
    positions: int  # of a window
    vocabulary: int


@dataclass
class RoutingCounts:
    """The counts of a group's tokens. Every entry is a sum over tokens, int64."""

    shape: Shape
    documents: int = 0
    windows: int = 0
    tokens: int = 0
    predicted: int = 0  # tokens with a loss: all but the first of a window
    loss: int = 0  # of those, in LOSS_UNIT
    # Tokens of a layer that use 0 .. E experts
    experts_LK: np.ndarray = field(init=False)
    # Tokens that use 0 .. L*E experts, all layers together
    total_K: np.ndarray = field(init=False)
    # Tokens of each expert, and of each two of them
    load_LE: np.ndarray = field(init=False)
    together_LEE: np.ndarray = field(init=False)
    # By position in the window: tokens, and their experts
    position_S: np.ndarray = field(init=False)
    position_LS: np.ndarray = field(init=False)
    # By token: how often it appears, its experts in all layers, how often with a loss, that loss
    vocab_V: np.ndarray = field(init=False)
    vocab_experts_V: np.ndarray = field(init=False)
    vocab_predicted_V: np.ndarray = field(init=False)
    vocab_loss_V: np.ndarray = field(init=False)
    # How often one could tell whether the token was a whole word, and how often it was one
    vocab_judged_V: np.ndarray = field(init=False)
    vocab_word_V: np.ndarray = field(init=False)
    # Tokens by experts, and by the loss of the token itself or of the token after it
    own_loss_BKN: np.ndarray = field(init=False)
    next_loss_BKN: np.ndarray = field(init=False)
    # See influences.py
    influence_DLCMQ: np.ndarray = field(init=False)
    influences_DPQQ: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        layers, experts, positions, vocabulary = self.shape
        ranks = (NUM_BAGS, expert_bins(self.shape)[-1] + 1, NUM_LOSS_BINS)
        sizes = {
            "experts_LK": (layers, experts + 1),
            "total_K": (layers * experts + 1,),
            "load_LE": (layers, experts),
            "together_LEE": (layers, experts, experts),
            "position_S": (positions,),
            "position_LS": (layers, positions),
            "own_loss_BKN": ranks,
            "next_loss_BKN": ranks,
            **influences.sizes(layers),
        }
        for name in array_names():
            setattr(self, name, np.zeros(sizes.get(name, (vocabulary,)), dtype=np.int64))

    def __iadd__(self, other: Self) -> Self:
        """Add the counts of other tokens.

        Raises:
            ValueError: they come from another model, or from windows of another length.
        """
        if self.shape != other.shape:
            raise ValueError(
                f"counts of {self.shape} and of {other.shape} do not add up: they are of different "
                "models, or of windows of different lengths"
            )
        for name in NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in array_names():
            getattr(self, name).__iadd__(getattr(other, name))
        return self

    def to_json(self) -> dict[str, Any]:
        """Every number; an array that is mostly zeros is given as places and values."""
        content: dict[str, Any] = {name: getattr(self, name) for name in NUMBERS}
        for name in array_names():
            array = getattr(self, name)
            places = np.flatnonzero(array)
            content[name] = {"shape": list(array.shape)}
            if 2 * len(places) < array.size:
                content[name]["places"] = places.tolist()
                content[name]["values"] = array.ravel()[places].tolist()
            else:
                content[name]["values"] = array.ravel().tolist()
        return content

    @classmethod
    def from_json(cls, shape: Shape, content: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: an entry is missing, has another size or is not a count, or entries
                contradict each other.
        """
        counts = cls(shape)
        try:
            for name in NUMBERS:
                if type(content[name]) is not int or content[name] < 0:
                    raise ValueError(f"{name} is {content[name]!r}: a count is a whole number")
                setattr(counts, name, content[name])
            for name in array_names():
                array, entry = getattr(counts, name), content[name]
                if entry["shape"] != list(array.shape):
                    raise ValueError(f"{name} has the shape {entry['shape']}, not {array.shape}")
                values = np.array(entry["values"])
                if values.size and (values.dtype.kind != "i" or values.min() < 0):
                    raise ValueError(
                        f"{name} holds something that is not a count: counts are whole numbers"
                    )
                array.ravel()[entry.get("places", slice(None))] = values
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"its counts are incomplete or damaged: {error!r}") from error
        for name, axis in (("total_K", None), ("vocab_V", None), ("experts_LK", 1)):
            if not counts.tokens or (getattr(counts, name).sum(axis=axis) != counts.tokens).any():
                raise ValueError(f"tokens is {counts.tokens}, which is not what {name} adds up to")
        return counts


NUMBERS = ("documents", "windows", "tokens", "predicted", "loss")


def array_names() -> list[str]:
    """The names of the fields that are arrays."""
    return [field.name for field in fields(RoutingCounts) if not field.init]


def add_up(groups: dict[str, RoutingCounts]) -> RoutingCounts:
    """The counts of all groups together; at least one."""
    total = RoutingCounts(next(iter(groups.values())).shape)
    for counts in groups.values():
        total += counts
    return total


@lru_cache
def expert_bins(shape: Shape) -> np.ndarray:
    """The bin of each number of experts 0 .. L*E of a token: one each, or equal ratios."""
    totals = np.arange(shape.layers * shape.experts + 1)
    if len(totals) <= MAX_EXPERT_BINS:
        return totals
    ratios = np.log(np.maximum(totals, shape.layers) / shape.layers) / np.log(shape.experts)
    return np.floor(ratios * (MAX_EXPERT_BINS - 1)).astype(np.int64)


def loss_bins(loss: np.ndarray) -> np.ndarray:
    """The bins of losses in LOSS_UNIT: in equal ratios above about 0.03 nats."""
    bins = np.floor(12 * np.log2(1 + 32 * LOSS_UNIT * loss))
    return np.clip(bins, 0, NUM_LOSS_BINS - 1).astype(np.int64)


def loss_of_bin(number: int | np.ndarray) -> Any:
    """The smallest loss of a bin, in nats."""
    return (2.0 ** (np.asarray(number) / 12) - 1) / 32


def bag_of(group: str, document: int) -> int:
    """The bag of a document: as if drawn at random, but always the same."""
    return zlib.crc32(f"{group}\n{document}".encode()) % NUM_BAGS
