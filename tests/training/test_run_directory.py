"""What ``--run-dir`` says of a run at its end."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from megatron_dynmoe.jobs.attempts import is_finished
from megatron_dynmoe.runs.folder import SUMMARY
from megatron_dynmoe.runs.summary import write_summary_and_curves
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.helpers.fake_runs import dtop_p_scalars, make_run

pytestmark = pytest.mark.megatron


def settled() -> Any:
    """What a run of top-k has settled."""
    from megatron_dynmoe.backends.choice import BackEnd
    from megatron_dynmoe.model.settled import Settled

    why = "no Transformer Engine"
    return Settled(DynMoEConfig(routing="top_k").resolve(4), BackEnd("torch_native", why))


def arguments(run_dir: Path, skip_train: bool = False) -> Namespace:
    return Namespace(
        **{"run_dir": str(run_dir), "live_plot": False, "rank": 0, "world_size": 1},
        **{"train_iters": 20, "train_samples": None, "skip_train": skip_train},
    )


@pytest.mark.parametrize("skip_train", [False, True])
def test_only_training_brings_a_run_to_its_end(tmp_path: Path, skip_train: bool) -> None:
    """After an evaluation of what there is so far, the launch scripts have to go on with it."""
    from megatron_dynmoe.training.run_directory import recording

    with recording(arguments(tmp_path, skip_train), settled(), program_start=0.0):
        pass
    assert is_finished(tmp_path, {}) is not skip_train


def test_a_run_that_has_logged_nothing_ends_well_without_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from megatron_dynmoe.training import run_directory

    writer = SimpleNamespace(flush=lambda: None)
    monkeypatch.setattr(run_directory, "get_tensorboard_writer", lambda: writer)
    with run_directory.recording(arguments(tmp_path), settled(), program_start=0.0):
        pass
    assert "no summary.json and curves.png: " in capsys.readouterr().out
    assert is_finished(tmp_path, {}) and not (tmp_path / SUMMARY).exists()


def test_events_that_tensorboard_dir_put_elsewhere_are_found(tmp_path: Path) -> None:
    routing = {"routing": "dtop_p", "target_experts_per_token": "2"}
    elsewhere, run_dir = tmp_path / "events", tmp_path / "run"
    make_run(run_dir, routing, dtop_p_scalars(), tensorboard_dir=str(elsewhere))
    expected = write_summary_and_curves(run_dir)
    (run_dir / "tensorboard").rename(elsewhere)
    assert write_summary_and_curves(run_dir) == expected


def test_events_of_a_runs_own_folder_come_first(tmp_path: Path) -> None:
    """A copy of a run still names the folder of the original."""
    routing = {"routing": "dtop_p", "target_experts_per_token": "2"}
    original, copy = tmp_path / "original", tmp_path / "copy"
    make_run(original, routing, dtop_p_scalars(10))
    make_run(copy, routing, dtop_p_scalars(20), tensorboard_dir=str(original / "tensorboard"))
    assert write_summary_and_curves(copy)["iterations"] == 20


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SummaryWriter]:
    """The event file that Megatron opens before the model is built."""
    from megatron_dynmoe.training import run_directory

    writer = SummaryWriter(str(tmp_path / "run" / "tensorboard"))
    writer.add_text("arguments", "as Megatron writes them")
    monkeypatch.setattr(run_directory, "get_tensorboard_writer", lambda: writer)
    yield writer
    writer.close()


def fail(run_dir: Path, error: type[BaseException], **taken: int) -> None:
    """Start a run that fails."""
    from megatron_dynmoe.training.run_directory import cleaning_up_failed_starts, recording

    args = Namespace(**vars(arguments(run_dir)) | taken)
    with (
        pytest.raises(error),
        cleaning_up_failed_starts(),
        recording(args, settled(), program_start=0.0),
    ):
        raise error


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize("error", [ValueError, RuntimeError, AssertionError, MemoryError])
def test_a_start_that_fails_before_a_step_leaves_nothing(
    tmp_path: Path, error: type[Exception]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir()
    fail(tmp_path / "run", error)
    assert not (tmp_path / "run").exists()


def test_what_was_logged_or_was_there_before_is_kept(tmp_path: Path, begun: SummaryWriter) -> None:
    run_dir = tmp_path / "run"
    begun.add_scalar("lm loss", 1.0, 1)
    (run_dir / "resolved.yaml").write_text("of the start before")
    (run_dir / "command.txt").write_text("python -m megatron_dynmoe.pretrain\n")
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "mine").touch()
    before = {path: path.read_bytes() for path in run_dir.rglob("*.*") if path.is_file()}
    fail(run_dir, RuntimeError)
    after = {path: path.read_bytes() for path in run_dir.rglob("*.*") if path.is_file()}
    assert {path.name for path in after} == {path.name for path in before}
    for name in ("resolved.yaml", "command.txt"):
        assert after[run_dir / name] == before[run_dir / name]
    assert (run_dir / "checkpoints" / "mine").exists()


@pytest.mark.usefixtures("begun")
def test_a_run_that_failed_at_a_step_keeps_its_settings(tmp_path: Path) -> None:
    fail(tmp_path / "run", RuntimeError, curr_iteration=0)
    written = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())
    assert written["dynamic_routing"]["routing"] == "top_k"
    expected = {"backend": "torch_native", "why": "no Transformer Engine", "kept": {}}
    assert written["back_end"] == expected
