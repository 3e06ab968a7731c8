"""What a machine lacks is named, downloaded if there is a network, and installed without one."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.gpu_first import pack, preflight
from tests.benchmarks.gpu_first.driver import ROOT, Clocked


@pytest.fixture
def pip_finds(tmp_path, monkeypatch) -> Path:
    """A folder in the place of a package registry, with one wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "lacking-1.0.dist-info"
    with zipfile.ZipFile(folder / "lacking-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lacking.py", "it = 'is there'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: lacking\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_pack(folder: Path, *packages: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_first.pack", "--output", str(folder)]
    return subprocess.run(
        [*command, "--no-predictions", "--packages", *packages],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("pip_finds")
def test_a_wheel_that_was_packed_is_there_for_the_stages(tmp_path):
    folder = tmp_path / "pack"
    done = make_pack(folder, "lacking==1.0")
    assert done.returncode == 0, done.stderr
    assert "lacking-1.0-py3-none-any.whl" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == [
        "commit",
        "lacking-1.0-py3-none-any.whl",
    ]
    driver = Clocked(tmp_path)
    table = tmp_path / "stages.toml"
    command = "{python} -c 'import lacking; print(lacking.it)'"
    table.write_text(
        f'[[stage]]\nname = "a"\nasks = "?"\nseconds = 60\nleast = 1\nneeds = ["lacking"]\n'
        f"command = {json.dumps(command)}\n"
    )
    driver.flags += ["--stages", str(table)]
    code, said = driver.run("--pack", str(tmp_path / "none"))
    assert code == 1 and "pip install 'lacking', or bring its wheel: make gpu-pack PACK" in said
    code, said = driver.run("--pack", str(folder))
    assert code == 0, said
    assert "is there" in driver.log_of("a")


@pytest.mark.usefixtures("pip_finds")
def test_what_cannot_be_had_is_named_and_the_old_pack_stays(tmp_path):
    folder = tmp_path / "pack"
    make_pack(folder, "lacking==1.0")
    for package, said in (("lacking", "pin it, as in lacking==1.2.3"), ("lacking==2.0", "==2.0")):
        done = make_pack(folder, package)
        assert done.returncode == 2
        assert done.stderr.startswith(f"gpu_first.pack: error: --packages {package}: ")
        assert said in done.stderr and done.stderr.count("\n") == 1
        assert (folder / "lacking-1.0-py3-none-any.whl").exists()


def test_the_tree_and_its_pack_are_small_enough_to_carry():
    assert 1e6 < pack.size_of_tree() < pack.MAX_CARRIED


def test_requirements_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {(r.name, str(r.specifier)) for r in map(Requirement, project["dependencies"])}
    assert set(preflight.requirements().items()) == wanted


@pytest.mark.parametrize(
    ("version", "wanted", "does"),
    [
        ("2.11.0+cu130", "==2.11.*", True),
        ("2.1.0", "==2.11.*", False),
        ("2.110.0", "==2.11.*", False),
        ("0.19.2", "==0.19.2", True),
        ("0.19.20", "==0.19.2", False),
        ("5.1", ">=9", True),
        ("", "", False),
    ],
)
def test_only_a_pinned_version_is_compared(version, wanted, does):
    assert preflight.fits(version, wanted) == does


def test_a_folder_without_its_metadata_is_told_from_a_package(tmp_path):
    (tmp_path / "xdist").mkdir()
    (tmp_path / "xdist" / "__init__.py").touch()
    command = [sys.executable, "-S", "-m", "benchmarks.gpu_first.preflight", "--rehearse"]
    around = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "--needs", "xdist"], cwd=ROOT, env=around, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "torch is missing: pip install 'torch==2.11.*'" in done.stdout
    assert "pytest-xdist is there without its metadata, as a copied folder is" in done.stdout
