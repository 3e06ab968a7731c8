"""tools/setup.sh: which Python it takes, what it says when there is none, when it installs."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NEEDED_TOOLS = ("bash", "cat", "cmp", "dirname", "mkdir", "mv", "rm")

BROKEN_SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2; exit 127\n"
TOO_OLD = "#!/bin/sh\necho 'is Python 3.11.2'\n"

# Answers the script's questions as a Python 3.12 would, notes every call of pip, and "makes" an
# environment by copying itself there.
WORKING = """#!/bin/sh
case "$1 $2" in
    "-Ic "*) echo "ok $VERSION" ;;
    "-m venv") mkdir -p "$4/bin"; cat "$0" > "$4/bin/python"; chmod +x "$4/bin/python"
               echo "$0" >> calls.venv ;;
    "-m pip") echo "$*" >> calls.pip; exit "${PIP_EXIT:-0}" ;;
esac
"""


class Sandbox:
    """A copy of the script in a repository of its own, with nothing but chosen tools on PATH."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "repository"
        self.bin = folder / "bin"
        self.home = folder / "home"
        for path in (self.repository / "tools", self.bin, self.home):
            path.mkdir(parents=True)
        shutil.copy(REPOSITORY / "tools/setup.sh", self.repository / "tools")
        for name in ("pyproject.toml", "setup.py", "constraints.txt"):
            (self.repository / name).write_text(f"# {name}\n")
        for name in (*NEEDED_TOOLS, "chmod"):
            (self.bin / name).symlink_to(shutil.which(name) or name)

    def put(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("$VERSION", "3.12.1"))
        path.chmod(0o755)
        return path

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "tools/setup.sh"],
            cwd=self.repository,
            env={"PATH": str(self.bin), "HOME": str(self.home), **environment},
            capture_output=True,
            text=True,
        )

    def calls(self, what: str) -> list[str]:
        log = self.repository / f"calls.{what}"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_no_python_at_all_says_what_was_looked_at_and_what_to_do(sandbox: Sandbox) -> None:
    result = sandbox.run()
    assert result.returncode == 1
    assert "No Python 3.12 or 3.13 was found" in result.stderr
    assert "uv is not on the path" in result.stderr
    for remedy in ("pipx install uv", "pyenv install 3.12", "conda create", "apt-get install"):
        assert remedy in result.stderr
    assert not (sandbox.repository / ".venv").exists()


def test_shims_that_fail_and_old_versions_are_passed_over(sandbox: Sandbox) -> None:
    shim = sandbox.put(sandbox.bin / "python3.12", BROKEN_SHIM)
    old = sandbox.put(sandbox.bin / "python3", TOO_OLD)
    result = sandbox.run()
    assert result.returncode == 1
    assert f"{shim} does not run" in result.stderr
    assert f"{old} is Python 3.11.2" in result.stderr

    good = sandbox.put(sandbox.bin / "python3.13", WORKING)
    assert sandbox.run().returncode == 0
    assert sandbox.calls("venv") == [str(good)]


def test_a_working_python_behind_a_shim_of_the_same_name_is_found(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    sandbox.put(tmp_path / "shims/python3.12", BROKEN_SHIM)
    good = sandbox.put(sandbox.bin / "python3.12", WORKING)
    assert sandbox.run(PATH=f"{tmp_path}/shims:{sandbox.bin}").returncode == 0
    assert sandbox.calls("venv") == [str(good)]


def test_pyenv_versions_are_found_without_being_on_the_path(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    sandbox.put(sandbox.home / ".pyenv/versions/3.12.0/bin/python", BROKEN_SHIM)
    good = sandbox.put(sandbox.home / ".pyenv/versions/3.13.2/bin/python", WORKING)
    assert sandbox.run().returncode == 0
    elsewhere = sandbox.put(tmp_path / "pyenv/versions/3.12.9/bin/python", WORKING)
    shutil.rmtree(sandbox.repository / ".venv")
    assert sandbox.run(PYENV_ROOT=str(tmp_path / "pyenv")).returncode == 0
    assert sandbox.calls("venv") == [str(good), str(elsewhere)]


@pytest.mark.parametrize("installed_already", [True, False])
def test_uv_finds_or_installs_one(
    sandbox: Sandbox, tmp_path: Path, installed_already: bool
) -> None:
    good = sandbox.put(tmp_path / "uv/python3.12", WORKING)
    marker = tmp_path / "uv/installed"
    if installed_already:
        marker.touch()
    uv = (
        f'#!/bin/sh\ncase "$2" in find) [ -e {marker} ] && echo {good} ;; *) : > {marker} ;; esac\n'
    )
    sandbox.put(sandbox.bin / "uv", uv)
    result = sandbox.run()
    assert result.returncode == 0
    assert ("uv downloads one" in result.stdout) is not installed_already
    assert sandbox.calls("venv") == [str(good)]


def test_the_named_python_is_taken_or_refused_but_never_replaced_by_another(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    sandbox.put(sandbox.bin / "python3.12", WORKING)
    old = sandbox.put(tmp_path / "old", TOO_OLD)
    result = sandbox.run(PYTHON=str(old))
    assert result.returncode == 1
    assert f"PYTHON={old} cannot be used: it is Python 3.11.2" in result.stderr
    named = sandbox.put(tmp_path / "named", WORKING)
    assert sandbox.run(PYTHON=str(named)).returncode == 0
    assert sandbox.calls("venv") == [str(named)]


def test_naming_another_version_replaces_the_environment(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.put(sandbox.bin / "python3.12", WORKING)
    other = sandbox.put(tmp_path / "python3.13", WORKING.replace("$VERSION", "3.13.0"))
    sandbox.run()
    assert sandbox.run(PYTHON=str(other)).returncode == 0
    assert sandbox.calls("venv") == [str(sandbox.bin / "python3.12"), str(other)]
    assert len(sandbox.calls("pip")) == 2


def test_a_second_call_installs_nothing_and_a_change_installs_again(sandbox: Sandbox) -> None:
    sandbox.put(sandbox.bin / "python3.12", WORKING)
    first = sandbox.run()
    assert "about 6 GB" in first.stdout
    second = sandbox.run()
    assert second.returncode == 0
    assert "up to date" in second.stdout
    assert len(sandbox.calls("pip")) == 1
    assert "--constraint constraints.txt" in sandbox.calls("pip")[0]

    for changed in ("constraints.txt", "pyproject.toml", "setup.py"):
        before = len(sandbox.calls("pip"))
        with (sandbox.repository / changed).open("a") as file:
            file.write("# changed\n")
        sandbox.run()
        assert len(sandbox.calls("pip")) == before + 1, changed
    assert len(sandbox.calls("venv")) == 1


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed")
def test_two_setups_do_not_install_at_once(sandbox: Sandbox) -> None:
    sandbox.put(sandbox.bin / "python3.12", WORKING)
    (sandbox.bin / "flock").symlink_to(shutil.which("flock") or "flock")
    folder = os.open(sandbox.repository, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with subprocess.Popen(
            ["bash", "tools/setup.sh"],
            cwd=sandbox.repository,
            env={"PATH": str(sandbox.bin), "HOME": str(sandbox.home)},
            stdout=subprocess.PIPE,
            text=True,
        ) as waiting:
            assert waiting.stdout is not None
            assert "Another setup is at work" in waiting.stdout.readline()
            assert sandbox.calls("venv") == []
            fcntl.flock(folder, fcntl.LOCK_UN)
            assert "Ready after" in waiting.stdout.read()
        assert waiting.returncode == 0 and len(sandbox.calls("pip")) == 1
    finally:
        os.close(folder)


def test_an_installation_that_fails_is_not_taken_for_finished(sandbox: Sandbox) -> None:
    sandbox.put(sandbox.bin / "python3.12", WORKING)
    failed = sandbox.run(PIP_EXIT="3")
    assert failed.returncode == 1
    assert "did not finish" in failed.stderr
    assert sandbox.run().returncode == 0
    assert len(sandbox.calls("pip")) == 2


def test_a_failed_update_is_tried_again_even_if_the_change_is_taken_back(sandbox: Sandbox) -> None:
    sandbox.put(sandbox.bin / "python3.12", WORKING)
    sandbox.run()
    constraints = sandbox.repository / "constraints.txt"
    original = constraints.read_text()
    constraints.write_text("torch==1\n")
    sandbox.run(PIP_EXIT="1")
    constraints.write_text(original)
    sandbox.run()
    assert len(sandbox.calls("pip")) == 3


def test_a_moved_repository_is_installed_again(sandbox: Sandbox) -> None:
    sandbox.put(sandbox.bin / "python3.12", WORKING)
    sandbox.run()
    sandbox.repository = sandbox.repository.rename(sandbox.repository.with_name("moved here"))
    assert sandbox.run().returncode == 0
    assert len(sandbox.calls("pip")) == 2


def test_the_script_and_the_metadata_name_the_same_versions() -> None:
    script = (REPOSITORY / "tools/setup.sh").read_text()
    metadata = (REPOSITORY / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.12,<3.14"' in metadata
    assert "(3, 12) <= sys.version_info[:2] <= (3, 13)" in script
    assert 'minors="12 13"' in script


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ("sys.version_info = (3, 11, 2)", "is Python 3.11.2"),
        ("sys.version_info = (3, 14, 0)", "is Python 3.14.0"),
        ("sys.version_info = (2, 7, 18)", "is Python 2.7.18"),
        ("sys.abiflags = 't'", "is not the usual CPython"),
        ("sys.modules['ensurepip'] = None", "without ensurepip"),  # Debian without python3-venv
    ],
)
def test_what_the_probe_refuses(sandbox: Sandbox, change: str, verdict: str) -> None:
    """Here the script's own probe runs, in the interpreter of the tests with one thing changed."""
    changed = f'#!/bin/sh\nshift\nprobe=$1\nshift\nexec {sys.executable} -Ic "import sys; {change}'
    sandbox.put(sandbox.bin / "python3", changed + '\n$probe" "$@"\n')
    result = sandbox.run()
    assert result.returncode == 1
    assert verdict in result.stderr


def test_the_script_accepts_the_python_that_runs_the_tests(sandbox: Sandbox) -> None:
    """The probe itself, which the stubs above do not run: here only making .venv is a stub."""
    real = f'#!/bin/sh\n[ "$1" = -Ic ] && exec {sys.executable} "$@"\n'
    named = sandbox.put(sandbox.bin / "real", real + WORKING.removeprefix("#!/bin/sh\n"))
    result = sandbox.run(PYTHON=str(named), LANG=os.environ.get("LANG", "C"))
    version = ".".join(map(str, sys.version_info[:3]))
    assert f"Python {version} in .venv" in result.stdout
