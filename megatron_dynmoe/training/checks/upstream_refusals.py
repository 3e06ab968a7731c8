"""Words Megatron's refusals at start-up in terms of the flags that were typed.

A command line can reach some three hundred of upstream's assertions. Many have no message; others
name an attribute, or omit the values. Those that people meet often have a check of their own in
:mod:`.argument_checks`, which names the remedy. Nothing better can be had for the others: this
module reads the condition out of upstream's source and replaces names of attributes by flags.
"""

from __future__ import annotations

import ast
import linecache
import re
import traceback
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from megatron_dynmoe.checkpoints.collective import CheckpointError
from megatron_dynmoe.settings.messages.refusals import FlagError

# Upstream calls these by another name than their flag.
_OTHER_NAMES = {
    "num_moe_experts": "num_experts",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank",
    "transformer_pipeline_model_parallel_size": "pipeline_model_parallel_size",
    "init_lr": "lr_warmup_init",
    "max_lr": "lr",
    "start_wd": "start_weight_decay",
    "end_wd": "end_weight_decay",
    "lr_warmup_steps": "lr_warmup_iters",
    "lr_decay_steps": "lr_decay_iters",
    "wsd_decay_steps": "lr_wsd_decay_iters",
    "schedule": "step_batch_size_schedule",
    "blend": "data_path",
    "blend_per_split": "train_data_path",
    "tokenizer_path": "tokenizer_model",
    "seed_": "seed",
}
# These run after the start. They also read files, whose faults have messages of their own.
_NOT_START_UP = {"train_step", "evaluate", "save_checkpoint"}
_FILES = "megatron.core.dist_checkpointing"
_TOKENIZERS = "megatron.core.tokenizers"  # their messages name a path and no flag


def in_flags(error: Exception, parser: ArgumentParser, words: Sequence[str]) -> str | None:
    """Say in one line why a command line is refused; None if the cause is another failure.

    Args:
        error: the exception as it was caught.
        parser: the parser of the whole command line.
        words: the command line, which the parser accepts.
    """
    if isinstance(error, CheckpointError):
        return None  # the command line may be right
    frames = list(traceback.walk_tb(error.__traceback__))
    if any(frame.f_code.co_name in _NOT_START_UP for frame, _ in frames):
        return None
    frame, line = frames[-1]
    module = str(frame.f_globals.get("__name__"))
    is_ours = module.startswith("megatron_dynmoe.") and isinstance(error, ValueError)
    if is_ours or isinstance(error, FlagError):  # which a script of a user's own may raise, too
        return str(error)
    if not module.startswith("megatron.") or module.startswith(_FILES):
        return None
    source = "".join(linecache.getlines(frame.f_code.co_filename))
    statements = _statements_around(ast.parse(source), line)
    if not statements or not isinstance(statements[-1], ast.Assert | ast.Raise):
        return None
    refusing = statements[-1]
    flags = _Flags(parser, words)
    said = " ".join(str(error).split()).rstrip(".")
    if said:
        reason = flags.in_text(said)
    elif isinstance(refusing, ast.Assert):
        reason = f"it requires: {flags.in_code(refusing.test)}"
    else:
        return None
    values = flags.values_in(statements, reason)
    if not values and module.startswith(_TOKENIZERS):
        values = flags.values_of("tokenizer_type", "tokenizer_model")
    if not values:
        return None
    return f"Megatron refuses these flags: {reason}. Here {', and '.join(values)}."


def _statements_around(tree: ast.AST, line: int) -> list[ast.stmt]:
    """The statement on a line and the ``if`` statements around it, outermost first."""
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If | ast.Assert | ast.Raise)
        and node.lineno <= line <= (node.end_lineno or line)
    ]
    return sorted(around, key=lambda node: node.lineno)


class _Flags:
    """All flags by upstream's names, with their values on this command line."""

    def __init__(self, parser: ArgumentParser, words: Sequence[str]) -> None:
        self._flag_of = {
            action.dest: max(action.option_strings, key=len)
            for action in parser._actions
            if action.option_strings
        }
        options, expanded = parser._option_string_actions, parser._read_args_from_files(list(words))
        typed = (word.partition("=")[0] for word in expanded)
        self._typed = {options[word].dest: word for word in typed if word in options}
        self._flag_of |= self._typed
        self._values = vars(parser.parse_args(list(words)))

    def _dest(self, name: str) -> str | None:
        name = _OTHER_NAMES.get(name, name)
        return name if name in self._flag_of else None

    def in_code(self, condition: ast.expr) -> str:
        """Write a condition of upstream's in terms of flags."""
        text = re.sub(
            r"\b(?:\w+\.)*(\w+)(?!\w|\()",
            lambda match: self._flag_of.get(self._dest(match[1]) or "", match[0]),
            ast.unparse(condition),
        )
        return text.replace(" is not None", " is given").replace(" is None", " is not given")

    def in_text(self, message: str) -> str:
        """Replace attributes in a message by flags, except single words, which may be English."""
        return re.sub(
            r"(?<![\w./-])(?:args\.|self\.|config\.)?([a-z0-9]+(?:_[a-z0-9]+)+)(?![\w/-])",
            lambda match: self._flag_of.get(self._dest(match[1]) or "", match[0]),
            message,
        )

    def values_in(self, statements: Sequence[ast.stmt], reason: str) -> list[str]:
        """The flags that the statements or the reason name: the typed ones, else the defaults."""
        named = [
            dest for dest, flag in self._flag_of.items() if re.search(rf"{flag}(?![\w-])", reason)
        ]
        for statement in reversed(statements):
            tested = getattr(statement, "test", None) or statement
            for node in ast.walk(tested):
                name = getattr(node, "attr", None) or getattr(node, "id", None)
                if isinstance(name, str) and (dest := self._dest(name)):
                    named.append(dest)
            if any(dest in self._typed for dest in named):
                break
        typed = [dest for dest in dict.fromkeys(named) if dest in self._typed]
        return [self._value(dest) for dest in typed or dict.fromkeys(named)]

    def values_of(self, *names: str) -> list[str]:
        """These flags and their values."""
        return [self._value(name) for name in names]

    def _value(self, dest: str) -> str:
        value: Any = self._values.get(dest)
        flag = self._flag_of[dest]
        if dest not in self._typed:
            return f"{flag} is not given" if value is None else f"{flag} is {value} by default"
        return f"{flag} is given" if isinstance(value, bool) else f"{flag} is {value}"
