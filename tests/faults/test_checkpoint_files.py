"""Damaged, cut and missing files of checkpoints, and what a run makes of them.

Most tests use folders that look like checkpoints; the long ones train on two ranks.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dynmoe.checkpoints import faults
from megatron_dynmoe.checkpoints.collective import CheckpointError
from megatron_dynmoe.checkpoints.load import check_paths, choose_checkpoint
from megatron_dynmoe.checkpoints.save import TrackerFileWriter, write_checkpoint_manifest
from megatron_dynmoe.conversion.convert import Target, to_hf
from megatron_dynmoe.storage.manifest import MANIFEST
from megatron_dynmoe.storage.megatron_names import TRACKER
from tests.distributed.harness import DTOP_P, TINY, Case, CaseResult
from tests.distributed.test_resume import checkpoint, differences
from tests.faults.launching import ONE_BY_ONE, PATIENCE, Attempt, start

FILES = {".metadata": 700, "__0_0.distcp": 9000, "common.pt": 800, "metadata.json": 60}
FLIPS = 50


@pytest.fixture
def load(tmp_path: Path) -> Path:
    """A folder with the checkpoints 2, 4 and 6, the last of which is the latest."""
    for iteration in (2, 4, 6):
        make(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("6")
    return tmp_path


def make(load: Path, iteration: int) -> Path:
    folder = load / f"iter_{iteration:07d}"
    folder.mkdir()
    for name, size in FILES.items():
        (folder / name).write_bytes(random.Random(f"{iteration} {name}").randbytes(size))
    write_checkpoint_manifest(folder)
    return folder


def flip(path: Path, bit: int) -> None:
    """Turn one bit over."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit": lambda path: flip(path, 77),
    "cut": cut,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),  # type: ignore[dict-item, return-value]
}


def test_a_good_checkpoint_is_loaded_whatever_lies_beside_it(load: Path) -> None:
    (load / "iter_0000006" / "notes.txt").write_text("mine")
    make(load, 8)  # newer than the tracker: its save had not come to its end
    (load / "iter_0000010").mkdir()
    assert choose_checkpoint(load) == 6
    assert choose_checkpoint(load, fallback=True) == 6
    assert choose_checkpoint(load, step=8) == 8


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_by_name(load: Path, name: str, damage: str) -> None:
    file = load / "iter_0000006" / name
    DAMAGES[damage](file)
    with pytest.raises(CheckpointError) as refused:
        choose_checkpoint(load)
    assert all(words in str(refused.value) for words in (str(file), "--ckpt-fallback", MANIFEST))
    assert choose_checkpoint(load, fallback=True) == 4


def test_every_flipped_bit_is_found(load: Path) -> None:
    generator = random.Random(0)
    for _ in range(FLIPS):
        file = load / "iter_0000006" / generator.choice(list(FILES))
        bit = generator.randrange(file.stat().st_size * 8)
        flip(file, bit)
        with pytest.raises(CheckpointError, match=file.name):
            choose_checkpoint(load)
        flip(file, bit)
    assert choose_checkpoint(load) == 6


@pytest.mark.parametrize(
    "content",
    (
        *("", "{", "[]", '{"files": []}', '{"files": {}}', '{"files": {"../x": {}}}'),
        *('{"files": {"a": {}}}', '{"files": {"a": {"sha256": "", "bytes": "1"}}}'),
    ),
)
def test_a_damaged_manifest_is_refused_by_name(load: Path, content: str) -> None:
    manifest = load / "iter_0000006" / MANIFEST
    manifest.write_text(content)
    with pytest.raises(CheckpointError, match=str(manifest)):
        choose_checkpoint(load)
    assert choose_checkpoint(load, fallback=True) == 4


def test_fallback_takes_the_newest_good_one_and_says_what_was_wrong(load: Path, capsys) -> None:
    make(load, 8)  # newer than the tracker
    for iteration in (4, 6):
        flip(load / f"iter_{iteration:07d}" / "common.pt", 5)
    assert choose_checkpoint(load, fallback=True) == 2
    said = capsys.readouterr().out
    assert "iter_0000006/common.pt" in said and "iter_0000004/common.pt" in said
    assert "Going on from" in said and "iter_0000002" in said
    assert (load / TRACKER).read_text() == "6"  # the folder may be somebody else's

    assert choose_checkpoint(load, fallback=True, corrects_tracker=True) == 2
    assert (load / TRACKER).read_text() == "2"
    assert (load / "iter_0000006" / MANIFEST).exists()


def test_fallback_never_starts_anew(load: Path) -> None:
    for iteration in (2, 4, 6):
        flip(load / f"iter_{iteration:07d}" / "common.pt", 5)
    with pytest.raises(CheckpointError, match="no good checkpoint") as refused:
        choose_checkpoint(load, fallback=True)
    assert all(f"iter_000000{iteration}" in str(refused.value) for iteration in (2, 4, 6))


def test_fallback_does_not_trust_what_it_cannot_check(load: Path) -> None:
    cut(load / "iter_0000006" / "common.pt")
    (load / "iter_0000004" / MANIFEST).unlink()  # its .metadata names no files at all
    assert choose_checkpoint(load, fallback=True) == 2


@pytest.mark.parametrize("text", ("", "six", "-6", "6.0", "\ufffd", "9" * 30))
def test_a_tracker_that_names_nothing(load: Path, text: str) -> None:
    (load / TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=r"6, 4, 2.*--ckpt-step N"):
        choose_checkpoint(load)
    assert choose_checkpoint(load, fallback=True, corrects_tracker=True) == 6
    assert (load / TRACKER).read_text() == "6"


def test_a_tracker_that_names_a_missing_folder(load: Path) -> None:
    shutil.rmtree(load / "iter_0000006")
    with pytest.raises(CheckpointError, match=r"iter_0000006 is missing; iterations there: 4, 2"):
        choose_checkpoint(load)
    assert choose_checkpoint(load, fallback=True) == 4
    with pytest.raises(CheckpointError, match=r"--ckpt-step is 5.*iter_0000005 is missing"):
        choose_checkpoint(load, step=5, fallback=True)  # asked for by number: a slip of the pen


def test_without_a_tracker(load: Path) -> None:
    (load / TRACKER).unlink()
    assert choose_checkpoint(load) is None  # as with Megatron: training starts anew
    assert choose_checkpoint(load, fallback=True) == 6
    with pytest.raises(CheckpointError, match="--exit-on-missing-checkpoint"):
        choose_checkpoint(load, is_required=True)
    assert choose_checkpoint(load / "nowhere", fallback=True) is None


def test_a_tracker_that_names_an_older_one_is_told_of(load: Path, capsys) -> None:
    (load / TRACKER).write_text("2")  # a 6 with one bit flipped
    assert choose_checkpoint(load) == 2
    assert "names iteration 2, though the save of 6 was complete" in capsys.readouterr().out
    assert choose_checkpoint(load, step=2) == 2
    (load / "iter_0000006" / MANIFEST).unlink()  # its save was cut short
    (load / TRACKER).write_text("4")
    assert choose_checkpoint(load) == 4
    assert "complete" not in capsys.readouterr().out


def test_release(load: Path) -> None:
    (load / "iter_0000006").rename(load / "release")
    (load / TRACKER).write_text("release")
    assert choose_checkpoint(load) == "release"
    flip(load / "release" / "common.pt", 1)
    with pytest.raises(CheckpointError, match=r"release/common\.pt"):
        choose_checkpoint(load, fallback=True)  # nothing says which iteration came before it


def test_without_a_manifest(load: Path, capsys) -> None:
    (load / "iter_0000006" / MANIFEST).unlink()
    assert choose_checkpoint(load) == 6
    assert "has no manifest.json" in capsys.readouterr().out
    assert choose_checkpoint(load, fallback=True) == 4  # its .metadata is none
    (load / "iter_0000006" / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="its save was cut short"):
        choose_checkpoint(load)


def test_without_the_wish_for_one_an_old_manifest_goes(load: Path) -> None:
    write_checkpoint_manifest(load / "iter_0000006", wanted=False)
    assert not (load / "iter_0000006" / MANIFEST).exists()


def test_ranks_share_the_files(load: Path, monkeypatch) -> None:
    files = {f"__{rank}_0.distcp": {"bytes": rank} for rank in range(7)}
    monkeypatch.setattr(faults.dist, "is_initialized", lambda: False)
    assert [name for name, _ in faults._share(files)] == ["__0_0.distcp"]  # alone
    monkeypatch.setattr(faults.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(faults.dist, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(faults, "rank", lambda rank=rank: rank)
        parts += faults._share(files)
    assert sorted(name for name, _ in parts) == sorted(files)


def test_a_tracker_is_replaced_whole_or_not_at_all(load: Path) -> None:
    opener = TrackerFileWriter(SimpleNamespace(open=open, os=1))
    with pytest.raises(OSError, match="full"), opener.open(load / TRACKER, "w") as file:
        file.write("8")
        raise OSError("full")
    assert (load / TRACKER).read_text() == "6"
    (load / f".{TRACKER}.partial").write_text("1000000")  # left by a run that was killed
    with opener.open(load / TRACKER, "w") as file:
        file.write("8")
    assert (load / TRACKER).read_text() == "8"
    assert opener.os == 1


def test_paths_are_checked_before_anything_is_built(load: Path) -> None:
    args = SimpleNamespace(
        **{"save": str(load / "new"), "load": None, "pretrained_checkpoint": None},
        **{"ckpt_step": None, "ckpt_fallback": False, "exit_on_missing_checkpoint": False},
        **{"non_persistent_ckpt_type": None, "ckpt_format": "torch_dist"},
        **{"save_retain_interval": None, "skip_train": False, "run_dir": None},
        tensorboard_dir=str(load / "events"),
    )
    check_paths(args)
    assert not (load / "new").exists()  # before there is something to save
    args.save = str(load / TRACKER)
    with pytest.raises(ValueError, match=r"--save is .*nothing can be written \(not a directory"):
        check_paths(args)
    args.run_dir, args.save = str(load / TRACKER), str(load / TRACKER / "checkpoints")
    with pytest.raises(ValueError, match=f"^--run-dir is {args.run_dir}, where nothing can be"):
        check_paths(args)
    args.run_dir, args.save, args.tensorboard_dir = None, None, str(load / TRACKER / "events")
    with pytest.raises(ValueError, match=r"^--tensorboard-dir is .*nothing can be written"):
        check_paths(args)
    args.tensorboard_dir = None
    args.save, args.save_retain_interval = str(load), 10
    (load / TRACKER).write_text("release")
    with pytest.raises(ValueError, match=r"--save-retain-interval is 10.*'release'"):
        check_paths(args)
    args.save, args.ckpt_fallback = None, True
    with pytest.raises(ValueError, match="--ckpt-fallback is given without --load"):
        check_paths(args)
    args.load, args.ckpt_fallback = str(load), False
    (load / TRACKER).write_text("7")
    with pytest.raises(ValueError, match="iter_0000007 is missing"):
        check_paths(args)


# --- two ranks ------------------------------------------------------------------------------

STEPS, NUM_RANKS = 6, 2
TRAINING = (
    f"{TINY} {DTOP_P} --num-layers 2 --num-experts 4 --micro-batch-size 1 --split 1,0,0 "
    f"--train-iters {STEPS} --save-interval 2"
)
EP2 = "--expert-model-parallel-size 2"
LAYOUTS = {
    "ep2": EP2,
    "dp2, distributed optimizer": "--use-distributed-optimizer",
    "pp2": "--pipeline-model-parallel-size 2",
    "ep2, asynchronous": f"{EP2} --async-save --async-strategy mcore",
}


def train(flags: str, folder: Path) -> Attempt:
    """A run on two ranks that has ended."""
    attempt = start(ONE_BY_ONE, NUM_RANKS, f"{TRAINING} {flags}".split(), folder)
    attempt.wait_until_all_have_ended(PATIENCE)
    return attempt


def said_by(attempt: Attempt, rank: int) -> str:
    return (attempt.folder / f"rank{rank}.log").read_text()


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.megatron
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_refuses_a_damaged_checkpoint_and_falls_back(tmp_path: Path, layout: str) -> None:
    save = tmp_path / "checkpoints"
    flags = f"{LAYOUTS[layout]} --save {save}"
    whole = train(flags, tmp_path / "whole")
    assert whole.exit_codes() == [0, 0], whole.log()
    last = save / f"iter_{STEPS:07d}"
    listed = json.loads((last / MANIFEST).read_text())["files"]
    assert listed.keys() == {path.name for path in last.iterdir()} - {MANIFEST}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"} <= listed.keys()
    shutil.copytree(save, tmp_path / "good")

    damaged = last / "__1_0.distcp"
    flip(damaged, 8 * 1000)
    refused = train(f"{flags} --load {save}", tmp_path / "refused")
    assert refused.exit_codes() == [1, 1]
    for rank in range(NUM_RANKS):
        assert f"CheckpointError: the checkpoint {last.name} in {save}" in said_by(refused, rank)
        assert str(damaged) in said_by(refused, rank)
        assert "Traceback" not in said_by(refused, rank)
    with pytest.raises(ValueError, match=str(damaged)):
        to_hf(save, Target(tmp_path / "model"))

    resumed = train(f"{flags} --load {save} --ckpt-fallback", tmp_path / "resumed")
    assert resumed.exit_codes() == [0, 0], resumed.log()
    assert "at iteration 4" in said_by(resumed, 0)
    if "distributed" not in layout:  # whose padding is undefined
        good, again = (
            checkpoint(CaseResult(Case(path.name), tmp_path, []), STEPS)
            for path in (tmp_path / "good", save)
        )
        assert differences(good, again) == {}
    assert choose_checkpoint(save) == STEPS  # saved over the damaged one


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.megatron
def test_a_flipped_bit_anywhere_in_a_real_checkpoint_is_found(tmp_path: Path) -> None:
    trained = train(f"{EP2} --save {tmp_path / 'save'}", tmp_path / "run")
    assert trained.exit_codes() == [0, 0], trained.log()
    folder = tmp_path / "save" / f"iter_{STEPS:07d}"
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    generator = random.Random(1)
    for _ in range(FLIPS):
        file = generator.choice(files)
        bit = generator.randrange(file.stat().st_size * 8)
        flip(file, bit)
        with pytest.raises(ValueError, match=file.name):
            to_hf(tmp_path / "save", Target(tmp_path / "model"))
        flip(file, bit)
    to_hf(tmp_path / "save", Target(tmp_path / "model"))
