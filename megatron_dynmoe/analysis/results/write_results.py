"""Writes the report's folder: ``routing.json``, the figures, and the page that shows both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.analysis.counting.collect import Collected
from megatron_dynmoe.analysis.counting.counts import RoutingCounts, Shape
from megatron_dynmoe.analysis.counting.tokens import pieces_of
from megatron_dynmoe.analysis.counting.windows import OTHER
from megatron_dynmoe.analysis.results import figures, page
from megatron_dynmoe.analysis.results.statistics import MIN_DOCUMENTS, summarize
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.storage.atomic import new_folder
from megatron_dynmoe.storage.json_files import read_json
from megatron_dynmoe.use.token_display import printable

ROUTING = "routing.json"
PAGE = "index.html"
FIGURES = "figures"
# Of a model's vocabulary; what training adds so that it can be divided is less.
FEW_TOKENS = 0.9
# Of single documents, below which nothing can be said
MIN_TOKENS = 100
# Letters of a group's name
LONGEST_NAME = 40
FORMAT = "megatron-dynmoe routing, 3"


def describe_model(name: str, model: Any, dtype: str, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What the report says about the model; measurements merge only if all of this is the same."""
    config = model.config
    layers = [i + 1 for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    top_k = config.routing == "top_k"
    has_thresholds = not top_k and config.rule is None
    thresholds = (
        [config.threshold_and_cap(i - 1, training=False)[0] for i in layers]
        if has_thresholds
        else None
    )
    return {
        "name": name,
        "routing": config.routing,
        "experts_of_top_k": config.num_experts_per_tok if top_k else None,
        "thresholds": thresholds,
        "max_experts_per_token": None if top_k else config.cap(training=False),
        "target_experts_per_token": config.target_experts_per_token,
        "num_layers": config.num_hidden_layers,
        "moe_layers": layers,
        "num_experts": config.num_experts,
        "vocab_size": config.vocab_size,
        "tokenizer": tokenizer,
        "dtype": dtype,
        "routers": _hash_of_routers(model),
        **({"budget_curve": config.budget_curve} if config.budget_curve else {}),
    }


def _hash_of_routers(model: Any) -> str:
    """A hash that differs between states of a training, even if name and settings are the same."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".router." in name:
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def measurement(
    model: dict[str, Any],
    collected: Collected,
    tokenizer: Any,
    token_texts: dict[int, str],
    sweep: dict[str, Any] | None,
    separate: bool,
    num_skipped: int,
) -> dict[str, Any]:
    """A measurement as JSON; :func:`write_results` adds the numbers that follow from it."""
    shape = next(iter(collected.groups.values())).shape
    return {
        "format": FORMAT,
        "model": model,
        "windows": {"length": shape.positions, "separate_documents": separate},
        "shape": shape._asdict(),
        "groups": {name: counts.to_json() for name, counts in collected.groups.items()},
        "token_texts": {str(token): text for token, text in token_texts.items()},
        "samples": {
            name: [piece._asdict() for piece in pieces_of(tokenizer, *sample)]
            for name, sample in collected.samples.items()
        },
        "sweep": sweep,
        "skipped_records": num_skipped,
    }


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Merge several measurements of the same model; groups of the same name are added up.

    Text samples and the sweep come from the first file that has them.

    Raises:
        UsageError: a file does not exist.
        ValueError: a file is not a ``routing.json``, or the files are not of the same model.
    """
    merged: dict[str, Any] = {}
    groups: dict[str, RoutingCounts] = {}
    seen: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise UsageError(f"--merge is {path}: there is no such file")
        content = read_json(path)
        twice = seen.setdefault(json.dumps(content.get("groups"), sort_keys=True), path)
        if twice is not path:
            raise ValueError(f"{path} holds the same counts as {twice}, which would count twice")
        if content.get("format") != FORMAT:
            raise ValueError(f"{path}: it is not a {ROUTING} of this version of the tool")
        try:
            shape = Shape(**content["shape"])
            for key in ("model", "windows", "shape"):
                here = content[key]
                if merged and merged[key] != here:
                    raise ValueError(
                        f"its {key} is {_difference(here, merged[key])} in {paths[0]}: "
                        "only measurements of one model, made alike, add up"
                    )
            if not content["groups"]:
                raise ValueError("it has no groups, so nothing was counted")
            for name, counts in content["groups"].items():
                groups.setdefault(name, RoutingCounts(shape))
                groups[name] += RoutingCounts.from_json(shape, counts)
            if not merged:
                merged = content | {"skipped_records": 0}
            merged["skipped_records"] += content.get("skipped_records", 0)
            merged["token_texts"] |= content["token_texts"]
            merged["samples"] = content["samples"] | merged["samples"]
            merged["sweep"] = merged["sweep"] or content["sweep"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: it is incomplete or damaged: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return merged | {"groups": {name: counts.to_json() for name, counts in groups.items()}}


def write_results(
    output: Path, measured: dict[str, Any], *, min_count: int, overwrite: bool
) -> dict[str, Any]:
    """Write a measurement, its statistics, figures and page; whole or not at all.

    Returns:
        The content of ``routing.json``.

    Raises:
        ValueError: the folder exists and is not empty, and ``overwrite`` is not given.
    """
    shape = Shape(**measured["shape"])
    groups = {
        name: RoutingCounts.from_json(shape, counts) for name, counts in measured["groups"].items()
    }
    texts = {int(token): text for token, text in measured["token_texts"].items()}
    statistics = summarize(groups, measured["model"]["moe_layers"], texts, min_count)
    content = measured | {"statistics": statistics}
    content["notes"] = remarks(content)
    with new_folder(output, overwrite) as folder:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        # A line for each of the outer entries, so that the start can be looked at
        (folder / ROUTING).write_text(text.replace(',"statistics":', ',\n"statistics":') + "\n")
        (folder / FIGURES).mkdir()
        drawn = figures.draw_all(content, groups, folder / FIGURES)
        (folder / PAGE).write_text(page.render(content, drawn), encoding="utf-8")
    return content


def remarks(content: dict[str, Any]) -> list[str]:
    """What limits the numbers; the page and the terminal say it."""
    statistics, model = content["statistics"], content["model"]
    length, overall = content["windows"]["length"], statistics["all"]
    notes = []
    if model["routing"] == "top_k":
        notes.append(
            f"Every token of this model uses {model['experts_of_top_k']} experts in every layer: "
            "there is no difference between tokens, layers or groups to see, and no correlation. "
            "The sweep shows what a threshold would do instead."
        )
    if skipped := content.get("skipped_records"):
        notes.append(f"{_number(skipped, 'record')} that could not be read: left out.")
    tokenizer = model.get("tokenizer") or {}
    known = tokenizer.get("tokens", model["vocab_size"])
    if known < FEW_TOKENS * model["vocab_size"]:
        notes.append(
            f"The tokenizer has {known:,} tokens and the model {model['vocab_size']:,}: is it the "
            "tokenizer of the training?"
        )
    if changed := tokenizer.get("changed"):
        notes.append(
            f"{' and '.join(changed)} changed after the model was exported (manifest.json): is it "
            "still the tokenizer of the training?"
        )
    little = MIN_TOKENS if content["windows"]["separate_documents"] else length
    groups = [(shorten(name), group) for name, group in statistics["groups"].items()]
    for name, group in groups:
        if group["tokens"] < little:
            notes.append(
                f"{name} has {_number(group['tokens'], 'token')}, fewer than {little}: its numbers "
                "say little."
            )
        if group["loss"] is None:
            notes.append(f"{name} has no token that follows another, and so no loss.")
    notes += _worse_than_guessing(groups) or _worse_than_guessing([("All text together", overall)])
    if overall["documents"] < MIN_DOCUMENTS:
        notes.append(
            f"{_number(overall['documents'], 'document')}: too few for intervals, which need "
            f"{MIN_DOCUMENTS}; a .txt file is one."
        )
    if OTHER in statistics["groups"]:
        notes.append(f"There were more groups than are told apart: the last are in {OTHER}.")
    tokens = statistics["tokens"]
    if 0 < len(tokens["most"]) < 100 or not tokens["most"]:
        notes.append(
            f"{tokens['frequent']} different tokens appear at least {tokens['min_count']} times: "
            f"the lists of most and least demanding tokens hold {len(tokens['most'])} each "
            "instead of 100."
        )
    return notes


def shorten(name: str) -> str:
    """A group's name on one line of a terminal or a note."""
    line = printable(" ".join(name.split()))
    return line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 1]}\u2026"


def _worse_than_guessing(groups: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [
        f"{name}: a loss of {group['loss']:.2f} nats is worse than guessing tokens by how often "
        f"they came before in this text ({group['guessing_loss']:.2f}): are tokenizer and "
        "kind of text those of the training?"
        for name, group in groups
        if group["loss"] is not None and group["loss"] > group["guessing_loss"]
    ]


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _difference(new: dict[str, Any], old: dict[str, Any]) -> str:
    name = next(key for key in {**new, **old} if new.get(key) != old.get(key))
    return f"{name} {new.get(name)!r} here and {old.get(name)!r}"
