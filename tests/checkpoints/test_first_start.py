"""--load of a folder without a checkpoint, and folders of runs that have not begun."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dynmoe.storage.megatron_names import TRACKER

pytestmark = pytest.mark.megatron


def check(load: Path | None, save: Path | None, **changes) -> None:
    from megatron_dynmoe.checkpoints.load import check_paths

    args = {
        **{"save": save and str(save), "load": load and str(load), "pretrained_checkpoint": None},
        **{"ckpt_step": None, "ckpt_fallback": False, "exit_on_missing_checkpoint": False},
        **{"non_persistent_ckpt_type": None, "ckpt_format": "torch_dist"},
        **{"save_retain_interval": None, "skip_train": False},
        **{"run_dir": None, "tensorboard_dir": None},
    }
    check_paths(Namespace(**args | changes))


@pytest.mark.parametrize("there", [True, False])
def test_a_first_start_into_the_folder_of_save_is_announced(tmp_path, capsys, there):
    load = tmp_path / "run"
    if there:
        load.mkdir()
    check(load, load)
    assert "starts from random weights" in capsys.readouterr().out
    assert load.exists() is there


@pytest.mark.parametrize("save", [None, "other"])
def test_any_other_folder_without_a_checkpoint_is_refused(tmp_path, save):
    save = save and tmp_path / save
    with pytest.raises(ValueError, match=r"--load is \S+gone, which does not exist"):
        check(tmp_path / "gone", save)
    with pytest.raises(ValueError, match=r"--load is \S+, which holds no checkpoint"):
        check(tmp_path, save)
    with pytest.raises(ValueError, match="--pretrained-checkpoint is"):
        check(tmp_path / "new", tmp_path / "new", pretrained_checkpoint=str(tmp_path))


@pytest.mark.parametrize("given", ["mnie/checkpoints", "mine", "mine/checkpoints/iter_0000004"])
@pytest.mark.parametrize("is_relative", [False, True])
def test_the_folder_that_was_meant_is_named(tmp_path, monkeypatch, given, is_relative):
    monkeypatch.chdir(tmp_path)
    runs = Path("runs") if is_relative else tmp_path / "runs"
    meant = runs / "mine" / "checkpoints"
    (meant / "iter_0000004").mkdir(parents=True)
    (runs / "other").mkdir()
    (meant / TRACKER).write_text("4")
    with pytest.raises(ValueError, match=rf": did you mean {meant}\?$"):
        check(runs / given, None)
    with pytest.raises(ValueError, match="name the folder that a run saved to"):
        check(runs / "quite-different" / "checkpoints", None)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("skip_train", True), ("ckpt_step", 5), ("exit_on_missing_checkpoint", True)],
)
def test_flags_that_need_a_checkpoint_are_refused_at_a_first_start(tmp_path, flag, value):
    name = "--" + flag.replace("_", "-")
    with pytest.raises(ValueError, match=name):
        check(tmp_path / "run", tmp_path / "run", **{flag: value})
    with pytest.raises(ValueError, match=rf"{name} is given without --load.*leave it out"):
        check(None, tmp_path / "run", **{flag: value})


@pytest.mark.parametrize("file", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_hugging_face_folder_names_from_hf(tmp_path, file):
    (tmp_path / file).touch()
    for save in (None, tmp_path):
        with pytest.raises(ValueError, match=r"Hugging Face folder: .* from-hf --model"):
            check(tmp_path, save)


def test_a_folder_in_which_nothing_was_trained_is_no_run(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    from megatron_dynmoe.training.run_directory import set_paths

    names = {"load": None, "live_plot": False, "save": None, "tensorboard_dir": None}
    names |= {"rank": 0, "world_size": 1, "save_interval": 1, "train_iters": 10}

    def start() -> None:
        set_paths(Namespace(run_dir=str(tmp_path), **names))

    (tmp_path / "checkpoints").mkdir()
    writer = SummaryWriter(str(tmp_path / "tensorboard"))
    writer.add_text("arguments", "as Megatron writes them before the first step")
    writer.flush()
    start()
    writer.add_scalar("lm loss", 1.0, 1)
    writer.close()
    with pytest.raises(ValueError, match=r"that has saved no checkpoint: name another folder\.$"):
        start()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(ValueError, match="which holds a run: go on with it by --load"):
        start()
