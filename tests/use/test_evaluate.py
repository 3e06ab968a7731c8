"""Evaluation: the counts against counting by hand, the scores against lm-eval alone.

Tasks and data are local; the network is never asked.
"""

import copy
import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'megatron-dynmoe[eval]'")

import lm_eval
import yaml
from huggingface_hub import constants
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from megatron_dynmoe.conversion.hugging_face.tokenizer import export_tokenizer
from megatron_dynmoe.data.train_tokenizer import train_tokenizer
from megatron_dynmoe.huggingface import DynMoEForCausalLM, DynMoEModelConfig
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.use import evaluate as module
from megatron_dynmoe.use.counting_lm import CountingLM
from megatron_dynmoe.use.evaluate import PAPERS, PRESETS, evaluate, load_tasks
from megatron_dynmoe.use.load import load_tokenizer
from tests.helpers.local_tasks import CHOICES, NUM_NEW
from tests.helpers.ports import reserved_port

pytestmark = pytest.mark.usefixtures("offline")

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of two MoE layers and a dense one between them."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = DynMoEModelConfig(
        **SIZES,
        **{"vocab_size": 500, "intermediate_size": 32, "max_position_embeddings": 96},
        **{"num_experts": 8, "moe_intermediate_size": 16, "routing": "top_p", "threshold": 0.5},
        **{"mlp_layer_types": ["sparse", "dense", "sparse"], "initializer_range": 0.3},
        **{"bos_token_id": 1, "eos_token_id": 2},
    )
    DynMoEForCausalLM(config).save_pretrained(folder)
    corpus = str(ROOT / "examples" / "data" / "dictionary.jsonl.gz")
    export_tokenizer(train_tokenizer([corpus], str(folder.parent / "sp"), 500), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return DynMoEForCausalLM.from_pretrained(folder).eval()


def texts(documents: Path) -> list[str]:
    return [json.loads(line)["text"] for line in documents.read_text().splitlines()]


def experts_of(model: Any, ids: list[int]) -> torch.Tensor:
    """Experts of one text alone, summed over its tokens: [MoE layers]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).experts_per_token[:, 0].sum(dim=1)


def assert_counts(entry: dict[str, Any], model: Any, inputs: list[list[int]]) -> None:
    tokens = sum(map(len, inputs))
    by_layer = (sum(experts_of(model, ids) for ids in inputs) / tokens).tolist()
    assert entry["tokens"] == tokens
    assert entry["experts_per_token_by_layer"] == pytest.approx(
        {"1": by_layer[0], "3": by_layer[1]}, rel=1e-6
    )
    assert entry["mean_experts_per_token"] == pytest.approx(sum(by_layer) / 2, rel=1e-6)
    assert by_layer[0] != by_layer[1] > 1  # else this would tell nothing


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_multiple_choice(
    batch_size: int, model: Any, tokenizer: Any, choice: Path, documents: Path
) -> None:
    report = evaluate(model, tokenizer, load_tasks([str(choice)]), batch_size=batch_size)
    # The last token is predicted, not read; what two requests share is read once.
    inputs = {
        tuple(tokenizer.encode(f"Q: {text} {answer}", add_special_tokens=False)[:-1])
        for text in texts(documents)
        for answer in CHOICES
    }
    assert len(inputs) < len(CHOICES) * len(texts(documents))
    assert_counts(report["tasks"]["choice"], model, [list(ids) for ids in inputs])
    assert report["tasks"]["choice"]["num_samples"] == 10


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation(
    batch_size: int, model: Any, tokenizer: Any, free: Path, documents: Path
) -> None:
    report = evaluate(model, tokenizer, load_tasks([str(free)]), batch_size=batch_size)
    inputs, lengths = [], []
    for text in texts(documents):
        prompt = tokenizer.encode(f"Q: {text}", add_special_tokens=False)
        answer: list[int] = []
        while len(answer) < NUM_NEW and answer[-1:] != [2]:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits
            answer.append(int(logits[0, -1].argmax()))
            if any(stop in tokenizer.decode(answer) for stop in "et"):
                break
        inputs.append(prompt + answer[:-1])
        lengths.append(len(answer))
    assert len(set(lengths)) > 2  # so some answers end while others go on
    assert_counts(report["tasks"]["free"], model, inputs)


def test_answers_hold_no_id_without_a_token(model: Any, tokenizer: Any, free: Path) -> None:
    """One of the two rows that are put behind the vocabulary always has the largest logit."""
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(502)
    with torch.no_grad():
        weight = padded.lm_head.weight
        weight[500], weight[501] = 50 * weight[5], -50 * weight[5]
    reports = [
        evaluate(one, tokenizer, load_tasks([str(free)]), batch_size=4) for one in (model, padded)
    ]
    assert reports[0]["tasks"] == reports[1]["tasks"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_whole_texts(
    batch_size: int, model: Any, tokenizer: Any, rolling: Path, documents: Path
) -> None:
    report = evaluate(model, tokenizer, load_tasks([str(rolling)]), batch_size=batch_size)
    # As in training, a text follows the end of another: </s>, not <s>.
    inputs = [
        [2, *tokenizer.encode(text, add_special_tokens=False)][:-1] for text in texts(documents)
    ]
    assert max(map(len, inputs)) <= 96
    assert_counts(report["tasks"]["rolling"], model, inputs)


def test_tasks_are_kept_apart_and_scores_are_lm_evals(
    model: Any, tokenizer: Any, choice: Path, rolling: Path, free: Path, task_file: Any
) -> None:
    # Of the same kind as `choice`, so that lm-eval mixes the requests of the two.
    other = task_file(
        "other",
        output_type="multiple_choice",
        doc_to_choice=["yes", "no"],
        doc_to_target=0,
        doc_to_text="{{text}} ?",
    )
    paths = [str(path) for path in (choice, other, rolling, free)]
    together = evaluate(model, tokenizer, load_tasks(paths), batch_size=3)
    for path, name in zip(paths, ("choice", "other", "rolling", "free"), strict=True):
        alone = evaluate(model, tokenizer, load_tasks([path]), batch_size=3)
        assert together["tasks"][name] == alone["tasks"][name]
    assert together["requested"] == ["choice", "other", "rolling", "free"]

    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, prefix_token_id=2)
    tasks = load_tasks(paths)
    theirs = lm_eval.simple_evaluate(
        model=plain,
        tasks=[*tasks.by_name.values()],
        task_manager=tasks.manager,
        bootstrap_iters=0,
    )
    for name, metric in (
        ("choice", "acc"),
        ("free", "exact_match"),
        ("rolling", "word_perplexity"),
    ):
        expected = theirs["results"][name][f"{metric},none"]
        assert together["tasks"][name]["metrics"][metric]["value"] == pytest.approx(expected)


def test_a_group_is_the_mean_over_all_its_tokens(
    model: Any, tokenizer: Any, choice: Path, rolling: Path
) -> None:
    group = choice.parent / "both.yaml"
    group.write_text(yaml.safe_dump({"group": "both", "task": ["choice", "rolling"]}))
    report = evaluate(model, tokenizer, load_tasks(["both"], choice.parent), limit=3)
    assert report["requested"] == ["both"]
    parts = [report["tasks"][name] for name in ("choice", "rolling")]
    whole = report["groups"]["both"]
    assert whole["tokens"] == sum(part["tokens"] for part in parts)
    assert whole["num_samples"] == 6
    weighted = sum(part["tokens"] * part["mean_experts_per_token"] for part in parts)
    assert whole["mean_experts_per_token"] == pytest.approx(weighted / whole["tokens"])


JOINS = {
    # An answer that is a part of the last word, or a whole one; its context and it alone.
    "within a word": ("Q: 7 app", "les", "Q: 7 app", "les"),
    "a letter": ("Q: th", "e", "Q: th", "e"),
    "whole": ("Q: the", " word", "Q: the", " word"),
    "a space at the end": ("Q: the ", "word", "Q: the", " word"),
    "spaces only": (" ", "the", "</s>", " the"),
    "a line break only": ("\n", "the", "</s>", "\nthe"),
}


@pytest.mark.parametrize("case", JOINS.values(), ids=JOINS)
def test_all_of_an_answer_is_scored_if_a_token_spans_the_join(
    model: Any, tokenizer: Any, case: tuple[str, str, str, str]
) -> None:
    context, answer, *parts = case
    ids = CountingLM(model, tokenizer, batch_size=1)._encode_pair(context, answer)
    assert [tokenizer.decode(part) for part in ids] == parts


def test_a_task_whose_answers_are_parts_of_words(
    model: Any, tokenizer: Any, task_file: Any
) -> None:
    parts = task_file(
        "parts",
        output_type="multiple_choice",
        doc_to_text="{{text}} Q: th",
        doc_to_choice=["e", "at", "ing"],
        target_delimiter="",
    )
    report = evaluate(model, tokenizer, load_tasks([str(parts)]))
    assert report["tasks"]["parts"]["num_samples"] == 10


def test_models_without_counts(tokenizer: Any, choice: Path) -> None:
    tasks = load_tasks([str(choice)])
    sizes = {**SIZES, "vocab_size": 500, "intermediate_size": 32, "num_key_value_heads": 2}
    mixtral = MixtralForCausalLM(
        MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=3)
    ).eval()
    entry = evaluate(mixtral, tokenizer, tasks)["tasks"]["choice"]
    assert (entry["mean_experts_per_token"], entry["experts_are_counted"]) == (3, False)
    dense = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    entry = evaluate(dense, tokenizer, tasks)["tasks"]["choice"]
    assert (entry["mean_experts_per_token"], entry["experts_are_counted"]) == (None, False)
    assert entry["tokens"] is None


def test_a_task_that_fails_takes_no_other_with_it(
    run_tool: Callable[..., str], choice: Path, task_file: Any, tmp_path: Path, capsys: Any
) -> None:
    beams = task_file(
        "beams",
        output_type="generate_until",
        doc_to_target="{{answers[0]}}",
        metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["e"], "max_gen_toks": 4, "num_beams": 2, "do_sample": False},
    )
    group = choice.parent / "with_beams.yaml"
    group.write_text(yaml.safe_dump({"group": "with_beams", "task": ["beams", "choice"]}))
    with pytest.raises(SystemExit) as ended:
        output = ["--output", tmp_path / "out.json"]
        run_tool("--tasks", f"{beams},{choice}", "--limit", 2, *output)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "task beams has no results: task beams: its generation_kwargs" in said.err
    assert "Traceback" not in said.err
    report = json.loads((tmp_path / "out.json").read_text())
    assert [*report["failed"]] == ["beams"] and [*report["tasks"]] == ["choice"]

    with pytest.raises(SystemExit):  # the members of a group are tried alone
        include = ["--include-path", choice.parent, "--limit", 2]
        run_tool("--tasks", "with_beams", *include, *output)
    second = json.loads((tmp_path / "out.json").read_text())
    assert sorted(second["failed"]) == ["beams", "with_beams"]
    assert second["tasks"]["choice"] == report["tasks"]["choice"]


def test_ctrl_c_keeps_the_tasks_that_are_done(
    run_tool: Callable[..., str], choice: Path, rolling: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    simple_evaluate = lm_eval.simple_evaluate

    def interrupted(**settings: Any) -> Any:
        if settings["tasks"][0].task_name == "rolling":
            raise KeyboardInterrupt
        return simple_evaluate(**settings)

    monkeypatch.setattr(lm_eval, "simple_evaluate", interrupted)
    with pytest.raises(SystemExit) as ended:
        output = tmp_path / "out.json"
        run_tool("--tasks", f"{choice},{rolling}", "--limit", 2, "--output", output)
    assert ended.value.code == 130
    report = json.loads(output.read_text())
    assert report["interrupted"] and [*report["tasks"]] == ["choice"]


def test_answers_as_long_as_the_positions_are_shortened_and_that_is_said(
    model: Any, tokenizer: Any, task_file: Any
) -> None:
    for asked_for, given in ((None, 48), (96, 48), (95, None)):
        settings = {"until": ["no such text"], "do_sample": False}
        settings |= {} if asked_for is None else {"max_gen_toks": asked_for}
        long = task_file(
            "long",
            output_type="generate_until",
            doc_to_target="{{answers[0]}}",
            metric_list=[{"metric": "exact_match"}],
            generation_kwargs=settings,
        )
        report = evaluate(model, tokenizer, load_tasks([str(long)]), limit=1)
        assert not report["failed"]
        assert report["tasks"]["long"]["tokens"] <= 96
        notes = " ".join(report["notes"])
        assert (f"up to {asked_for or 256} tokens" in notes) is (given is not None)


@pytest.mark.parametrize("adds", ["", "begin", "end", "begin end"])
def test_scores_are_sums_by_hand_whatever_the_tokenizer_adds(
    adds: str, model: Any, folder: Path, choice: Path, rolling: Path, documents: Path
) -> None:
    tokenizer = load_tokenizer(folder)
    single = ["<s>"] * ("begin" in adds) + ["$A"] + ["</s>"] * ("end" in adds)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(single), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert len(tokenizer("a b")["input_ids"]) == len(single) - 1 + len(
        tokenizer("a b", add_special_tokens=False)["input_ids"]
    )
    begin = [1] * ("begin" in adds)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def score(context: list[int], continuation: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0]
        log_probs = logits.float().log_softmax(-1)[len(context) - 1 : -1]
        return log_probs[torch.arange(len(continuation)), continuation].sum().item()

    rows = [json.loads(line) for line in documents.read_text().splitlines()]
    right, total = 0, 0.0
    for row in rows:
        prompt = encode(f"Q: {row['text']}")
        whole = [encode(f"Q: {row['text']} {answer}") for answer in CHOICES]
        scores = [score(begin + prompt, ids[len(prompt) :]) for ids in whole]
        right += scores.index(max(scores)) == row["y"]
        total += score(begin or [2], encode(row["text"]))
    tasks = load_tasks([str(choice), str(rolling)])
    report = evaluate(model, tokenizer, tasks, batch_size=3)["tasks"]
    assert report["choice"]["metrics"]["acc"]["value"] == pytest.approx(right / len(rows))
    words = sum(len(row["text"].split()) for row in rows)
    perplexity = report["rolling"]["metrics"]["word_perplexity"]["value"]
    assert math.log(perplexity) == pytest.approx(-total / words, rel=1e-4)


def test_presets_are_tasks_with_the_papers_examples() -> None:
    tasks = Path(lm_eval.tasks.__file__).parent
    manager = module._index_of([*PRESETS], [name for _, name in PRESETS.values()], None)
    assert len(manager.all_tasks) < 200  # not all of lm-eval was read
    for folder, name in PRESETS.values():
        assert name in manager.all_tasks
        for path in (tasks / folder).glob("*yaml"):
            (shots,) = re.findall(r"^num_fewshot: (\d+)", path.read_text(), re.MULTILINE) or "0"
            wanted = {"_cot_fewshot_template_yaml": "3", "svamp.yaml": "5"}
            assert shots == wanted.get(path.name, "0")
    assert {name for names in PAPERS.values() for name in names} == PRESETS.keys()
    assert [len(PAPERS[paper]) for paper in ("dynamic_moe", "dtop_p")] == [6, 13]


@pytest.mark.parametrize("paper", ["dtop_p", "paper"])
def test_a_paper_is_all_of_its_tasks(paper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_load", lambda _manager, name, spec: {spec: name})
    loaded = load_tasks([paper]).by_name
    assert [*loaded.values()] == [*PAPERS[paper]]
    assert [*loaded] == [PRESETS[name][1] for name in PAPERS[paper]]


def test_svamp(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def problem(number: int) -> dict[str, str]:
        words = {"Body": f"Ann has {number} pens. Bob has 2", "Question": "How many are there? "}
        return words | {"Answer": f"{number + 2}.0"}

    data = {"train": range(6), "test": [1234565, 40]}
    for split, numbers in data.items():
        rows = (json.dumps(problem(number)) + "\n" for number in numbers)
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    # As whoever has the data but no network would write it.
    files = {split: str(tmp_path / f"{split}.jsonl") for split in data}
    task = {"include": str(module.OWN_TASKS / "svamp.yaml"), "dataset_path": "json"}
    (tmp_path / "svamp.yaml").write_text(
        yaml.safe_dump(task | {"dataset_kwargs": {"data_files": files}})
    )
    loaded = load_tasks(["svamp"], tmp_path)
    prompts = []

    def answers(self: Any, requests: list[Any], **_: Any) -> list[str]:
        prompts.extend(request.args[0] for request in requests)
        return [" 1,234,567 pens, not 3", " -42"]

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.generate_until", answers)
    monkeypatch.setattr(CountingLM, "max_length", 1000)
    entry = evaluate(model, tokenizer, loaded)["tasks"]["svamp"]
    assert entry["num_fewshot"] == 5 and entry["num_samples"] == 2
    assert entry["metrics"]["exact_match (first-number)"]["value"] == 0.5
    shown = "".join(
        f"Question: Ann has {n} pens. Bob has 2. How many are there?\nAnswer: {n + 2}\n\n"
        for n in range(5)
    )
    assert prompts[0] == (
        f"{shown}Question: Ann has 1234565 pens. Bob has 2. How many are there?\nAnswer:"
    )


def test_a_preset_without_its_data() -> None:
    with pytest.raises(ValueError, match=r"task arc-e: its data cannot be had: .*\n.*\n.*HF_HOME"):
        load_tasks(["arc-e"])


def test_a_hub_out_of_reach_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        module._stay_offline_without_network()
        assert not constants.HF_HUB_OFFLINE and "HF_HUB_OFFLINE" not in os.environ
    keeper, port = reserved_port()
    with keeper:  # which nobody listens to, and nobody else can come to listen to
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        module._stay_offline_without_network()
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_bad_input(
    choice: Path, task_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = {"data_files": {"validation": str(tmp_path / "absent.jsonl")}}
    lost = task_file("lost", output_type="multiple_choice", dataset_kwargs=absent)
    with pytest.raises(ValueError, match=r"lost\.yaml: its data cannot be had: .*absent\.jsonl"):
        load_tasks([str(lost)])
    (tmp_path / "odd.yaml").write_text("task: [unfinished")
    with pytest.raises(ValueError, match=r"odd\.yaml cannot be read"):
        load_tasks([str(tmp_path / "odd.yaml")])
    with pytest.raises(UsageError, match=r"--include-path is .*: there is no such folder"):
        load_tasks(["piqa"], tmp_path / "absent")
    empty = SimpleNamespace(all_tasks=[])
    monkeypatch.setattr(module, "_index_of", lambda *_: empty)  # the whole takes 15 s to read
    with pytest.raises(UsageError, match="--tasks is piqqa: there is no such file, and lm-eval"):
        load_tasks(["piqqa"])
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-dynmoe\[eval\]'"):
        load_tasks([str(choice)])


@pytest.fixture
def run_tool(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    from megatron_dynmoe.cli.evaluate import main

    def run(*args: object) -> str:
        argv = ["evaluate.py", "--model", str(folder), "--device", "cpu", *map(str, args)]
        monkeypatch.setattr(sys, "argv", argv)
        main()
        return capsys.readouterr().out

    yield run


def test_command_line(
    run_tool: Callable[..., str], choice: Path, free: Path, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    options = ["--limit", 4, "--batch-size", 2, "--dtype", "bfloat16", "--output", output]
    printed = run_tool("--tasks", f"{choice},{free}", *options)
    report = json.loads(output.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (report["dtype"], report["limit"]) == ("bfloat16", 4)
    lines = printed.splitlines()
    for name in ("choice", "free"):
        entry = report["tasks"][name]
        row = next(line for line in lines if line.startswith(name)).split()
        assert row[0:2] == [name, "0"]
        assert row[-1] == f"{entry['mean_experts_per_token']:.3f}"
    layers = lines[lines.index(next(line for line in lines if line.startswith("layer"))) :]
    assert layers[0].split() == ["layer", "choice", "free"]
    first = report["tasks"]["choice"]["experts_per_token_by_layer"]
    assert [line.split()[:2] for line in layers[2:4]] == [[k, f"{v:.3f}"] for k, v in first.items()]


def test_command_line_errors(
    run_tool: Callable[..., str], choice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"evaluate\.py: error: task piqa: its data cannot be had"):
        run_tool("--tasks", "piqa")
    with pytest.raises(SystemExit, match=r"^2$"):
        run_tool("--tasks", choice, "--output", tmp_path / "absent" / "report.json")
    assert "there is no folder" in capsys.readouterr().err
