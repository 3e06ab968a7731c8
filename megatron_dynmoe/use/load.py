"""Loads model and tokenizer from a folder for the command lines, and runs no code from the folder.

It reads only safetensors and fetches nothing from a hub. A tensor that is missing or unknown is an
error and not a random weight. Errors are plain. A folder may be hostile: see SECURITY.md.
"""

from __future__ import annotations

import math
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_dynmoe.conversion.convert import Target, to_hf
from megatron_dynmoe.conversion.formats import FORMATS, OURS, format_in
from megatron_dynmoe.conversion.hugging_face.folder import (
    ModelFolder,
    check_is_folder,
    check_is_model,
)
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.refusals import in_few_words
from megatron_dynmoe.storage.json_files import read_json
from megatron_dynmoe.storage.megatron_names import TRACKER

# If a model declares more than this many times the numbers that are stored, it is not a real one.
# Quantized models store eight numbers in one.
MAX_DECLARED = 16


@contextmanager
def in_our_format(
    model: Path,
    tokenizer: Path | None = None,
    *,
    beside: Path | None = None,
) -> Iterator[Path]:
    """A folder in our format: the given one, or a conversion of it that is removed at the end.

    Args:
        model: a folder in any format that can be converted, or the checkpoints that ``--save``
            named in training, of any layout: the latest, or the folder of one of them.
        tokenizer: the tokenizer of the training, for a Megatron checkpoint that names none.
        beside: the folder in which the conversion lies; the system's for temporary files if None.

    Raises:
        UsageError: there is no such folder, it holds neither a model nor checkpoints, or there is
            no tokenizer for a Megatron checkpoint.
        ValueError: the model is of another type, or cannot be converted.
    """
    check_is_folder(model)
    has_config = (model / "config.json").is_file()
    if has_config and format_in(model) is OURS:
        yield model
        return
    if not (has_config or (model / TRACKER).is_file() or (model / ".metadata").is_file()):
        raise UsageError(
            f"--model is {model}, which holds neither an exported model (config.json) nor the "
            f"checkpoints of a run ({TRACKER}): name one of those folders, such as checkpoints in "
            "a --run-dir"
        )
    with tempfile.TemporaryDirectory(prefix=".dynmoe-", dir=beside) as scratch:
        folder = Path(scratch) / "model"
        is_watched = sys.stderr.isatty()
        target = Target(folder, tokenizer=tokenizer, needs_tokenizer=True, progress=is_watched)
        to_hf(model, target)
        yield folder


def load_config(folder: Path) -> Any:
    """Load the configuration in ``folder``.

    Raises:
        ValueError: there is no folder or no config.json, or config.json is wrong.
    """
    import megatron_dynmoe.huggingface  # noqa: F401  (so that the folder's own code is not needed)

    check_is_model(folder)
    settings = read_json(folder / "config.json")
    _refuse_code_from_a_hub(folder, settings)
    format = next((one for one in FORMATS.values() if one.recognizes(settings)), None)
    if format is not None and not format.has_model_code:
        raise ValueError(
            f"model {folder} is of format {format.name} ({format.summary}), for which Transformers "
            f"has no code: dynmoe convert to-hf --load {shlex.quote(str(folder))} --output DIR "
            "makes one of ours"
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: {in_few_words(error)}") from error


def _refuse_code_from_a_hub(folder: Path, settings: Any) -> None:
    """Refuse an implementation from a hub (OWNER/NAME).

    Transformers would fetch and run it, whatever ``trust_remote_code`` is.

    Raises:
        ValueError: config.json names one, at any depth.
    """
    if not isinstance(settings, dict):
        return
    for name, value in settings.items():
        if name.endswith("_implementation") and "/" in str(value):
            raise ValueError(
                f"{folder / 'config.json'}: {name} is {str(value)[:80]!r}, which is code from a "
                "hub and not run here: take it out of the file"
            )
        _refuse_code_from_a_hub(folder, value)


def load_model(folder: Path, config: Any, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """Load the causal language model in ``folder``, in evaluation mode.

    Args:
        config: from :func:`load_config`, with changes if wanted; the model keeps it.
        dtype: one of the choices of ``--dtype``; ``auto`` keeps the stored dtype.
        device: a device such as ``cpu`` or ``cuda``.

    Raises:
        UsageError: there is no such device.
        ValueError: weights that are missing, damaged or do not fit.
    """
    try:
        torch.empty(0, device=device)
    except Exception as error:  # of several kinds
        raise UsageError(
            f"--device is {device}, which is not here: {in_few_words(error)}"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model {folder}: it has no .safetensors file (weights in pickle files are not read)"
        )
    check_sizes(folder, config)
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        for kind in ("missing", "unexpected", "mismatched"):
            if keys := sorted(str(key) for key in found[f"{kind}_keys"]):
                raise ValueError(f"{len(keys)} {kind} weights, the first is {keys[0]}")
        return model.to(device).eval()
    except KeyboardInterrupt:
        raise
    except Exception as error:  # safetensors and torch raise several kinds of their own
        raise ValueError(f"model {folder}: {in_few_words(error)}") from error


def check_sizes(folder: Path, config: Any) -> None:
    """Compare what config.json declares with what is stored, before memory is allocated for it.

    Raises:
        ValueError: the weights cannot be read, lie elsewhere, or are far too few.
    """
    weights, text = ModelFolder(folder), config.get_text_config()
    stored = sum(math.prod(weights.shape(key)) for key in weights.keys)
    try:
        # The first three checks only make sure that the model can be built, on the meta device.
        layers = text.num_hidden_layers
        _check_declared("num_hidden_layers", layers, layers, len(weights.keys))
        for name in ("vocab_size", "num_experts", "num_local_experts"):
            if (number := getattr(text, name, None)) is not None:
                _check_declared(name, number, number * text.hidden_size, stored)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        declared = sum(parameter.numel() for parameter in model.parameters())
        _check_declared("the number of parameters", declared, declared, stored)
    except Exception as error:  # whatever a model's code makes of strange settings
        raise ValueError(f"{folder / 'config.json'}: {in_few_words(error)}") from error


def _check_declared(name: str, value: int, needed: int, stored: int) -> None:
    if needed > MAX_DECLARED * stored:
        raise ValueError(
            f"{name} is {value:,}, for which the weights that are stored are much too few: the "
            "file is not that of these weights"
        )


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in ``folder``.

    Raises:
        ValueError: there is no tokenizer, or it cannot be read.
    """
    if not any(folder.glob("tokenizer*")):
        raise ValueError(
            f"model {folder}: it has no tokenizer (no tokenizer.json or tokenizer.model): export "
            "the model with one, or copy the files of the training tokenizer into the folder"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"tokenizer in {folder}: {in_few_words(error)}") from error


def check_ids(largest: int, config: Any) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        ValueError: the folder's tokenizer is not the model's.
    """
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives the id {largest}, and the model knows 0 to "
            f"{config.vocab_size - 1}: it is another model's tokenizer"
        )


def ids_to_suppress(model: Any, tokenizer: Any) -> list[int] | None:
    """The ids that no text gets: those without a token, and those that the model suppresses.

    Megatron pads the embedding to a multiple. Training lowers the logits of these rows but a little
    in each step, so a young model may choose one, for which nothing would be written. An export
    does not list them, because somebody who trains it further may give them a meaning.
    """
    known = set(tokenizer.get_vocab().values())
    never = {number for number in range(model.config.vocab_size) if number not in known}
    return sorted(never.union(model.generation_config.suppress_tokens or ())) or None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def be_quiet() -> None:
    """Keep transformers' hints and progress bars off the terminal; errors are raised anyway."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
