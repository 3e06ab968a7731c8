"""Opens checkpoints of either kind for reading, and supplies their parameters for any target.

When a source is opened, before anything is written, it checks that its parts fit together.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dynmoe.conversion import routing_settings
from megatron_dynmoe.conversion.formats import format_in
from megatron_dynmoe.conversion.formats.common import dtype_name
from megatron_dynmoe.conversion.hugging_face import card, words
from megatron_dynmoe.conversion.hugging_face.folder import ModelFolder, cast
from megatron_dynmoe.conversion.hugging_face.words import CONFIG
from megatron_dynmoe.conversion.megatron import settings as megatron_settings
from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint, checkpoint_folder
from megatron_dynmoe.conversion.model_settings import (
    check_config,
    partial_rotary_factor,
    rope_theta,
)
from megatron_dynmoe.conversion.names import (
    MEGATRON,
    PARAMETERS,
    ROUTER_MAP,
    Row,
    in_halves,
    router_entry,
    rows_by_part,
)
from megatron_dynmoe.conversion.shapes import Block, Shapes
from megatron_dynmoe.layers.rules import LAYER_RULES
from megatron_dynmoe.settings.distribution import TargetDistribution
from megatron_dynmoe.settings.hybrid_pattern import is_in_pairs
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.storage.manifest import check_manifest

_TIED = ("lm_head", "embedding")
_OLD_FREQUENCIES = ".self_attn.rotary_emb.inv_freq"


class Source(Protocol):
    """A checkpoint of any kind, opened for reading."""

    config: dict[str, Any]
    shapes: Shapes
    table: tuple[Row, ...]
    dtype: str  # of the weights: float32, bfloat16 or float16
    about: dict[str, Any]  # what is known of the training, for the model card
    token_ids: dict[str, Any]  # those that the source states itself
    generation: dict[str, Any]  # what its generation_config.json says
    remarks: list[str]  # what of the source has no place in any target

    def read(self, block: Block) -> Tensor:
        """A block of one of the table's rows."""


class FromMegatron:
    """A Megatron checkpoint of any layout."""

    table = MEGATRON

    def __init__(
        self,
        load: Path,
        iteration: int | None = None,
        progress: bool = False,
        *,
        is_checked: bool = False,
    ) -> None:
        """Open a checkpoint.

        Args:
            is_checked: whether the caller has compared its files with the manifest.
        """
        if not is_checked:
            _check_hashes(checkpoint_folder(load, iteration), progress)
        self.checkpoint = MegatronCheckpoint(load, iteration)
        args = self.checkpoint.args
        self._has_pattern = is_in_pairs(getattr(args, "hybrid_layer_pattern", None))
        key, _ = self.checkpoint.find(("embedding.word_embeddings.weight",), None)
        vocab_size = self.checkpoint.shape(key)[0]
        num_layers = self.checkpoint.num_layers
        if getattr(args, "num_layers", None) != num_layers:
            raise ValueError(
                f"{self.checkpoint.folder}: the saved arguments say num_layers "
                f"{getattr(args, 'num_layers', None)!r}, the weights have {num_layers} layers"
            )
        try:
            # The config says which layers have a state, so it is made twice: without and with it.
            unread: routing_settings.RouterState = defaultdict(list)
            self.config = megatron_settings.config_from_megatron(args, vocab_size, unread)
            state = self._router_state()
            self.config = megatron_settings.config_from_megatron(args, vocab_size, state)
            check_config(self.config)
            self.about = card.about_training(args, self.checkpoint.iteration)
            carried, self.generation = words.carried_in(getattr(args, "huggingface_source", None))
            self.token_ids = words.stated_ids(carried)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.checkpoint.folder}: the saved arguments do not say what the model is, or "
                f"say what cannot be converted: {error}"
            ) from error
        self.remarks: list[str] = []
        self.shapes = Shapes(self.config)
        self.dtype = megatron_settings.model_dtype(args)
        self._check()

    def read(self, block: Block) -> Tensor:
        key, index = self._find(block.row.keys, block.layer)
        return self.checkpoint.read(key, index if block.expert is None else (*index, block.expert))

    def _find(self, keys: Iterable[str], layer: int | None) -> tuple[str, tuple[int, ...]]:
        """As :meth:`MegatronCheckpoint.find`, with the layers of the table."""
        places = [self._place(key, layer) for key in keys]
        return self.checkpoint.find([key for key, _ in places], places[0][1])

    def _place(self, key: str, layer: int | None) -> tuple[str, int | None]:
        return in_halves(key, layer) if self._has_pattern else (key, layer)

    def _router_state(self) -> routing_settings.RouterState:
        if self.config["routing"] == "top_k":
            return {}
        layers = range(len(self._layer_types))
        rule = LAYER_RULES.get(self.config["routing"])
        lengths = {} if rule is None else rule.lengths(self.config["num_experts"])
        state: routing_settings.RouterState = {
            name: [self._scalar(router_entry(name), layer) for layer in layers]
            for name in routing_settings.state_entries(self.config["routing"])
            if name not in lengths
        }
        for name, length in lengths.items():
            state[name] = [self._numbers(router_entry(name), layer, length) for layer in layers]
        if self.config["normalization"] == "drn":
            template = rows_by_part(MEGATRON)["theta_offset"].key
            offsets = [self._scalar(template, layer) for layer in range(len(self._layer_types))]
            state["theta"] = thetas(offsets)
        if routing_settings.is_drawn(self.config):
            for name, template in ROUTER_MAP.items():
                state[name] = [self._numbers(template, k) for k in range(len(self._layer_types))]
        return state

    @property
    def _layer_types(self) -> list[str]:
        return self.config["mlp_layer_types"]

    def _scalar(self, template: str, layer: int) -> float | None:
        numbers = self._numbers(template, layer, 1)
        return None if numbers is None else numbers[0]

    def _numbers(
        self, template: str, layer: int, count: int = TargetDistribution.NUM_KNOTS
    ) -> list[float] | None:
        if self._layer_types[layer] != "sparse":
            return None
        key, index = self._find((template,), layer)
        found = self.checkpoint.shape(key)[len(index) :]
        _check_shape(str(self.checkpoint.folder), key, found, (count,))
        values = self.checkpoint.read(key, index).tolist()
        for value in values:
            if not math.isfinite(value):
                raise ValueError(
                    f"{self.checkpoint.folder}: {key} of layer {layer} is {value}: the run had "
                    "gone wrong; take an earlier iteration"
                )
        return [routing_settings.shortest(value) for value in values]

    def _check(self) -> None:
        """Check that every entry is known and has the shape that the settings give it."""
        templates = [router_entry(name) for name in routing_settings.STATE]
        known: set[str] = set()
        for layer in range(self.shapes.num_layers):
            known.update(self._known(templates, layer))
        for row in MEGATRON:
            for block in self.shapes.blocks(row):
                where = str(self.checkpoint.folder)
                key, index = self._find(row.keys, block.layer)
                lead = (self.shapes.num_layers,) if index else ()
                if block.expert is not None:
                    lead = (*lead, self.shapes.num_experts)
                shape = (*lead, *self.shapes.of_row(row))
                _check_shape(where, key, self.checkpoint.shape(key), shape)
                _check_dtype(where, key, self.checkpoint.dtype(key), self.dtype)
                known.update(self._known(row.keys, block.layer))
        unknown = sorted(self.checkpoint.model_keys - known)
        if unknown:
            raise ValueError(
                f"{self.checkpoint.folder}: {unknown[0]} is part of the model, but the converter "
                "does not know it; nothing was written"
            )

    def _known(self, keys: Iterable[str], layer: int | None) -> Iterator[str]:
        """What entries with these keys may be called: layers lie along a dimension, or apart."""
        for key, number in (self._place(key, layer) for key in keys):
            yield key.replace("{layer}.", "")
            yield key.format(layer=number)


class FromFolder:
    """A Hugging Face folder of any of the formats."""

    def __init__(self, model: Path, progress: bool = False, *, is_checked: bool = False) -> None:
        """Open a folder; ``is_checked`` as above."""
        self.folder = ModelFolder(model)
        if not is_checked:
            _check_hashes(model, progress)
        theirs = self.folder.config
        self.format = format_in(model)
        self.table = self.format.rows
        self._check_num_layers()
        try:
            self.config = self.format.from_format(theirs)
            self.unread = self.format.unread_words(theirs, self.config)
            stated = dtype_name(theirs)
        except UsageError as error:
            raise UsageError(f"{model / CONFIG}: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{model / CONFIG}: {error}") from error
        self.token_ids = words.stated_ids(theirs)
        self.generation, dropped = words.generation_words(model)
        self.remarks = [
            f"{model / name} has {words.listed(left_out)}, which has no place in what is written"
            for name, left_out in (
                (CONFIG, {} if self.format.keeps_other_words else self.unread),
                (words.GENERATION_CONFIG, dropped),
            )
            if left_out
        ]
        self.shapes = Shapes(self.config)
        embedding = rows_by_part(self.table)["embedding"].key
        self.dtype = str(self.folder.dtype(embedding)).removeprefix("torch.")
        self.about = {"converted from": f"a folder of format {self.format.name}"}
        # None: a layout with rotary frequencies, in a folder without them, which its code can do
        self.inv_freq_dtype = None if self.format.inv_freq_key else "float32"
        self._check(stated)

    def read(self, block: Block) -> Tensor:
        return self.folder.read(block.key, block.expert if block.row.stacked else None)

    def _check_num_layers(self) -> None:
        """Compare the number of layers with the weights, before anything is made for each layer."""
        word = self.format.layers_word
        stated = self.folder.config.get(word)
        before = {row.key.split("{layer}")[0] for row in self.table if "{layer}" in row.key}
        pattern = re.compile(rf"(?:{'|'.join(map(re.escape, before))})(\d+)\.")
        found = len({match[1] for match in map(pattern.match, self.folder.keys) if match})
        if stated != found or isinstance(stated, bool):
            raise ValueError(
                f"{self.folder.folder / CONFIG}: {word} is {stated!r}, the weights have {found} "
                "layers"
            )

    def _check(self, stated: str | None) -> None:
        unknown = self.folder.keys
        for row in self.table:
            for block in self.shapes.blocks(row):
                found = self.folder.shape(block.key)
                if row.stacked:
                    found = found[1:] if found[:1] == (self.shapes.num_experts,) else found
                where = str(self.folder.file_of(block.key))
                _check_shape(where, block.key, found, self.shapes.of_row(row))
                _check_dtype(where, block.key, self.folder.dtype(block.key), self.dtype)
                unknown.discard(block.key)
        if self.format.inv_freq_key is not None:
            unknown -= self._check_inv_freq(self.format.inv_freq_key)
        unknown -= self._checked_tied_head() | self._checked_frequencies()
        if unknown:
            key = sorted(unknown)[0]
            raise ValueError(
                f"{self.folder.file_of(key)}: {key} has no place in a model of this config.json; "
                "nothing was written"
            )
        if stated not in (None, self.dtype):
            raise ValueError(
                f"{self.folder.folder}/{CONFIG} says {stated}, the weights are {self.dtype}"
            )
        if self.config["normalization"] == "drn" and self.config["theta"] is not None:
            self._check_thetas()

    def _check_inv_freq(self, template: str) -> set[str]:
        """Check the rotary frequencies, which follow from the settings."""
        keys = {template.format(layer=layer) for layer in range(self.shapes.num_layers)}
        for key in sorted(keys & self.folder.keys):
            where, shape = str(self.folder.file_of(key)), (self.config["head_dim"] // 2,)
            _check_shape(where, key, self.folder.shape(key), shape)
            found = self.folder.read(key)
            if not torch.equal(found, inv_freq(self.config["head_dim"]).to(found.dtype)):
                raise ValueError(f"{where}: {key} is not that of a rotary base of 10000")
            self.inv_freq_dtype = str(self.folder.dtype(key)).removeprefix("torch.")
        return keys

    def _checked_tied_head(self) -> set[str]:
        """The key of an output layer that repeats the embedding, as in the published Qwen3-0.6B."""
        rows = rows_by_part(self.table)
        head, embedding = (rows[part].key if part in rows else "" for part in _TIED)
        if not self.config["tie_word_embeddings"] or head not in self.folder.keys:
            return set()
        both = self.folder.read(head), self.folder.read(embedding)
        if both[0].dtype != both[1].dtype or not torch.equal(*both):
            raise ValueError(
                f"{self.folder.file_of(head)}: {head} differs from {embedding}, and "
                f"{self.folder.folder / CONFIG} says that they are one (tie_word_embeddings): set "
                f"tie_word_embeddings to false to keep both, or take {head} out"
            )
        return {head}

    def _checked_frequencies(self) -> set[str]:
        """The keys of rotary frequencies, which Transformers wrote into every folder until 4.31.

        It reads the config's base instead, so they only have to agree with it.
        """
        base, size = rope_theta(self.config), self.config["head_dim"]
        size = int(size * partial_rotary_factor(self.config))
        keys = {key for key in self.folder.keys if key.endswith(_OLD_FREQUENCIES)}
        for key in sorted(keys):
            where = str(self.folder.file_of(key))
            _check_shape(where, key, self.folder.shape(key), (size // 2,))
            found = self.folder.read(key).float()
            if not torch.allclose(found, inv_freq(size, base), rtol=2**-7, atol=0):
                raise ValueError(
                    f"{where}: {key} is not that of {self.folder.folder / CONFIG}, whose "
                    f"rope_theta is {base:g}: the model was trained with other positions; state "
                    "them in config.json"
                )
        return keys

    def _check_thetas(self) -> None:
        found = theta_in(self, getattr(torch, self.dtype))["theta"]
        # Compared in float32, because the folder may state more decimals than needed.
        stated = [None if value is None else np.float32(value) for value in self.config["theta"]]
        if stated != [None if value is None else np.float32(value) for value in found]:
            raise ValueError(
                f"{self.folder.folder}/{CONFIG}: theta is {self.config['theta']}, the weights say "
                f"{found} (1 + theta_offset): change theta_offset to change theta"
            )


class Weights:
    """Puts the parameters of a source together as a target's table of names demands."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._rows = rows_by_part(source.table)
        self._last: tuple[Block, Tensor] | None = None

    def block(self, block: Block) -> Tensor:
        """A block of the target's table."""
        parts = [self._part(part, block) for part in block.row.parts]
        return self._source.shapes.join(block.row, parts)

    def stacked(self, blocks: list[Block], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Blocks of one shape along a new first dimension, without a second copy of all."""
        target = torch.empty((len(blocks), *shape), dtype=dtype)
        for place, block in zip(target, blocks, strict=True):
            place.copy_(cast(self.block(block), dtype, f"{block.key}, expert {block.expert},"))
        return target

    def _of_source(self, part: str, block: Block) -> Block | None:
        row = self._rows.get(part)
        needed = PARAMETERS[part].when
        if row is None or (needed is not None and not self._source.shapes.has[needed]):
            return None
        return Block(row, block.layer, block.expert)

    def _part(self, part: str, block: Block) -> Tensor:
        source = self._of_source(part, block)
        if source is None:
            # Only theta_offset can be new, if another routing was asked for. It starts at 0.
            return torch.zeros(self._source.shapes.of_part(part))
        if self._last is None or self._last[0] != source:
            self._last = source, self._source.read(source)
        return self._source.shapes.part(source.row, part, self._last[1])


def theta_in(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """The config's ``theta`` after theta_offset was rounded to the dtype of the weights."""
    row = rows_by_part(source.table).get("theta_offset")
    offsets: list[float | None] = [None] * source.shapes.num_layers
    blocks = list(source.shapes.blocks(row)) if row is not None else []
    for block in blocks:
        offsets[block.layer] = cast(source.read(block), dtype, block.key).item()  # type: ignore[index]
    return {"theta": thetas(offsets)} if blocks else {}


def thetas(offsets: list[float | None]) -> list[float | None]:
    """The scale that each layer uses, computed as training does: 1 + offset in float32."""
    return [
        None if offset is None else routing_settings.shortest(1 + torch.tensor(offset).item())
        for offset in offsets
    ]


def inv_freq(head_dim: int, base: float = 10000) -> Tensor:
    """The rotary frequencies of a base, [head_dim / 2] float32."""
    return 1.0 / (base ** (torch.arange(0, head_dim, 2).float() / head_dim))


def in_order(shapes: Shapes, table: tuple[Row, ...]) -> list[Block]:
    """All blocks of a model by layer and expert, so that a source is read from front to back."""
    blocks = [block for row in table for block in shapes.blocks(row)]
    return sorted(blocks, key=lambda block: [-1 if x is None else x for x in block[1:]])


def progress_bar(name: str, total: int | None, show: bool) -> Any:
    """A bar that counts bytes."""
    return tqdm(desc=name, total=total, unit="B", unit_scale=True, disable=not show, leave=False)


def _check_shape(where: str, key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != expected:
        raise ValueError(
            f"{where}: {key} has the shape {list(found)}, the settings say {list(expected)}"
        )


def _check_dtype(where: str, key: str, found: torch.dtype, expected: str) -> None:
    if found != getattr(torch, expected):
        raise ValueError(f"{where}: {key} is of type {found}, the model's weights are {expected}")


def _check_hashes(folder: Path, progress: bool) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    with progress_bar("checking hashes", size, progress) as bar:
        check_manifest(folder, bar.update)
