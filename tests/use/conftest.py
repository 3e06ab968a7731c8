"""What the tests of evaluation share: no network, and tasks whose data is local."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import local_tasks


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants
    from lm_eval import evaluator

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # It starts a dozen programs to describe the machine.
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)
    # Nor what this user has fetched before: nothing.
    caches = tmp_path_factory.getbasetemp()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", caches / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(caches / "hub"))
    # The first test of a task to run would find its progress among the messages.
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_tasks.write_documents(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def task_file(documents: Path) -> Callable[..., Path]:
    return partial(local_tasks.write_task, documents)


@pytest.fixture(scope="module")
def choice(task_file: Callable[..., Path]) -> Path:
    return local_tasks.write_choice(task_file)


@pytest.fixture(scope="module")
def free(task_file: Callable[..., Path]) -> Path:
    return local_tasks.write_free(task_file)


@pytest.fixture(scope="module")
def rolling(task_file: Callable[..., Path]) -> Path:
    return local_tasks.write_rolling(task_file)
