"""Evaluation of a training's checkpoint as it is: the same as of its export, and encoded alike."""

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'megatron-dynmoe[eval]'")

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from megatron_dynmoe.cli import evaluate as evaluate_command
from megatron_dynmoe.conversion.convert import Target, to_hf
from megatron_dynmoe.use import load
from tests.fixtures.make import CHECKPOINT, EXPORT
from tests.helpers import local_tasks
from tests.helpers.commands import exit_code_of

pytestmark = pytest.mark.usefixtures("offline")
main = partial(exit_code_of, evaluate_command.main)
BEGIN, END = 1, 2
LATEST = CHECKPOINT / "iter_0000004"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token for each ASCII character, and a begin and an end around every text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127))]
    made = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, "<unk>"))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files of the test lie."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def report_of(output: Path, *flags: object) -> dict[str, Any]:
    words = [*flags, "--device", "cpu", "--num-fewshot", 0, "--output", output]
    assert main([str(word) for word in words]) == 0
    return json.loads(output.read_text())


def test_is_what_the_export_gives(
    tokenizer: Path, choice: Path, free: Path, rolling: Path, tmp_path: Path, scratch: Path
) -> None:
    # The fixture was saved by 4 processes, PP 2 and EP 2, with the distributed optimizer.
    tasks = ("--tasks", f"{choice},{free},{rolling}")
    checkpoint = ("--load", CHECKPOINT, "--tokenizer", tokenizer)
    loaded = report_of(tmp_path / "loaded.json", *checkpoint, *tasks)
    assert not list(scratch.glob(".dynmoe-*"))
    to_hf(CHECKPOINT, Target(tmp_path / "model", tokenizer=tokenizer))
    exported = report_of(tmp_path / "exported.json", "--model", tmp_path / "model", *tasks)
    assert (loaded.pop("model"), exported.pop("model")) == (str(LATEST), str(tmp_path / "model"))
    assert loaded == exported
    assert [*loaded["tasks"]] == ["choice", "free", "rolling"] and not loaded["failed"]
    means = {entry["mean_experts_per_token"] for entry in loaded["tasks"].values()}
    assert len(means) == 3 and all(1 < mean < 4 for mean in means)


def test_another_iteration(
    tokenizer: Path, choice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(CHECKPOINT, tmp_path / "run")
    shutil.copytree(run / LATEST.name, run / "iter_0000003")
    damaged = run / LATEST.name / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    flags = ("--load", run, "--tokenizer", tokenizer, "--tasks", choice, "--limit", 1)
    report = report_of(tmp_path / "report.json", *flags, "--iteration", 3)
    assert report["model"] == str(run / "iter_0000003") and [*report["tasks"]] == ["choice"]
    assert main([str(word) for word in flags]) == 1
    assert f"{damaged}" in capsys.readouterr().err


def test_the_model_reads_one_begin_token_and_no_end_token(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []
    load_model = load.load_model

    def watched(*args: Any, **settings: Any) -> Any:
        def keep(_module: Any, inputs: Any, words: dict[str, Any]) -> None:
            ids = words["input_ids"] if words.get("input_ids") is not None else inputs[0]
            read.extend(map(tuple, ids.tolist()))

        model = load_model(*args, **settings)
        model.register_forward_pre_hook(keep, with_kwargs=True)
        return model

    monkeypatch.setattr(load, "load_model", watched)
    texts = ["a cat", "two red foxes", "<s>as said"]
    rows = [{"text": text, "answers": ["no", "yes"], "y": 0} for text in texts]
    documents = tmp_path / "short.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task_file = partial(local_tasks.write_task, documents)

    def read_for(task: Path) -> set[tuple[int, ...]]:
        read.clear()
        flags = ["--load", CHECKPOINT, "--tokenizer", tokenizer, "--device", "cpu"]
        assert main([str(word) for word in (*flags, "--tasks", task, "--batch-size", 1)]) == 0
        return set(read)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(ord(character) - 29 for character in text.removeprefix("<s>"))

    # Of a choice and of a text, the last token is predicted and not read.
    wanted = {(BEGIN, *ids(f"{text} {answer}")[:-1]) for text in texts for answer in ("no", "yes")}
    of_choice = {"output_type": "multiple_choice", "doc_to_text": "{{text}}"}
    choice = task_file("choice", doc_to_choice="{{answers}}", **of_choice)
    assert read_for(choice) == wanted
    assert read_for(local_tasks.write_rolling(task_file)) == {
        (BEGIN, *ids(text)[:-1]) for text in texts
    }
    free = local_tasks.write_free(partial(task_file, doc_to_text="{{text}}"))
    prompts = {row for row in read_for(free) if len(row) > 1}  # one by one, the answer's
    assert prompts == {(BEGIN, *ids(text)) for text in texts}


def no_folder(folder: Path, _tokenizer: Path) -> list[object]:
    return ["--load", folder / "absent"]


def no_checkpoint(folder: Path, _tokenizer: Path) -> list[object]:
    return ["--load", folder]


def no_tokenizer(_folder: Path, _tokenizer: Path) -> list[object]:
    return ["--load", CHECKPOINT]


def absent_tokenizer(folder: Path, _tokenizer: Path) -> list[object]:
    return ["--load", CHECKPOINT, "--tokenizer", folder / "absent"]


def other_iteration(_folder: Path, tokenizer: Path) -> list[object]:
    return ["--load", CHECKPOINT, "--tokenizer", tokenizer, "--iteration", 5]


def an_export(_folder: Path, _tokenizer: Path) -> list[object]:
    return ["--load", EXPORT]


def a_checkpoint_as_model(_folder: Path, _tokenizer: Path) -> list[object]:
    return ["--model", CHECKPOINT]


def tokenizer_of_an_export(_folder: Path, tokenizer: Path) -> list[object]:
    return ["--model", EXPORT, "--tokenizer", tokenizer]


def both(_folder: Path, _tokenizer: Path) -> list[object]:
    return ["--model", EXPORT, "--load", CHECKPOINT]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (no_folder, "--load is {folder}/absent: there is no such folder"),
        (no_checkpoint, "name the folder that a run saved to"),
        (no_tokenizer, "the checkpoint names none; give the training's as --tokenizer"),
        (absent_tokenizer, "--tokenizer is {folder}/absent: there is no such file or folder"),
        (other_iteration, "iter_0000005 does not exist; the iterations there: iter_0000004"),
        (an_export, "an exported model: name it with --model"),
        (a_checkpoint_as_model, "dynmoe evaluate takes it as --load {checkpoint}"),
        (tokenizer_of_an_export, "--tokenizer is of a checkpoint: give it with --load"),
        (both, "--load is not allowed with --model: give one of them"),
    ],
)
def test_misuse_is_named_with_its_remedy(
    flags: Callable[[Path, Path], list[object]],
    message: str,
    tokenizer: Path,
    choice: Path,
    tmp_path: Path,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "report.json"
    words = [*flags(tmp_path, tokenizer), "--tasks", choice, "--output", output]
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert message.format(folder=tmp_path, checkpoint=CHECKPOINT) in said
    assert said.count("\n") == 1
    assert not output.exists() and not list(scratch.glob(".dynmoe-*"))


def test_a_tokenizer_of_other_ids_is_refused(
    tokenizer: Path, choice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "tokenizer.json"
    made = json.loads((tokenizer / "tokenizer.json").read_text())
    made["model"]["vocab"] |= {f"word{i}": i for i in range(98, 200)}
    other.write_text(json.dumps(made))
    words = ["--load", CHECKPOINT, "--tokenizer", other, "--tasks", choice]
    assert main([str(word) for word in words]) == 1
    assert "it is another model's tokenizer" in capsys.readouterr().err


def test_is_bit_for_bit_the_model_that_was_saved(tokenizer: Path) -> None:
    # By the weights alone: nothing of the evaluation is between.
    with load.in_our_format(CHECKPOINT, tokenizer) as folder:
        model = load.load_model(folder, load.load_config(folder))
    saved = load.load_model(EXPORT, load.load_config(EXPORT))
    for ours, theirs in zip(model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)
