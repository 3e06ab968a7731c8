"""A full disk, and a folder that nothing can be written to: real file systems, real processes.

They need the right to mount, which root has.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_dynmoe.checkpoints.collective import cause
from megatron_dynmoe.checkpoints.load import choose_checkpoint
from megatron_dynmoe.storage.megatron_names import TRACKER
from tests.distributed.harness import DTOP_P, TINY
from tests.faults.launching import ONE_BY_ONE, PATIENCE, Attempt, start

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

NUM_RANKS, PAGE = 2, 4096
FLAGS = (
    f"{TINY} {DTOP_P} --num-layers 2 --num-experts 4 --micro-batch-size 1 --split 1,0,0 "
    "--train-iters 4 --save-interval 2 --expert-model-parallel-size 2"
)
ROOMY = 64 * 1024  # kilobytes


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOMY}k", "tmpfs", folder]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"mounting needs rights that this user lacks: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{options}", folder]).returncode == 0


def train(save: Path, folder: Path, flags: str = "") -> Attempt:
    words = f"{FLAGS} --save {save} --load {save} {flags}".split()
    return start(ONE_BY_ONE, NUM_RANKS, words, folder)


def check_refusal(attempt: Attempt, folder: Path, cause: str, latest: int) -> None:
    """All ranks say the same in plain words, and the checkpoint before is good."""
    attempt.wait_until_all_have_ended(PATIENCE)
    assert attempt.exit_codes() == [1, 1], attempt.log()
    for rank in range(NUM_RANKS):
        said = (attempt.folder / f"rank{rank}.log").read_text()
        assert f"CheckpointError: the checkpoint {folder} could not be saved" in said, said[-3000:]
        assert cause in said and "During handling" not in said
        assert f"The last complete one is of iteration {latest}." in said
    assert (folder.parent / TRACKER).read_text() == str(latest)
    assert choose_checkpoint(folder.parent) == latest


def test_a_full_disk_ends_all_ranks_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, mounted: Path
) -> None:
    remount(mounted, "size=1600k")  # one checkpoint of 1.1 MB, not two
    full = train(mounted, tmp_path / "full")
    check_refusal(full, mounted / "iter_0000004", "no space is left on the device", latest=2)

    remount(mounted, f"size={ROOMY}k")
    resumed = train(mounted, tmp_path / "resumed")
    resumed.wait_until_all_have_ended(PATIENCE)
    assert resumed.exit_codes() == [0, 0], resumed.log()
    assert choose_checkpoint(mounted) == 4


@pytest.mark.long
def test_whichever_file_the_disk_has_no_room_for(tmp_path: Path, mounted: Path) -> None:
    first = train(mounted, tmp_path / "first", "--exit-interval 2")
    first.wait_until_all_have_ended(PATIENCE)
    assert first.exit_codes() == [0, 0], first.log()
    pages = {
        path.name: -(-path.stat().st_size // PAGE) for path in (mounted / "iter_0000002").iterdir()
    }
    whole = sum(pages.values())
    lacking: dict[str, int] = {
        "the tracker": 0,
        "manifest.json": 1,
        "metadata.json": 2,
        ".metadata": 3,
        "the parts": 3 + pages[".metadata"],
    }
    for name, num_pages in lacking.items():
        room = (whole + 1 + whole - num_pages) * PAGE // 1024  # 1: the tracker of the first
        remount(mounted, f"size={room}k")
        attempt = train(mounted, tmp_path / f"no room for {name}")
        check_refusal(attempt, mounted / "iter_0000004", "no space is left", latest=2)
        written = {path.name for path in (mounted / "iter_0000004").iterdir()}
        print(f"no room for {name}: {sorted(written)}")
        for file in (mounted / "iter_0000004").iterdir():
            file.unlink()
    remount(mounted, f"size={ROOMY}k")
    last = train(mounted, tmp_path / "last")
    last.wait_until_all_have_ended(PATIENCE)
    assert last.exit_codes() == [0, 0], last.log()


@pytest.mark.long
def test_a_folder_that_becomes_read_only(tmp_path: Path, mounted: Path) -> None:
    flags = "--train-iters 200 --save-interval 20"
    attempt = train(mounted, tmp_path / "run", flags)
    wait_for(lambda: (mounted / TRACKER).exists(), attempt)
    wait_for(lambda: remount(mounted, "ro"), attempt)
    latest = int((mounted / TRACKER).read_text())
    check_refusal(
        attempt, mounted / f"iter_{latest + 20:07d}", "read-only file system", latest=latest
    )
    # The next start finds out before it builds anything: on its first rank, which is all there is.
    alone = f"{FLAGS} --expert-model-parallel-size 1 --save {mounted}".split()
    again = start(ONE_BY_ONE, 1, alone, tmp_path / "again")
    again.wait_until_all_have_ended(PATIENCE)
    assert again.exit_codes() == [2]
    assert f"--save is {mounted}, where nothing can be written (read-only file" in again.log()


@pytest.mark.long
def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    save = tmp_path / "save"
    save.mkdir()
    (save / "iter_0000004").write_text("in the way")
    attempt = train(save, tmp_path / "run")
    check_refusal(attempt, save / "iter_0000004", "file exists", latest=2)


def wait_for(happens: Callable[[], bool], attempt: Attempt) -> None:
    end = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < end, attempt.log()
        time.sleep(0.005)


def test_what_pytorchs_writer_says_of_a_full_disk_is_put_in_words() -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert cause(error).startswith("no space is left on the device") and "704" in cause(error)
