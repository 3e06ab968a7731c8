"""Keys of a folder's JSON files that training has no use for: kept, named, or without a meaning.

A format reads the keys (*words*) that say what a model computes. This module handles the rest:
where a text begins and ends, how to generate, what a call returns. A message names every other
word, so that nothing is lost without notice.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

from megatron_dynmoe.conversion.model_settings import TOKEN_IDS, check_kinds
from megatron_dynmoe.storage.json_files import read_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

# Transformers' defaults for token ids that a config.json of any format leaves out.
DEFAULT_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
# The words that a converted checkpoint keeps for the way back.
CARRIED = (*TOKEN_IDS, "output_router_logits", "use_cache")

# Words that may have any value, and why nothing is lost without them.
WITHOUT_MEANING = {
    "_attn_implementation": "how a machine computes",
    "_experts_implementation": "how a machine computes",
    "_name_or_path": "where the folder was",
    "add_cross_attention": "of encoders with a decoder",
    "architectures": "follows from the format",
    "attn_implementation": "how a machine computes",
    "auto_map": "names code, which is not run; ours is written again",
    "chunk_size_feed_forward": "how a machine computes",
    "cross_attention_hidden_size": "of encoders with a decoder",
    "dtype": "compared with the weights, whose type is kept",
    "experts_implementation": "how a machine computes",
    "experts_topk": "not read by the published code either",
    "id2label": "of classifiers",
    "is_decoder": "of encoders with a decoder",
    "is_encoder_decoder": "of encoders with a decoder",
    "label2id": "of classifiers",
    "max_window_layers": "of sliding windows, which are refused",
    "model_type": "follows from the format",
    "output_attentions": "what a call returns if nothing else is said",
    "output_hidden_states": "what a call returns if nothing else is said",
    "pretraining_tp": "how a machine computes",
    "problem_type": "of classifiers",
    "return_dict": "what a call returns if nothing else is said",
    "tie_encoder_decoder": "of encoders with a decoder",
    "tokenizer_class": "the tokenizer's own files say it",
    "torch_dtype": "compared with the weights, whose type is kept",
    "transformers_version": "who wrote the file",
}
# Words that mean nothing if they have this value.
_OFF = {"router_jitter_noise": 0, "attention_bias": False, "mlp_bias": False}
_NOT_OF_GENERATION = ("transformers_version", "_from_model_config")


def unread(theirs: dict[str, Any], known: Set[str]) -> dict[str, Any]:
    """The words of a ``config.json`` that mean something but that its format does not read."""
    return {
        name: value
        for name, value in theirs.items()
        if name not in known
        and name not in WITHOUT_MEANING
        and value is not None
        and not (name in _OFF and value == _OFF[name])
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The words that mean something and that a conversion leaves out or changes."""
    return {
        name: value
        for name, value in before.items()
        if name not in WITHOUT_MEANING
        and value is not None
        and not (name.endswith("_coeff") and not value)
        and not _alike(value, after.get(name))
    }


def listed(words: dict[str, Any]) -> str:
    """Words and their values for a message, on one line."""
    return ", ".join(f"{name} {_short(value)}" for name, value in words.items())


def stated_ids(theirs: dict[str, Any]) -> dict[str, Any]:
    """The token ids that a ``config.json`` states itself."""
    return {name: theirs[name] for name in TOKEN_IDS if name in theirs}


def generation_words(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of a folder's ``generation_config.json``, and the words that cannot be kept.

    Plain values and lists of whole numbers are kept. Others describe a machine or a hub.

    Raises:
        ValueError: the file is damaged, or a token id is not one.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}, {}
    words = {
        name: value
        for name, value in read_json(path).items()
        if value is not None and name not in _NOT_OF_GENERATION
    }
    try:
        check_kinds({name: words[name] for name in TOKEN_IDS if name in words})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    kept = {name: value for name, value in words.items() if _is_plain(value)}
    return kept, {name: value for name, value in words.items() if name not in kept}


def words_beside(tokenizer: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Token ids and words of generation from the model's folder in which a tokenizer lies, if any.

    A model may end at several tokens; its tokenizer knows only one.
    """
    if tokenizer is None or not (tokenizer / CONFIG).is_file():
        return {}, {}
    theirs = stated_ids(read_json(tokenizer / CONFIG))
    check_kinds(theirs)
    return theirs, generation_words(tokenizer)[0]


def carried_in(origin: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The words of its folder that a converted checkpoint keeps in its arguments.

    Raises:
        ValueError: a value is of another kind.
    """
    if not isinstance(origin, dict):
        return {}, {}
    words, generation = origin.get("words", {}), origin.get("generation", {})
    if not isinstance(words, dict) or not isinstance(generation, dict):
        raise ValueError("huggingface_source holds words that are none")
    words = {name: words[name] for name in CARRIED if name in words}
    check_kinds(words)
    generation = {
        name: value
        for name, value in generation.items()
        if isinstance(name, str) and _is_plain(value)
    }
    check_kinds({name: generation[name] for name in TOKEN_IDS if name in generation})
    return words, generation


def written_ids(
    default: dict[str, Any], tokenizer: dict[str, Any], stated: dict[str, Any]
) -> dict[str, Any]:
    """The token ids for ``config.json``: those of the source, else those of the tokenizer."""
    said = {name: value for name, value in stated.items() if value is not None}
    return default | stated | tokenizer | said


def _alike(one: Any, other: Any) -> bool:
    if isinstance(other, list) and not isinstance(one, list):  # one number for all layers
        other = next(iter({value for value in other if value is not None}), None)
    if isinstance(one, dict) and isinstance(other, dict):
        return not changed(one, other)
    return one == other


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(type(item) is int for item in value)
    return isinstance(value, bool | int | float | str)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
