"""Measures trained models: on held-out text, with other thresholds, by layer, source and token.

Each result is kept in the run's folder and read from there the next time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_dynmoe.analysis.results.write_results import FORMAT, ROUTING
from megatron_dynmoe.conversion.convert import Target, to_hf
from megatron_dynmoe.storage.atomic import replace_file
from megatron_dynmoe.storage.megatron_names import CHECKPOINTS
from megatron_dynmoe.use import calibrate as calibration
from megatron_dynmoe.use import load
from study.corpus import Corpus
from study.fingerprint import ROOT
from study.runs import HELD_OUT, Run
from study.variants import TARGET

THRESHOLDS = (0.1, 0.2, 0.3, 0.4)  # Dynamic MoE's Table 7
ANALYZED = ("dtop_p", "top_p_04")  # the first seed of each
BATCH = 8  # sequences
POST_HOC, ANALYSIS = "post_hoc.json", "analysis"


def held_out(run: Run, corpus: Corpus) -> dict[str, float]:
    """Loss and experts of a model on all held-out text, the same sequences for every run.

    Megatron's own evaluations draw as many sequences at random, by the seed. Two of them differ by
    more than two routings do.

    Returns:
        ``validation_loss``, in nats per predicted token. If the model has experts, also
        ``validation_experts_per_token`` and ``validation_std_experts_per_token``, over tokens and
        layers.
    """
    return _kept(run.folder / HELD_OUT, lambda: _evaluate(*load_run(run, corpus)))


def post_hoc(run: Run, corpus: Corpus) -> list[dict[str, Any]]:
    """A top-2 model with its own routing, with thresholds, and with the one that gives 2 experts.

    The text is the held-out text of all kinds, with tokens packed as in training.
    """
    points = _kept(run.folder / POST_HOC, lambda: _sweep(*load_run(run, corpus)))
    return [point | {"seed": run.seed} for point in points]


def routing(run: Run, corpus: Corpus) -> dict[str, Any]:
    """The statistics of tools/analyze_routing.py about a model, on all held-out text.

    Raises:
        subprocess.CalledProcessError: the tool failed, and said why.
    """
    folder = run.folder / ANALYSIS
    if not _is_analysis(folder / ROUTING):
        groups = [
            word for kind in corpus.kinds for word in ("--group", f"{kind}={corpus.held_out(kind)}")
        ]
        subprocess.run(
            [
                *(sys.executable, str(ROOT / "tools" / "analyze_routing.py")),
                *("--model", str(run.folder / CHECKPOINTS), "--output", str(folder)),
                *("--tokenizer", str(corpus.tokenizer), *groups, "--min-count", "20"),
                "--overwrite",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    return json.loads((folder / ROUTING).read_text())["statistics"]


def analysis(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Experts by source, layer and token of a model."""
    found = routing(run, corpus)
    tokens = found["tokens"]
    return {
        "variant": run.variant.name,
        "experts_by_source": {
            name: group["experts_per_token"]["mean"] for name, group in found["groups"].items()
        },
        "experts_by_layer": [layer["experts_per_token"]["mean"] for layer in found["layers"]],
        "correlation_with_loss": found["all"]["rank_correlation"]["own_loss"],
        "frequent_tokens": tokens["frequent"],
        "words_among_most": tokens["words_among_most"],
        "words_among_fewest": tokens["words_among_fewest"],
        "most": [token["text"] for token in tokens["most"][:8]],
        "fewest": [token["text"] for token in tokens["fewest"][:8]],
    }


def _is_analysis(path: Path) -> bool:
    """Whether a file exists and was written by code like today's."""
    return path.is_file() and json.loads(path.read_text())["format"] == FORMAT


def _kept(path: Path, measure: Callable[[], Any]) -> Any:
    if not path.is_file():
        text = json.dumps(measure(), indent=2) + "\n"
        replace_file(path, lambda partial: partial.write_text(text))
    return json.loads(path.read_text())


def load_run(run: Run, corpus: Corpus) -> tuple[Any, torch.Tensor]:
    """A trained model, and the held-out text of all kinds in sequences [N, S], as in training."""
    load.be_quiet()
    exported = run.folder / "huggingface"
    if not exported.is_dir():
        target = Target(exported, dtype="float32", tokenizer=corpus.tokenizer)
        to_hf(run.folder / CHECKPOINTS, target)
    config, tokenizer = load.load_config(exported), load.load_tokenizer(exported)
    tokens_NS = torch.cat(
        [
            calibration.read_tokens(
                [str(corpus.held_out(kind))],
                tokenizer,
                num_tokens=sys.maxsize,
                sequence_length=config.max_position_embeddings,
            )
            for kind in corpus.kinds
        ]
    )
    return load.load_model(exported, config, device=load.default_device()), tokens_NS


@torch.no_grad()
def _evaluate(model: Any, tokens_NS: torch.Tensor) -> dict[str, float]:
    losses, counts = [], []
    for batch_BS in tokens_NS.split(BATCH):
        output = model(batch_BS.to(model.device), use_cache=False)
        logits_TV, labels_T = output.logits[:, :-1].flatten(0, 1), batch_BS[:, 1:].flatten()
        losses.append(
            torch.nn.functional.cross_entropy(
                logits_TV.float(), labels_T.to(model.device), reduction="none"
            ).double()
        )
        counts.append(output.experts_per_token.flatten().double())
    experts = torch.cat(counts)
    found = {"validation_loss": torch.cat(losses).mean().item()}
    if len(experts):  # a dense model has none
        found |= {
            "validation_experts_per_token": experts.mean().item(),
            "validation_std_experts_per_token": experts.std(correction=0).item(),
        }
    return found


def _sweep(model: Any, tokens_NS: torch.Tensor) -> list[dict[str, Any]]:
    config = model.config

    def measure(threshold: calibration.Threshold | None, label: str) -> calibration.Measurement:
        if threshold is not None:
            calibration.set_threshold(config, threshold)
        return calibration.measure(model, tokens_NS, BATCH, label)

    def point(threshold: float | None, measured: calibration.Measurement) -> dict[str, Any]:
        return {"threshold": threshold, "experts": measured.experts, "loss": measured.loss}

    own = measure(None, "top-2")
    points = [point(None, own)]
    points += [point(value, measure(value, f"threshold {value}")) for value in THRESHOLDS]
    found = calibration.calibrate(
        measure, own, TARGET, sparse=[kind == "sparse" for kind in config.mlp_layer_types]
    )
    assert isinstance(found.threshold, float)
    return [*points, point(found.threshold, found.measurement)]
