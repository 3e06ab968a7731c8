"""Benchmarks by EleutherAI's lm-eval, with the mean experts per token of each task and layer.

lm-eval makes the prompts, the scores and their errors. This module adds the experts per token by
task, as in Table 3 of Dynamic MoE. The paper counts each question with its right answer. Here every
text counts that the task makes the model read, including the wrong answers of a multiple choice and
generated answers (see `counting_lm.CountingLM`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.refusals import in_few_words

OWN_TASKS = Path(__file__).parent / "tasks"  # that lm-eval does not have

if TYPE_CHECKING:
    from megatron_dynmoe.use.counting_lm import CountingLM

# Names for the tasks of the papers: the folder of lm-eval, and the task's name there.
PRESETS: dict[str, tuple[str | Path, str]] = {
    "arc-c": ("arc", "arc_challenge"),
    "arc-e": ("arc", "arc_easy"),
    "bbh": ("bbh/cot_fewshot", "bbh_cot_fewshot"),
    "boolq": ("super_glue/boolq", "boolq"),
    "commonsenseqa": ("commonsense_qa", "commonsense_qa"),
    "copa": ("super_glue/copa", "copa"),
    "hellaswag": ("hellaswag", "hellaswag"),
    "lambada_openai": ("lambada", "lambada_openai"),
    "lsat-ar": ("agieval", "agieval_lsat_ar"),
    "lsat-lr": ("agieval", "agieval_lsat_lr"),
    "lsat-rc": ("agieval", "agieval_lsat_rc"),
    "mmlu": ("mmlu/default", "mmlu"),
    "piqa": ("piqa", "piqa"),
    "svamp": (OWN_TASKS, "svamp"),
    "winogrande": ("winogrande", "winogrande"),
}
# What a paper evaluates, with the tasks' own numbers of examples. Those are Dynamic MoE's: 3 for
# BBH, none for the others. It used OpenCompass, whose prompts differ. Of DTop-p we know that SVAMP
# has 5, and neither the numbers of the others, which have none here, nor which three tasks of
# AGIEval it takes: the LSAT's are our choice.
PAPERS = {
    "dynamic_moe": ("piqa", "hellaswag", "arc-e", "commonsenseqa", "bbh", "winogrande"),
    "dtop_p": (
        *("svamp", "mmlu", "arc-e", "arc-c", "copa", "piqa", "hellaswag", "winogrande"),
        *("lambada_openai", "boolq", "lsat-ar", "lsat-lr", "lsat-rc"),
    ),
}
PAPERS["paper"] = PAPERS["dynamic_moe"]  # its name when it was the only one


@dataclass(frozen=True)
class LoadedTasks:
    """lm-eval's tasks with their data, by their names in lm-eval, and its index."""

    by_name: dict[str, Any]
    manager: Any


def load_tasks(tasks: Sequence[str], include_path: Path | None = None) -> LoadedTasks:
    """Read tasks and their data before a model is loaded.

    Args:
        tasks: names of `PRESETS` or `PAPERS`, YAML files, or names in lm-eval or `include_path`.
        include_path: a folder of further tasks.

    Raises:
        UsageError: there is no such task or folder.
        ValueError: lm-eval is missing, a task is wrong, or its data is unavailable.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(
            "evaluation needs lm-eval: pip install 'megatron-dynmoe[eval]' (or lm-eval[hf])"
        )
    _stay_offline_without_network()
    names = [name for task in tasks for name in PAPERS.get(task, (task,))]
    specs = {name: PRESETS[name][1] if name in PRESETS else name for name in names}
    manager = _index_of(names, [*specs.values()], include_path)
    loaded: dict[str, Any] = {}
    for name, spec in specs.items():
        if not _is_file(spec) and spec not in manager.all_tasks:
            raise UsageError(
                f"--tasks is {name}: there is no such file, and lm-eval has no task of this name. "
                f"Presets: {', '.join([*PAPERS, *PRESETS])}; `lm-eval ls tasks` lists the others"
            )
        loaded |= _load(manager, name, spec)
    return LoadedTasks(loaded, manager)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: LoadedTasks,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Run `tasks` on `model`.

    Args:
        model, tokenizer: as from `huggingface.load`, for any causal language model.
        num_fewshot: examples in each prompt; if None, each task's own number.
        limit: documents of each task; if None, all.
        batch_size: requests read at once; the counts do not depend on it.

    Returns:
        A dictionary for a JSON file. "tasks" and "groups" (of tasks) have, by name, their metrics
        (value, standard error), num_fewshot, num_samples, tokens, mean_experts_per_token, and
        experts_are_counted: if it is false, the mean is the configuration's fixed number, or null
        for a dense model; if it is true, experts_per_token_by_layer has layer numbers, from 1, as
        keys. "requested" names the tasks in the order requested. "failed" gives, by name, the
        reason why a task has no results; the other tasks have theirs. "interrupted" says that
        Ctrl-C ended the evaluation before all tasks were done.
    """
    import lm_eval

    from megatron_dynmoe.use.counting_lm import CountingLM

    lm = CountingLM(model, tokenizer, batch_size)
    # Bootstrapping would fork this process, which has threads and perhaps a GPU.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    report: dict[str, Any] = {
        "lm_eval": lm_eval.__version__,
        "limit": limit,
        "requested": [*tasks.by_name],
        "tasks": {},
        "groups": {},
        "failed": {},
        "notes": [],
        "interrupted": False,
    }
    waiting = [*tasks.by_name.items()]
    while waiting:
        name, task = waiting.pop(0)
        lm.start_counting()
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
                bootstrap_iters=1000,  # for the errors of perplexities; 100,000 take a minute
            )
        except KeyboardInterrupt:
            report["interrupted"] = True
            break
        except Exception as error:  # of whatever kind: what other tasks have shown is kept
            report["failed"][name] = in_few_words(error, num_lines=2)
            # The members of a group may do without the one that failed.
            members = task.get_all_tasks() if hasattr(task, "get_all_tasks") else []
            waiting = [(member.task_name, member) for member in members] + waiting
            continue
        _add(report, results, lm, model.config)
    return report


def _add(report: dict[str, Any], results: dict[str, Any], lm: CountingLM, config: Any) -> None:
    """Add lm-eval's results for a task, or for a group and its members, to the report."""
    subtasks = results.get("group_subtasks", {})
    for name, entry in results["results"].items():
        leaves = _leaves(name, subtasks)
        report["tasks" if leaves == [name] else "groups"][name] = {
            "num_fewshot": results["n-shot"].get(name, results["n-shot"].get(leaves[0])),
            "num_samples": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
            "metrics": _metrics(entry),
            **_experts(lm, leaves, config),
        }
    for name, (wanted, given) in lm.shortened.items():
        report["notes"].append(
            f"task {name} asks for answers of up to {wanted} tokens, and the model has "
            f"{lm.max_length} positions in all: answers have up to {given} here (set "
            "generation_kwargs: {max_gen_toks: N} in the task's YAML file for another bound)"
        )


def _index_of(names: Sequence[str], specs: Sequence[str], include_path: Path | None) -> Any:
    """Build an index with all tasks that exist, from as few files as possible."""
    from lm_eval import tasks as lm_eval_tasks

    own = Path(lm_eval_tasks.__file__).parent
    folders = list(dict.fromkeys(own / PRESETS[name][0] for name in names if name in PRESETS))
    if include_path is not None:
        if not include_path.is_dir():
            raise UsageError(f"--include-path is {include_path}: there is no such folder")
        folders.append(include_path)
    manager = lm_eval_tasks.TaskManager(include_path=folders, include_defaults=False)
    if all(_is_file(spec) or spec in manager.all_tasks for spec in specs):
        return manager
    # lm-eval has thousands of tasks; it takes many seconds to read all of them.
    given = [] if include_path is None else [include_path]
    return lm_eval_tasks.TaskManager(include_path=[OWN_TASKS, *given])


def _load(manager: Any, name: str, spec: str) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError

    try:
        found = manager.load([spec])
    except (DatasetsError, OSError) as error:  # ConnectionError is an OSError too
        raise ValueError(
            f"task {name}: its data cannot be had: {in_few_words(error, num_lines=2)}\n"
            "Without a network, either\n"
            "- run this command once where there is one, with HF_HOME=FOLDER and --limit 1, which "
            "downloads the data into FOLDER; copy FOLDER here, and set HF_HOME to it and "
            "HF_HUB_OFFLINE=1; or\n"
            "- write the task as a YAML file with `dataset_path: json` and `dataset_kwargs: "
            "{data_files: {validation: FILE.jsonl}}`, and give --tasks the name of this file"
        ) from error
    except Exception as error:  # a wrong YAML file fails in many ways
        why = in_few_words(error, num_lines=2)
        raise ValueError(f"task {name} cannot be read: {why}") from error
    members = {child for children in found["group_map"].values() for child in children}
    everything = {**found["groups"], **found["tasks"]}
    return {own: item for own, item in everything.items() if own not in members}


def _is_file(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml")) and Path(spec).is_file()


def _leaves(name: str, subtasks: dict[str, list[str]]) -> list[str]:
    children = subtasks.get(name)
    if not children:
        return [name]
    return [leaf for child in children for leaf in _leaves(child, subtasks)]


def _metrics(entry: dict[str, Any]) -> dict[str, Any]:
    """Merge lm-eval's `acc,none` and `acc_stderr,none` into one entry."""
    metrics = {}
    for key, value in entry.items():
        name, _, filter_ = key.partition(",")
        if not filter_ or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = entry.get(f"{name}_stderr,{filter_}")
        label = name if filter_ == "none" else f"{name} ({filter_})"
        metrics[label] = {
            "value": value,
            "stderr": error if isinstance(error, int | float) else None,
        }
    return metrics


def _experts(lm: CountingLM, tasks: Sequence[str], config: Any) -> dict[str, Any]:
    """The mean over the tokens of all these tasks."""
    if not lm.experts_L:
        fixed = getattr(config, "num_experts_per_tok", None)
        return {"tokens": None, "mean_experts_per_token": fixed, "experts_are_counted": False}
    tokens = sum(lm.tokens[task] for task in tasks)
    experts_of_tasks = [lm.experts_L[task].tolist() for task in tasks]
    by_layer = [sum(layer) / tokens for layer in zip(*experts_of_tasks, strict=True)]
    sparse = [i for i, kind in enumerate(config.mlp_layer_types, 1) if kind == "sparse"]
    return {
        "tokens": tokens,
        "mean_experts_per_token": sum(by_layer) / len(by_layer),
        "experts_are_counted": True,
        "experts_per_token_by_layer": dict(zip(map(str, sparse), by_layer, strict=True)),
    }


def _stay_offline_without_network() -> None:
    """If the hub cannot be reached, spare the user half a minute of its retries."""
    from huggingface_hub import constants

    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if constants.HF_HUB_OFFLINE or any(os.environ.get(name) for name in proxies):
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        # The package datasets reads the variable at its import; the hub's client has read it.
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
