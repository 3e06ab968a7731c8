"""Experts and layers that hold the same numbers: after training no two are alike.

The same is true of what the optimizer keeps of them, as far as its entries have names. It takes
other ways than the weights through a save, so that each of both may be copied alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check
from megatron_dynmoe.doctor.checkpoint.checks.values import Block, Place, Values, files_in_words
from megatron_dynmoe.doctor.checkpoint.reading.parts import numbers

_REMEDY = "take an earlier iteration, or convert again from the source with another converter"
_MEANT = "if the model was made by copying experts (upcycling), that is as it should be"
_SHOWN_ROWS = 2

Groups = tuple[tuple[int, ...], ...]  # numbers of experts or layers that hold the same


def check_copies(values: Values, is_upcycled: bool) -> Iterator[Check]:
    """Name experts that are copies of others of their layer, and what is the copy of another layer.

    Args:
        is_upcycled: whether the run began with copies of one dense layer.
    """
    state = WARNING if is_upcycled else FAILED
    remedy = _MEANT if is_upcycled else _REMEDY
    found = [*_experts(values), *_layers(values)]
    yield from (Check("copies", state, text, remedy) for text in found)
    if not found:
        num_experts = {e for _, blocks in _compared(values) for _, e in blocks if e is not None}
        what = f"experts 0 to {max(num_experts)} differ in every layer, and " if num_experts else ""
        yield Check("copies", PASSED, f"{what}the layers differ from each other")


def _compared(values: Values) -> Iterator[tuple[str, dict[Place, Block]]]:
    """The rows that say whether two layers or experts are alike: not those that begin as ones."""
    for (_, row), blocks in values.blocks.items():
        if row in values.matrices:
            yield row, blocks


def _experts(values: Values) -> Iterator[str]:
    alike: dict[Groups, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    files: dict[Groups, set[str]] = defaultdict(set)
    for row, blocks in _compared(values):
        by_layer: dict[int | None, dict[int, Block]] = defaultdict(dict)
        for (layer, expert), block in blocks.items():
            if expert is not None:
                by_layer[layer][expert] = block
        for layer, experts in by_layer.items():
            groups = _groups((block, expert) for expert, block in sorted(experts.items()))
            if groups:
                alike[groups][row].add(layer or 0)
                copied = (experts[number] for group in groups for number in group)
                files[groups] |= {file for block in copied for file in block.files}
    for groups, rows in alike.items():
        copies = [number for group in groups for number in group[1:]]
        originals = [group[0] for group in groups]
        layers = {layer for found in rows.values() for layer in found}
        yield (
            f"{_named('expert', copies)} {'are copies' if len(copies) > 1 else 'is a copy'} of "
            f"{_named('expert', originals)} in {_named('layer', layers)}: {_listed(rows)} "
            f"({files_in_words(files[groups])})"
        )


def _layers(values: Values) -> Iterator[str]:
    alike: dict[tuple[int, ...], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    files: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for row, blocks in _compared(values):
        by_signature: dict[object, list[tuple[Place, Block]]] = defaultdict(list)
        for place, block in blocks.items():
            if block.signature is not None and place[0] is not None:
                by_signature[block.signature].append((place, block))
        for found in by_signature.values():
            layers = tuple(sorted({place[0] or 0 for place, _ in found}))
            if len(layers) > 1:
                alike[layers][row] |= {place[1] for place, _ in found if place[1] is not None}
                files[layers] |= {file for _, block in found for file in block.files}
    for layers, rows in alike.items():
        experts = {expert for found in rows.values() for expert in found}
        of_experts = f" ({_named('expert', experts)})" if experts else ""
        yield (
            f"{_named('layer', layers[1:])} {'hold' if len(layers) > 2 else 'holds'} copies of "
            f"layer {layers[0]}: {_listed(rows)}{of_experts} ({files_in_words(files[layers])})"
        )


def _groups(blocks: Iterable[tuple[Block, int]]) -> Groups:
    """The numbers of those that hold the same, two or more in each group."""
    alike: dict[object, list[int]] = defaultdict(list)
    for block, number in blocks:
        if block.signature is not None:
            alike[block.signature].append(number)
    return tuple(tuple(group) for group in alike.values() if len(group) > 1)


def _named(name: str, found: Iterable[int]) -> str:
    unique = set(found)
    return f"{name}{'s' * (len(unique) > 1)} {numbers(unique)}"


def _listed(rows: Iterable[str]) -> str:
    names = sorted(rows)
    rest = len(names) - _SHOWN_ROWS
    return ", ".join(names[:_SHOWN_ROWS]) + (f" and {rest} more" if rest > 0 else "")
