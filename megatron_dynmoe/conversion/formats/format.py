"""The record of a format: everything that is special to one layout of Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_dynmoe.conversion.hugging_face import words
from megatron_dynmoe.conversion.model_settings import (
    Needed,
    check_config,
    check_kinds,
    partial_rotary_factor,
    rope_theta,
    rope_type,
    shown,
)
from megatron_dynmoe.conversion.names import Row
from megatron_dynmoe.settings.messages.command_line import UsageError


class Limit(NamedTuple):
    """What a format demands of a setting that is more than one value."""

    name: str
    holds: Callable[[dict[str, Any]], bool]  # of a whole config
    only: str  # what the format has; it continues the sentence "it has ... only"


@dataclass(frozen=True)
class Format:
    """A layout of Hugging Face folders.

    Attributes:
        name: as ``--format`` takes it.
        summary: what it is, in a few words, for ``--help``.
        rows: which key holds which parameters; both directions read this one table.
        recognizes: whether a ``config.json`` is of this format.
        write: makes the content of ``config.json`` from a config that the format can express, and
            the dtype of the weights.
        read: makes the config from a ``config.json`` whose values have the right kinds.
        words: the words of ``config.json`` that ``read`` uses. If another word means something, a
            message names it as lost.
        how_to_load: Markdown for the model card.
        column: the format's column in the table of docs/huggingface.md.
        needed: settings of which it can express one value.
        limits: settings of which it can express some values.
        counts: its own words of ``config.json`` that are whole numbers from 1; the words that
            several formats share are known without this.
        numbers: its own words that are numbers from 0, and never null.
        flags: its own words that are true or false.
        layers_word: its word for the number of layers, which is compared with the weights before
            anything is made for so many layers.
        keeps_other_words: whether words that ``read`` does not know stay in the config.
        has_model_code: whether Transformers, with this package, has code for its models.
        inv_freq_key: the key of a layer's rotary frequencies, if folders hold these.
        ships_code: whether a folder needs code of this package to run by itself.
    """

    name: str
    summary: str
    rows: tuple[Row, ...]
    recognizes: Callable[[dict[str, Any]], bool]
    write: Callable[[dict[str, Any], str], dict[str, Any]]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    words: Callable[[], Set[str]]
    how_to_load: str
    column: Mapping[str, str]
    needed: tuple[Needed, ...] = ()
    limits: tuple[Limit, ...] = ()
    counts: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    layers_word: str = "num_hidden_layers"
    keeps_other_words: bool = False
    has_model_code: bool = True
    inv_freq_key: str | None = None
    ships_code: bool = False

    def to_format(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """The content of ``config.json``.

        Raises:
            ValueError: the format cannot express a setting; the message names it.
        """
        self.check_expressible(config)
        return self.write(config, dtype)

    def from_format(self, theirs: dict[str, Any]) -> dict[str, Any]:
        """The config, from the content of ``config.json``.

        Raises:
            ValueError: a setting is missing or of the wrong kind, or training does not have it.
        """
        check_kinds(theirs, self.counts, self.numbers, self.flags)
        config = self.read(theirs)
        check_config(config)
        return config

    def check_expressible(self, config: dict[str, Any]) -> None:
        """Refuse a config that the format cannot express.

        Raises:
            UsageError: the message names the first setting.
        """
        known = config | {
            "rope_theta": rope_theta(config),
            "partial_rotary_factor": partial_rotary_factor(config),
            "rope_type": rope_type(config),
        }
        for needed in self.needed:
            if known[needed.name] != needed.value:
                raise UsageError(
                    f"format {self.name} cannot express {needed.name} {shown(known[needed.name])} "
                    f"({needed.otherwise}): it has {shown(needed.value)} only. Use --format dynmoe."
                )
        for limit in self.limits:
            if not limit.holds(config):
                raise UsageError(
                    f"format {self.name} cannot express {limit.name} {shown(config[limit.name])}: "
                    f"it has {limit.only} only. Use --format dynmoe."
                )

    def unread_words(self, theirs: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        """The words of a ``config.json`` that mean something and have no place in other formats.

        Args:
            config: the config that was read from it. A word that only repeats what the format's
                code assumes, such as the published layout's rotary base, means nothing.
        """
        found = words.unread(theirs, self.words())
        if self.keeps_other_words:
            return found
        assumed = config | {"rope_theta": rope_theta(config)}
        return {name: value for name, value in found.items() if assumed.get(name) != value}

    def lost_words(self, config: dict[str, Any], dtype: str) -> dict[str, Any]:
        """The words of a config that the format leaves out, or to which it gives another value."""
        return words.changed(config, self.from_format(self.to_format(config, dtype)))
