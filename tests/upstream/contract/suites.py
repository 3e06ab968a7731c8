"""Tests of this package that say whether it works on another Megatron, each part in a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree import ElementTree

from megatron_dynmoe.data.finding import FAILED, PASSED, Check

REPOSITORY = Path(__file__).resolve().parents[3]
PATIENCE = 3600  # seconds; the layouts take minutes

RESUME = "tests/distributed/test_resume.py"

# What each part gives pytest. Those of golden runs allow tolerances on another Megatron.
SUITES = {
    "specs": (
        "tests/upstream/test_patches.py::"
        "test_the_entry_point_does_what_upstreams_parse_and_validate_args_does",
        "tests/model",
        "tests/moe/test_layer.py",
        "tests/moe/test_router.py",
    ),
    "dispatch": ("tests/distributed/test_dispatch.py",),
    "golden": ("tests/golden",),
    "layouts": (
        "tests/distributed/test_layouts.py::test_the_same_weights_route_alike_under_every_layout",
        f"{RESUME}::test_resume_equals_one_go_bitwise",
        f"{RESUME}::test_another_layout_loads_every_tensor_and_goes_on",
        f"{RESUME}::test_upstream_still_needs_the_patches",
    ),
}
LONG = {"layouts"}


def run(part: str, variables: Mapping[str, str], folder: Path) -> list[Check]:
    """Run the tests of a part; a line for those that pass, and one for each that does not."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-m", "not long", f"--junitxml={report}"]
    try:
        child = subprocess.run(
            [*command, *SUITES[part]],
            capture_output=True,
            text=True,
            env=dict(variables),
            cwd=REPOSITORY,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return [Check(part, FAILED, f"no end within {PATIENCE} s")]
    if not report.exists():
        last = ((child.stdout + child.stderr).strip().splitlines() or ["without a word"])[-1]
        return [Check(part, FAILED, f"pytest ended with {child.returncode}: {last}")]
    return read(report)


def read(report: Path) -> list[Check]:
    """The findings in what pytest has written of its tests."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = list(_failed(cases))
    num_failed = sum(len(tests) for _, tests in failed)
    num_skipped = sum(case.find("skipped") is not None for case in cases)
    num_passed = len(cases) - num_skipped - num_failed
    checks = [
        Check(f"{len(tests)} failed", FAILED, reason, f"the first is {tests[0]}")
        for reason, tests in failed
    ]
    skipped = f", {num_skipped} skipped" if num_skipped else ""
    passed = Check("tests", PASSED, f"{num_passed} passed{skipped}")
    return ([passed] if num_passed else []) + checks


def _failed(cases: list[ElementTree.Element]) -> Iterable[tuple[str, list[str]]]:
    """Each reason why tests failed, and these."""
    by_reason: dict[str, list[str]] = {}
    for case in cases:
        wrong = [found for kind in ("failure", "error") if (found := case.find(kind)) is not None]
        if wrong:
            by_reason.setdefault(_reason(wrong[0]), []).append(str(case.get("name")))
    return by_reason.items()


def _reason(found: ElementTree.Element) -> str:
    """The last error that pytest shows of a test, or the first line of its message."""
    lines = [line[1:].strip() for line in (found.text or "").splitlines() if line[:2] == "E "]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or [str(found.get("message"))])[-1][:300]
