"""Converts Megatron's checkpoints to Hugging Face folders and back.

A target asks for its tensors one after the other, and the source, of any kind, supplies the
parameters inside them. Nothing is computed, only copied, so a round trip gives every bit back.
"""

from __future__ import annotations

import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dynmoe.conversion import routing_settings
from megatron_dynmoe.conversion.formats import OURS, format_named
from megatron_dynmoe.conversion.formats.format import Format
from megatron_dynmoe.conversion.hugging_face import card, words
from megatron_dynmoe.conversion.hugging_face.folder import WEIGHT_DTYPES, Entry, write_shards
from megatron_dynmoe.conversion.hugging_face.words import CONFIG
from megatron_dynmoe.conversion.megatron import settings as megatron_settings
from megatron_dynmoe.conversion.megatron.writer import MegatronWriter
from megatron_dynmoe.conversion.model_settings import TOKEN_IDS
from megatron_dynmoe.conversion.names import MEGATRON, Row, router_entry
from megatron_dynmoe.conversion.shapes import Block, Shapes
from megatron_dynmoe.conversion.sources import (
    FromFolder,
    FromMegatron,
    Source,
    Weights,
    in_order,
    inv_freq,
    progress_bar,
    theta_in,
)
from megatron_dynmoe.conversion.upcycle import Upcycled, Upcycling
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.outputs import check_new_folder
from megatron_dynmoe.storage.atomic import new_folder
from megatron_dynmoe.storage.json_files import write_json
from megatron_dynmoe.storage.manifest import write_manifest

FLAGS = "training_flags.txt"
_TOKENIZER_ARGS = ("tokenizer_type", "tokenizer_model")


class Target(NamedTuple):
    """A Hugging Face folder to write.

    Attributes:
        folder: its path.
        format: one of :data:`megatron_dynmoe.conversion.formats.FORMATS`.
        dtype: the dtype of the weights: float32, bfloat16 or float16; unchanged if None.
        max_shard_size: the most bytes of a file of weights.
        tokenizer: the tokenizer to write beside the weights; the source's own if None.
        needs_tokenizer: whether to refuse a Megatron checkpoint for which there is none.
        overwrite: whether to replace a folder that is not empty.
        progress: whether to show a bar.
    """

    folder: Path
    format: str = OURS.name
    dtype: str | None = None
    max_shard_size: int = 4 * 10**9
    tokenizer: Path | None = None
    needs_tokenizer: bool = False
    overwrite: bool = False
    progress: bool = False


def to_hf(load: Path, target: Target, iteration: int | None = None) -> None:
    """Write a Megatron checkpoint, or a Hugging Face folder of any format, as such a folder.

    Args:
        load: a folder for ``--load``, or a folder with a config.json.
        iteration: the iteration of the checkpoint; the latest if None.

    Raises:
        UsageError: there is no such source, the target may not be written, or there is no tokenizer
            although one is needed.
        ValueError: the source is damaged, there is no such format, or it cannot express the model.
    """
    format_named(target.format)
    check_new_folder(target.folder, target.overwrite, source=load)
    if (load / CONFIG).is_file():
        if iteration is not None:
            raise UsageError(f"--iteration: {load} is a Hugging Face folder, which has none")
        model = FromFolder(load, target.progress)
        tokenizer = target.tokenizer or (load if has_tokenizer(load) else None)
        write_folder(model, target._replace(tokenizer=tokenizer), model.inv_freq_dtype)
        return
    source = FromMegatron(load, iteration, target.progress)
    args = source.checkpoint.args
    named, tokenizer = getattr(args, "tokenizer_model", None), target.tokenizer
    if tokenizer is None and isinstance(named, str) and Path(named).exists():
        tokenizer = Path(named)
    missing = "the checkpoint names none" if named is None else f"{named} is not here"
    if tokenizer is None and target.needs_tokenizer:
        raise UsageError(f"{load} has no tokenizer: {missing}; give the training's as --tokenizer")
    write_folder(source, target._replace(tokenizer=tokenizer), _inv_freq_dtype(args))
    if tokenizer is None:
        say(f"no tokenizer is in {target.folder}: {missing}; give --tokenizer")


def write_folder(source: Source, target: Target, inv_freq_dtype: str | None = "float32") -> None:
    """Write any source as a Hugging Face folder; see :func:`to_hf`."""
    format, tokenizer = format_named(target.format), target.tokenizer
    dtype = target.dtype or source.dtype
    config = source.config | theta_in(source, getattr(torch, dtype))
    theirs = format.to_format(config, dtype)
    remarks = [*source.remarks]
    if lost := format.lost_words(config, dtype):
        remarks.append(f"format {format.name} has no word for {words.listed(lost)}: left out")
    beside, generation = words.words_beside(tokenizer)
    stated, generation = beside | source.token_ids, generation | source.generation
    entries = list(_entries(source, format, getattr(torch, dtype)))
    if format.inv_freq_key is not None and inv_freq_dtype is not None:
        entries += _inv_freq_entries(source, format.inv_freq_key, getattr(torch, inv_freq_dtype))
    with new_folder(target.folder, target.overwrite) as folder:
        write_json(folder / CONFIG, theirs)  # transformers reads a tokenizer only beside it
        special = {} if tokenizer is None else _write_tokenizer(tokenizer, folder)
        ids = words.written_ids({n: config.get(n) for n in TOKEN_IDS}, special, stated)
        write_json(folder / CONFIG, theirs | ids)
        if format.ships_code:
            from megatron_dynmoe.huggingface.shipping import write_code

            write_code(folder)
        known_ids = {name: value for name, value in ids.items() if value is not None}
        write_json(folder / words.GENERATION_CONFIG, known_ids | generation)
        num_bytes = sum(entry.num_bytes for entry in entries)
        with progress_bar("writing", num_bytes, target.progress) as bar:
            write_shards(folder, entries, target.max_shard_size, bar.update)
        card.write_card(folder, config, source.about, format.how_to_load, dtype)
        write_manifest(folder)
    for remark in remarks:
        say(remark)


def from_hf(
    model: Path,
    save: Path,
    *,
    routing: DynMoEConfig | None = None,
    upcycling: Upcycling | None = None,
    has_pattern: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> list[str]:
    """Write a Hugging Face folder as a checkpoint that Megatron trains on.

    Args:
        routing: a routing that replaces the folder's; its state is that of a training's start.
        upcycling: how to make experts of a dense model.
        has_pattern: whether the training is to have ``--hybrid-layer-pattern``.

    Returns:
        The flags of a training command that fit the model.

    Raises:
        UsageError: training does not have a setting of the model, the model cannot have the routing
            or the upcycling, or ``save`` may not be written.
        ValueError: the folder is damaged, or the model cannot be trained here.
    """
    check_new_folder(save, overwrite, source=model, flag="--save")
    folder = FromFolder(model, progress)
    source: Source = folder if upcycling is None else Upcycled(folder, upcycling)
    config = source.config
    if routing is not None:
        try:
            config = routing_settings.with_routing(config, routing)
        except ValueError as error:
            raise UsageError(f"--routing {routing.routing}: {error}") from error
    if upcycling is not None:
        upcycling.check_routing(config)
    try:
        args = megatron_settings.args_from_config(config, source.dtype, has_pattern)
    except UsageError as error:
        raise UsageError(f"{model / CONFIG}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{model / CONFIG}: {error}") from error
    shapes = Shapes(config)
    args["huggingface_source"] = {
        "format": folder.format.name,
        "inv_freq_dtype": folder.inv_freq_dtype,
        "words": {name: config[name] for name in words.CARRIED if name in config},
        "generation": source.generation,
        **({} if upcycling is None else {"upcycling": upcycling._asdict()}),
    }
    flags = megatron_settings.training_flags(config, source.dtype, has_pattern)
    if has_tokenizer(model):
        args["tokenizer_type"] = "HuggingFaceTokenizer"
        args["tokenizer_model"] = str(model.resolve())
        flags += [
            f"--{name.replace('_', '-')} {shlex.quote(args[name])}" for name in _TOKENIZER_ARGS
        ]
    weights = Weights(source)
    dtype = getattr(torch, source.dtype)
    alike = args["moe_layer_freq"] == 1
    writer = MegatronWriter(shapes.num_layers, shapes.num_experts, alike, has_pattern)
    total = 0
    with progress_bar("writing", None, progress) as bar:
        for block in in_order(shapes, MEGATRON):
            shape = shapes.of_row(block.row)
            copies = 1 + len(block.row.aliases)
            size = math.prod(shape) * dtype.itemsize
            total += copies * size
            writer.add(block, shape, dtype, _counted(weights.block, block, size, bar.update))
        bar.total = total
        _add_router_state(writer, config)
        with new_folder(save, overwrite) as new:
            writer.write(new, args)
            (new / FLAGS).write_text("\n".join(flags) + "\n")
    for remark in [*source.remarks, *_lost_in_training(folder, config, args)]:
        say(remark)
    return flags


def _lost_in_training(
    source: FromFolder, config: dict[str, Any], args: dict[str, Any]
) -> Iterator[str]:
    """Settings that neither the flags nor the state of the routers carry."""
    state = routing_settings.router_state(config) | {"theta": config["theta"]}
    back = megatron_settings.config_from_megatron(Namespace(**args), config["vocab_size"], state)
    kept = source.unread if source.format.keeps_other_words else {}
    if lost := words.changed(config, back) | kept:
        yield f"training has no flag for {words.listed(lost)}: left out"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer for transformers."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def say(message: str) -> None:
    """Print a remark for the person at the terminal."""
    print(message, file=sys.stderr)


def _entries(source: Source, format: Format, dtype: torch.dtype) -> Iterator[Entry]:
    weights, shapes = Weights(source), source.shapes
    for block in in_order(shapes, format.rows):
        shape = shapes.of_row(block.row)
        if not block.row.stacked:
            yield Entry(block.key, shape, dtype, partial(weights.block, block))
        elif block.expert == 0:
            experts = [block._replace(expert=expert) for expert in range(shapes.num_experts)]
            yield Entry(
                block.key,
                (len(experts), *shape),
                dtype,
                partial(weights.stacked, experts, shape, dtype),
            )


def _inv_freq_entries(source: Source, template: str, dtype: torch.dtype) -> list[Entry]:
    head_dim = source.config["head_dim"]
    return [
        Entry(
            template.format(layer=layer),
            (head_dim // 2,),
            dtype,
            lambda: inv_freq(head_dim).to(dtype),
        )
        for layer in range(source.shapes.num_layers)
    ]


def _inv_freq_dtype(args: Namespace) -> str | None:
    """The type of the rotary frequencies in the folder from which the checkpoint was made."""
    origin = getattr(args, "huggingface_source", None)
    dtype = origin.get("inv_freq_dtype") if isinstance(origin, dict) else "float32"
    if dtype not in (None, *WEIGHT_DTYPES.values()):
        raise ValueError(f"the saved arguments say {dtype!r} for the type of inv_freq")
    return dtype


def _add_router_state(writer: MegatronWriter, config: dict[str, Any]) -> None:
    if config["routing"] == "top_k":
        return
    for name, values in routing_settings.router_state(config).items():
        row = Row(router_entry(name), ("theta_offset",))
        for layer, value in enumerate(values):
            if value is not None:
                numbers = value if isinstance(value, list) else [value]
                make = partial(torch.tensor, numbers, dtype=torch.float32)
                writer.add(Block(row, layer), (len(numbers),), torch.float32, make)


def _write_tokenizer(tokenizer: Path, folder: Path) -> dict[str, Any]:
    import megatron_dynmoe.huggingface  # noqa: F401 - or transformers wonders about our config.json
    from megatron_dynmoe.conversion.hugging_face.tokenizer import (
        export_tokenizer,
        special_token_ids,
    )

    try:
        differing = export_tokenizer(tokenizer, folder)
    except UsageError as error:  # in the words of training, which has another flag for it
        raise UsageError(str(error).replace("--tokenizer-model", "--tokenizer", 1)) from error
    except (ValueError, OSError):
        raise
    except Exception as error:  # of whatever kind, from the libraries that read one
        raise ValueError(f"{tokenizer} is no tokenizer that can be read: {error}") from error
    for text in differing:
        say(f"the exported tokenizer gives other ids than the training's for {text!r}")
    return special_token_ids(folder)


def _counted(make: Any, block: Block, size: int, update: Any) -> Any:
    def counted() -> Tensor:
        update(size)
        return make(block)

    return counted
