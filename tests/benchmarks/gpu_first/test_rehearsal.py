"""The first minutes rehearsed: all stages, on a CPU, in an environment without megatron-core."""

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.gpu_first import stages
from tests.benchmarks.gpu_first.driver import ROOT, Driver

pytestmark = pytest.mark.long

# What a machine for PyTorch has, and what the tests among the stages need.
PRESENT = ("torch", "triton", "numpy", "psutil", "pyarrow", "sentencepiece", "tokenizers")
PRESENT += ("safetensors", "transformers", "tensorboard", "matplotlib", "tqdm", "PyYAML")
PRESENT += ("pytest", "hypothesis", "pytest-xdist", "pip")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """The installed megatron-core as the wheel that it came from, for a test without a network."""
    distribution = importlib.metadata.distribution("megatron-core")
    tag = "cp312-cp312-manylinux_2_28_x86_64"
    path = tmp_path_factory.mktemp("index") / f"megatron_core-{distribution.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in distribution.files:
            if "__pycache__" not in file.parts:
                wheel.write(file.locate(), str(file))
    return path.parent


@pytest.fixture(scope="module")
def pack(wheels, tmp_path_factory) -> Path:
    """What `make gpu-pack` makes."""
    folder = tmp_path_factory.mktemp("pack") / "gpu-pack"
    command = [sys.executable, "-m", "benchmarks.gpu_first.pack", "--output", str(folder)]
    command += ["--no-predictions"]  # the rehearsal asks for those of its own sizes
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    subprocess.run(command, cwd=ROOT, env=os.environ | offline, check=True)
    return folder


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """An interpreter that finds the packages of PRESENT and what they need, and no others."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    linked, to_link = set(), list(PRESENT)
    while to_link:
        name = re.sub(r"[-_.]+", "-", to_link.pop()).lower()
        if name in linked:
            continue
        linked.add(name)
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if file.parts[0] != ".."}:
            source = Path(distribution.locate_file(top))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                to_link.append(requirement.name)
    assert "megatron-core" not in linked
    return folder / "bin" / "python"


@pytest.fixture
def driver(bare_python, tmp_path) -> Driver:
    bare = {"PATH": f"{bare_python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    bare["HOME"] = os.environ.get("HOME", "/")
    return Driver(tmp_path, str(bare_python), bare)


def test_what_is_missing_is_said_at_once(driver):
    code, said = driver.run("--pack", str(driver.folder / "none"))
    assert code == 2
    assert "megatron-core is missing: pip install 'megatron-core==" in said
    assert "bring its wheel: make gpu-pack" in said
    assert not list(driver.output.iterdir())


def test_every_stage_is_killed_once_and_then_all_are_done(driver, pack, tmp_path):
    # The limits are a GPU's; on a busy processor a stage may take several times as long.
    patient = tmp_path / "stages.toml"
    text = stages.TABLE.read_text(encoding="utf-8")
    patient.write_text(re.sub(r"(?m)^seconds = (\d+)$", r"seconds = \g<1>0", text), "utf-8")
    driver.flags += ["--pack", str(pack), "--minutes", "60", "--stages", str(patient)]
    table = stages.read(patient)
    assert [stage.seconds for stage in table] == [10 * stage.seconds for stage in stages.read()]
    for number, stage in enumerate(table):
        killed_by = signal.SIGTERM if number % 3 == 2 else signal.SIGKILL
        driver.kill(stage.name, killed_by, delay=number % 4, seconds=600)
        driver.assert_whole()
    code, said = driver.run(seconds=1800)
    assert code == 0, said
    driver.assert_whole()
    assert set(driver.states().values()) == {"done"}
    assert f"{len(table)} of {len(table)} stages are done" in driver.summary()
    assert "What failed" not in driver.summary() and "To go on" not in driver.summary()
    assert {row["stage"] for row in driver.rows()} == {s.name for s in table if s.writes}
    assert sum(len(content) for content in driver.archived().values()) < 16 * 2**20
