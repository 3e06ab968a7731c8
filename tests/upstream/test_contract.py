"""``make try-megatron`` on Megatrons with planted changes: it names these, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import exit_code_of
from tests.upstream.contract import signatures, suites
from tests.upstream.contract.command import main
from tests.upstream.contract.place import PACKAGES, installed

QUICK = ("--parts", "names", "settings", "patches", "overrides", "--json")

# File of Megatron's, what it says, and what it says instead.
PLANTED = {
    "a parameter more": (
        "core/datasets/gpt_dataset.py",
        "def _get_num_epochs(self, num_tokens_per_epoch: int)",
        "def _get_num_epochs(self, num_tokens_per_epoch: int, planted=None)",
    ),
    "a setting more": (
        "core/transformer/transformer_config.py",
        "    moe_z_loss_coeff: Optional[float] = None",
        "    moe_planted: int = 3\n    moe_z_loss_coeff: Optional[float] = None",
    ),
    "another name": (
        "training/checkpointing.py",
        "def read_metadata(",
        "def read_planted_metadata(",
    ),
    "an import that fails": (
        "core/transformer/moe/moe_logging.py",
        "import torch\n",
        "import torch\nimport planted_package\n",
    ),
    "a method that ours overrides": (
        "core/transformer/moe/moe_layer.py",
        "def routed_experts_compute(",
        "def planted_experts_compute(",
    ),
    "what a patch is for": (
        "training/training.py",
        "should_reset = not is_first_iteration",
        "should_reset = bool(not is_first_iteration)",
    ),
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout that is Megatron as installed, with all of these changes."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in PACKAGES:
        shutil.copytree(installed() / "megatron" / name, checkout / "megatron" / name)
    for file, right, wrong in PLANTED.values():
        path = checkout / "megatron" / file
        source = path.read_text()
        assert source.count(right) == 1, f"Megatron's {file} has changed"
        path.write_text(source.replace(right, wrong))
    return checkout


@pytest.mark.megatron
@pytest.mark.slow
def test_it_names_what_has_changed_and_nothing_else(
    changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in changed.rglob("*") if path.is_file()}
    assert exit_code_of(main, [str(changed), *QUICK]) == 1
    assert before == {path: path.read_bytes() for path in changed.rglob("*") if path.is_file()}

    parts = json.loads(capsys.readouterr().out)["parts"]
    found = {
        part: {check["name"]: (check["state"], check["found"]) for check in checks}
        for part, checks in parts.items()
    }
    odd = {
        (part, name): said
        for part, checks in found.items()
        for name, said in checks.items()
        if said[0] != "passed"
    }
    assert odd == {
        ("names", "moe_logging"): (
            "failed",
            "megatron.core.transformer.moe.moe_logging cannot be imported: ModuleNotFoundError: "
            "No module named 'planted_package'",
        ),
        ("settings", "moe_planted"): ("failed", "is new, 3 by default"),
        ("patches", "empty splits are refused"): (
            "failed",
            "megatron.core.datasets.gpt_dataset:GPTDataset._get_num_epochs takes planted, too",
        ),
        ("patches", "checked loads"): (
            "failed",
            "megatron.training.checkpointing:read_metadata is gone",
        ),
        ("patches", "each step is logged as itself"): ("warning", "is no longer needed"),
        ("overrides", "DynMoELayer.routed_experts_compute"): (
            "failed",
            "Megatron has none any more",
        ),
    }


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("{dir}", "is no Megatron: it has no megatron/core/package_info.py."),
        ("{dir}/none", "is neither a folder nor a version such as 0.19.2."),
        ("99.1", "megatron-core 99.1 was not installed: ERROR: "),
    ],
)
def test_a_misuse_is_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wanted: str,
    says: str,
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip looks nowhere
    assert exit_code_of(main, [wanted.format(dir=tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and says in error


def test_a_megatron_without_its_training_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core = tmp_path / "megatron/core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\nPRE_RELEASE = 'rc0'\n")
    assert exit_code_of(main, [str(tmp_path)]) == 2
    assert "megatron-core 0.16.1rc0 has no megatron.training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ours", "now", "goes_along"),
    [
        (lambda *args, **kwargs: 0, "c", True),  # whatever it is, it is passed on
        (lambda x, b=0, c=0: 0, "a, b=0, c=0", True),  # the first by place
        (lambda a, **other: 0, "a, c=0", True),
        (lambda a, **other: 0, "a", True),
        (lambda a, b=0: 0, "a, b=0, c=0", False),
        (lambda a, b: 0, "a", False),
        (lambda a, b=0: 0, "b, a", False),  # another order
    ],
)
def test_ours_goes_along_with_what_it_takes(
    ours: Callable[..., Any], now: str, goes_along: bool
) -> None:
    assert signatures.accepts(ours, "a, b=0", now) is goes_along


def test_the_difference_is_told() -> None:
    assert signatures.difference("a, b", "a, c=0") == "takes no b any more and takes c, too"
    assert signatures.difference("a=0", "a=1") == "takes (a=1), and took (a=0)"


def test_tests_that_fail_for_one_reason_share_a_line(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    failed = '<testcase name="{}"><failure message="x">f()\nE   ValueError: {}</failure></testcase>'
    cases = [failed.format(*case) for case in (("a", "one"), ("b", "one"), ("c", "two"))]
    report.write_text(f'<testsuites><testcase name="d"/>{"".join(cases)}</testsuites>')
    assert [check[:3] for check in suites.read(report)] == [
        ("tests", "passed", "1 passed"),
        ("2 failed", "failed", "ValueError: one"),
        ("1 failed", "failed", "ValueError: two"),
    ]


@pytest.mark.megatron
@pytest.mark.long
def test_the_installed_megatron_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """Also the golden runs, in their tolerances, from a copy."""
    parts = ["names", "settings", "patches", "golden"]
    code = exit_code_of(main, [str(installed()), "--parts", *parts])
    assert code == 0, capsys.readouterr().out
