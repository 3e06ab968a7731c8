"""What git checks on every commit is what ``make lint types`` checks."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def recipe_of(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text().replace("$(PYTHON_VENV)", ".venv/bin/python")
    (found,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    return [line.strip().lstrip("@").replace("$(MAKE)", "make") for line in found.splitlines()]


def test_the_hooks_of_pre_commit_are_the_checks_of_make() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    assert sorted(hooks) == sorted(recipe_of("lint") + recipe_of("types"))
