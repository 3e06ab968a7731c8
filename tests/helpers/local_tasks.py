"""Tasks for lm-eval whose data lies in a local file: multiple choice, free answers, whole texts."""

import json
from collections.abc import Callable
from pathlib import Path

import yaml

CHOICES = ["red", "green and blue", "no"]
NUM_NEW = 12  # tokens of an answer at most


def write_documents(folder: Path) -> Path:
    """Ten documents of very different lengths, the first two the same."""
    path = folder / "fruit.jsonl"
    rows = [
        {
            "text": f"{i // 2 * 7} apples and pears" * (1 + i // 2 % 3),
            "answers": CHOICES,
            "y": i % 3,
        }
        for i in [0, *range(9)]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_task(documents: Path, name: str, **settings: object) -> Path:
    """Write a task's YAML file beside its documents."""
    task = {
        **{"task": name, "dataset_path": "json", "validation_split": "validation"},
        "dataset_kwargs": {"data_files": {"validation": str(documents)}},
        **{"doc_to_text": "Q: {{text}}", "doc_to_target": "y", "num_fewshot": 0},
        "metric_list": [{"metric": "acc"}],
    }
    path = documents.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task | settings))
    return path


def write_choice(task_file: Callable[..., Path]) -> Path:
    return task_file("choice", output_type="multiple_choice", doc_to_choice="{{answers}}")


def write_free(task_file: Callable[..., Path]) -> Path:
    return task_file(
        "free",
        output_type="generate_until",
        doc_to_target="{{answers[0]}}",
        metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["e", "t"], "max_gen_toks": NUM_NEW, "do_sample": False},
    )


def write_rolling(task_file: Callable[..., Path]) -> Path:
    return task_file(
        "rolling",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
