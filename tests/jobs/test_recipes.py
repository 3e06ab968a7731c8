"""Recipes: how files become flags, and what a mistake in them says."""

import shlex
import subprocess
import sys

import pytest

from megatron_dynmoe.jobs import recipes
from megatron_dynmoe.jobs.recipes import recipe_flags, recipe_names
from megatron_dynmoe.settings.messages.words import format_flags, values_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.flags").write_text(text)

    return write


def test_comments_includes_and_quotes(folder):
    folder(
        _base="# all\n--lr 1e-3 # low\n--bf16\n",
        mine="# Mine\ninclude _base.flags\n\n--lr 2e-3\n--split '9, 1'\n",
    )
    assert recipe_flags("mine") == ["--lr", "1e-3", "--bf16", "--lr", "2e-3", "--split", "9, 1"]
    assert recipe_names() == ["mine"]
    assert recipes.describe("mine") == "Mine"


def test_a_path_is_a_recipe_and_its_includes_lie_beside_it(tmp_path):
    (tmp_path / "part.flags").write_text("--swiglu")
    file = tmp_path / "own.flags"
    file.write_text("include part.flags\n--bf16")
    assert recipe_flags(file) == recipe_flags(str(file)) == ["--swiglu", "--bf16"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include nowhere.flags", r"a.flags, line 1: 'include nowhere.flags' must name one file"),
        ("--lr 1\ninclude", "line 2: 'include' must name one file"),
        ("include a.flags", "includes itself: a.flags -> a.flags"),
        ("include b.flags", "includes itself: a.flags -> b.flags -> a.flags"),
        ("--split '9, 1", "line 1: No closing quotation"),
    ],
)
def test_a_mistake_in_a_file_is_named(folder, text, message):
    folder(a=text, b="include a.flags")
    with pytest.raises(ValueError, match=message):
        recipe_flags("a")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dtop_p_16", r"'dtop_p_16', which is unknown: did you mean dtop_p_16e\? Use.*smoke"),
        ("smoke.flags", "smoke.flags, but there is no such file in /"),
        ("/none/smoke.flags", "smoke.flags, but there is no such file.$"),
        ("", "'', which is unknown: use one of"),
    ],
)
def test_an_unknown_recipe_names_those_that_there_are(name, message):
    with pytest.raises(ValueError, match=message):
        recipe_flags(name)


def test_a_misspelled_path_names_the_file_that_is_there(tmp_path):
    (tmp_path / "my.flags").touch()
    with pytest.raises(ValueError, match=f"Did you mean {tmp_path / 'my.flags'}"):
        recipe_flags(tmp_path / "mi.flag")


def test_without_a_checkout_the_message_says_so(folder):
    with pytest.raises(ValueError, match="recipes come with a checkout"):
        recipe_flags("smoke")


def test_the_last_value_of_a_flag_counts():
    flags = ["--lr", "1", "--bf16", "--data-path", "a", "b", "--lr=2", "--min-lr", "-1"]
    assert values_of(flags) == {"lr": ["2"], "bf16": [], "data-path": ["a", "b"], "min-lr": ["-1"]}
    with pytest.raises(ValueError, match="'smoke' is no flag and stands before"):
        values_of(["smoke", "--lr", "1"])


@pytest.mark.parametrize("name", recipe_names())
def test_flags_survive_the_way_through_text(name):
    flags = recipe_flags(name)
    assert shlex.split(format_flags(flags)) == flags


def test_the_schedule_is_that_of_100_billion_tokens():
    values = values_of(recipe_flags("dtop_p_64e8a"))
    batch, steps, length = (
        int(values[name][0]) for name in ("global-batch-size", "train-iters", "seq-length")
    )
    assert (steps - 1) * batch * length < 100e9 <= steps * batch * length


def test_the_command_lists_prints_and_checks_without_torch():
    def run(*arguments):
        code = (
            "import sys; from megatron_dynmoe.cli.recipe import main\n"
            f"sys.argv = ['recipes', *{arguments!r}]\n"
            "try: main()\nfinally: assert 'torch' not in sys.modules"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert "dense_374m   " in run().stdout
    printed = run("--world-size", "2", "smoke", "--train-iters", "3")
    assert shlex.split(printed.stdout) == [*recipe_flags("smoke"), "--train-iters", "3"]
    refused = run("--world-size", "3", "smoke")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --global-batch-size is 8, which")
