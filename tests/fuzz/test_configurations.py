"""A selection of what `make fuzz` does at length."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings

from megatron_dynmoe.settings.config import DynMoEConfig
from tests.fuzz.command_lines import CommandLine, command_lines
from tests.fuzz.mistyped import mistyped
from tests.fuzz.trial import A_RESULT, Outcome, judge, parse, strictly

REPOSITORY = Path(__file__).resolve().parents[2]
PREFIX = "--moe-dynamic-"


@pytest.mark.distributed
@pytest.mark.megatron
@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("--mistyped",)], ids=["any", "mistyped"])
def test_random_command_lines_train_or_are_refused(mode: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "25", "--seed", "7", *mode]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "25 command lines in" in done.stdout and " trained" in done.stdout


@settings(max_examples=300)
@given(line=command_lines())
def test_settings_are_resolved_or_refused_by_name(line: CommandLine) -> None:
    """The same random settings without Megatron, many times as fast."""
    given_ = {
        flag.removeprefix(PREFIX).replace("-", "_"): value
        for flag, value in line.flags
        if flag.startswith(PREFIX)
    }
    try:
        resolved = DynMoEConfig(**given_).resolve(4)
    except ValueError as error:
        assert any(name in str(error) for name in given_)
        assert any(word in str(error) for word in ("use ", "set ", "leave ", "give ", "must ")), (
            error
        )
    else:
        again = DynMoEConfig.from_dict(resolved.to_dict(), "what was saved").resolve(4)
        assert again == resolved


@settings(max_examples=50)
@given(line=command_lines())
def test_a_printed_command_line_can_be_run_again(line: CommandLine) -> None:
    assert parse(str(line)).arguments == line.arguments
    assert parse(str(line)).num_ranks == line.num_ranks


LINE = CommandLine(1, (("--num-experts", "4"), ("--moe-dynamic-routing", "top_p")))
OURS, THEIRS = "megatron_dynmoe.settings.config", "megatron.training.arguments"


@pytest.mark.parametrize(
    ("error", "message", "origin", "steps", "kind"),
    [
        ("ValueError", "routing is 'x': use one of", OURS, 0, "refused by us"),
        ("ValueError", "something is wrong", OURS, 0, "FAILED: names no flag"),
        ("KeyError", "'routing'", OURS, 0, "FAILED: KeyError from megatron_dynmoe.settings.config"),
        ("AssertionError", "", THEIRS, 0, "refused by upstream"),
        ("TypeError", "NoneType", THEIRS, 0, f"FAILED: TypeError from {THEIRS}"),
        ("UsageError", "Megatron refuses these: --lr", OURS, 0, "refused by upstream"),
        ("UsageError", "--lr is 0: use 1", OURS, 0, "refused by us"),
        ("SystemExit", "1", "argparse", 0, "FAILED: SystemExit from argparse"),
        ("SystemExit", "16", THEIRS, 1, "refused by upstream"),
        ("SystemExit", "1", THEIRS, 1, "FAILED: after a step"),
        ("ValueError", "routing is 'x': use one of", OURS, 1, "FAILED: after a step"),
    ],
)
def test_what_counts_as_a_failure(
    error: str, message: str, origin: str, steps: int, kind: str
) -> None:
    result = {"error": error, "message": message, "origin": origin, "steps": steps}
    outcome = judge(LINE, result | {"in_step": False, "on_purpose": False})
    assert outcome.kind == kind
    assert judge(LINE, result | {"in_step": True, "on_purpose": True}).failed


@pytest.mark.parametrize(
    ("kind", "message", "is_plain"),
    [
        ("trained", "2 steps", True),
        ("refused by us", "UsageError: --num-experts is 0: use 1", True),
        ("refused by us", "UsageError: --lr is 0: use 1", False),  # it is not in the line
        ("refused by us", "UsageError: --num-experts-x is 0: use 1", False),
        ("refused by us", "UsageError: --num-experts is 0:\nuse 1", False),
        ("refused by upstream", "AssertionError: --num-experts is 0", False),  # a traceback
        ("refused by upstream", A_RESULT, True),
    ],
)
def test_what_is_plain(kind: str, message: str, is_plain: bool) -> None:
    assert strictly(Outcome(kind, message), LINE).failed is not is_plain


def test_mistyped_lines_differ_and_can_be_made_again() -> None:
    lines = [str(mistyped(Random(f"7 {case}"))) for case in range(50)]
    assert len(set(lines)) == 50
    assert lines == [str(mistyped(Random(f"7 {case}"))) for case in range(50)]
