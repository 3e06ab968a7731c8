"""Every command that takes a training's flags takes each of them, with a value if it has one."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace, _HelpAction
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_dynmoe.cli import attempt, plan, recipe
from megatron_dynmoe.dry_run import machine
from megatron_dynmoe.jobs import parse
from megatron_dynmoe.jobs.recipes import recipe_flags

pytestmark = pytest.mark.megatron
VALUES = ("1", "0.5", "attn")  # one of them is right for any type; the last is an enum's


class Parsed(BaseException):
    """Ends a command as soon as it has parsed the training's flags."""


def value_of(action: Any) -> str:
    """A value that this flag takes."""
    if action.choices:
        first = next(iter(action.choices))
        return getattr(first, "name", str(first))  # of an enum
    for value in VALUES:
        with suppress(ValueError, TypeError, ArgumentTypeError, LookupError, AssertionError):
            if action.type is not None:
                action.type(value)
            return value
    raise AssertionError(f"{action.option_strings}: no value is known for the type {action.type}")


def every_flag(parser: ArgumentParser) -> list[str]:
    """A command line with each spelling of each flag; of those that exclude each other, one."""
    groups = parser._mutually_exclusive_groups
    excluded = {id(action) for group in groups for action in group._group_actions[1:]}
    words = []
    for action in parser._actions:
        if isinstance(action, _HelpAction) or id(action) in excluded:
            continue
        number = action.nargs if isinstance(action.nargs, int) else 1
        for flag in action.option_strings:
            words += [flag, *[value_of(action)] * number]
    return words


@pytest.fixture(scope="module")
def words() -> list[str]:
    found = every_flag(parse._parser())
    assert len(found) > 900  # both kinds: "--bf16", and "--seed 1"
    return found


def test_the_parser_of_a_training_takes_every_flag(words, monkeypatch) -> None:
    """``dynmoe train``, ``-m megatron_dynmoe.pretrain`` and its launch scripts."""
    from megatron.training.arguments import parse_args

    from megatron_dynmoe.training.flags import add_flags

    at = words.index("--yaml-cfg")  # it would be read at once, and is refused by its name
    words = words[:at] + words[at + 2 :]
    monkeypatch.setattr("sys.argv", ["pretrain", *words])
    found, expected = vars(parse_args(add_flags)), vars(parse.parse(words))
    changed = {name for name, value in expected.items() if found[name] != value}
    assert changed == {"enable_msc"}  # the deprecated opposite of it wins


def planned(words: list[str]) -> None:
    plan.main(["smoke", "--gpus", "1", "--gpu", "a100-80g", *words])


def rehearsed(words: list[str]) -> None:
    plan.main(["smoke", "--gpus", "1", "--dry-run", *words])


def printed(words: list[str]) -> None:
    recipe.main(["--parse", "smoke", *words])


@pytest.mark.parametrize("command", [planned, rehearsed, printed])
@pytest.mark.parametrize("from_file", [False, True], ids=["typed", "@FILE"])
def test_a_command_takes_every_flag(
    command: Callable[[list[str]], None],
    from_file: bool,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if from_file and command is printed:
        return  # launch scripts give it what a shell has read
    parser, found = parse._parser(), []
    parse_args = parser.parse_args

    def stop(given: list[str]) -> Namespace:
        found.append(parse_args(given))
        raise Parsed

    monkeypatch.setattr(parser, "parse_args", stop)
    monkeypatch.setattr(machine, "check", lambda: None)
    given = words
    if from_file:
        file = tmp_path / "all.flags"
        file.write_text("\n".join(words))
        given = [f"@{file}"]
    with pytest.raises(Parsed):
        command(given)
    assert found == [parse_args([*recipe_flags("smoke"), *words])]


def test_a_dry_runs_process_takes_every_flag(words: list[str]) -> None:
    from megatron_dynmoe.dry_run.rehearse import flags_of

    parse.parse(flags_of(words))


def test_an_attempt_takes_every_flag(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(attempt, "begin", lambda _, flags, *rest: found.append(flags))
    with pytest.raises(SystemExit):
        attempt.main(["begin", "--world-size", "1", "smoke", *words])
    assert found == [words]
