"""The rule that docs/extending.md prints, added to a copy of the package as the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.megatron, pytest.mark.long]


def test_it_trains_after_what_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs/extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module, imported, rule, settings = blocks
    package = tmp_path / "megatron_dynmoe"
    shutil.copytree(ROOT / "megatron_dynmoe", package)
    (package / "moe/rules/min_p.py").write_text(module)
    for name, rows in (
        ("moe/rules/__init__.py", ("RULES: dict[str, type[Rule]] = {\n", rule)),
        ("moe/rules/__init__.py", ("from megatron_dynmoe.moe.rules.null_experts", imported)),
        ("settings/routings.py", ("ROUTINGS: dict[str, RoutingSettings] = {\n", settings)),
    ):
        place, row = rows
        text = (package / name).read_text()
        assert text.count(place) == 1
        added = row + place if row is imported else place + row
        (package / name).write_text(text.replace(place, added))
    (command,) = re.findall(r"launch/local.sh smoke (--moe-dynamic-routing min_p .*)", page)
    lines = (ROOT / "launch/recipes/smoke.flags").read_text().splitlines()
    flags = " ".join(line for line in lines if not line.startswith("#"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "megatron_dynmoe.pretrain", *flags.split(), *command.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    counts = [float(found) for found in re.findall(r"experts per token: ([\d.]+)", process.stdout)]
    assert len(counts) == 20
    assert sum(counts[10:]) / 10 == pytest.approx(2, abs=0.2)  # held, not only started there
