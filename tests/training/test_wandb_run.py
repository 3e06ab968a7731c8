"""Weights & Biases: what a run is called there, and that a resumed one goes on in it."""

import os
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dynmoe.training.wandb_run import complete_wandb


def arguments(run: Path, **changes: object) -> Namespace:
    checkpoints = str(run / "checkpoints")
    given = {"wandb_project": "p", "wandb_exp_name": "", "wandb_save_dir": "", "run_dir": str(run)}
    return Namespace(**(given | {"save": checkpoints, "load": checkpoints} | changes))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    monkeypatch.setattr(os, "environ", found)
    return found


def write_run(folder: Path, name: str) -> None:
    """What ``wandb.init(dir=folder)`` of 0.31 leaves of a run."""
    (folder / "wandb" / name).mkdir(parents=True)
    (folder / "wandb" / "latest-run").unlink(missing_ok=True)
    (folder / "wandb" / "latest-run").symlink_to(name)


@pytest.mark.parametrize("kind", ["run", "offline-run"])
def test_a_run_that_resumes_goes_on_in_its_run(
    tmp_path: Path, environment: dict[str, str], kind: str
) -> None:
    args = arguments(tmp_path / "mine")
    complete_wandb(args)  # the first start of one command for start and resume
    assert args.wandb_exp_name == "mine"
    assert "WANDB_RUN_ID" not in environment
    write_run(tmp_path / "mine" / "checkpoints" / "wandb", f"{kind}-20261130_095341-w4-lvi8")
    complete_wandb(arguments(tmp_path / "mine", load=str(tmp_path / "other")))
    assert "WANDB_RUN_ID" not in environment  # this run begins anew
    complete_wandb(args)
    assert (environment["WANDB_RUN_ID"], environment["WANDB_RESUME"]) == ("w4-lvi8", "allow")
    environment["WANDB_RUN_ID"] = "chosen"
    complete_wandb(args)
    assert environment["WANDB_RUN_ID"] == "chosen"


def test_the_files_of_wandb_may_lie_elsewhere(tmp_path: Path, environment: dict[str, str]) -> None:
    write_run(tmp_path / "there", "run-20261130_095341-a1")
    complete_wandb(arguments(tmp_path, wandb_save_dir=str(tmp_path / "there")))
    assert environment["WANDB_RUN_ID"] == "a1"


def test_without_a_name_or_a_folder(tmp_path: Path, environment: dict[str, str]) -> None:
    without = {"run_dir": None, "save": None, "load": None}
    with pytest.raises(ValueError, match=r"--wandb-exp-name .*name the run"):
        complete_wandb(arguments(tmp_path, **without))
    with pytest.raises(ValueError, match=r"--wandb-save-dir .*name a folder"):
        complete_wandb(arguments(tmp_path, **without, wandb_exp_name="a"))
    complete_wandb(arguments(tmp_path, **without, wandb_project=""))
