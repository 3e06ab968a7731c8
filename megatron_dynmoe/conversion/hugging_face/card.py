"""Writes the model card: what the model is, how it was trained, how to use it."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_dynmoe import __version__
from megatron_dynmoe.settings.messages.words import is_number
from megatron_dynmoe.settings.routings import ROUTINGS
from megatron_dynmoe.storage.atomic import replace_file

CARD = "README.md"

_CITATIONS = """\
```bibtex
@article{huang2024harder,
  title={Harder Task Needs More Experts: Dynamic Routing in MoE Models},
  author={Huang, Quzhe and An, Zhenwei and Zhuang, Nan and Tao, Mingxu and Zhang, Chen and
          Jin, Yang and Xu, Kun and Chen, Liwei and Huang, Songfang and Feng, Yansong},
  journal={arXiv:2403.07652}, year={2024}
}
@article{jin2025dtopp,
  title={Sparsity-Controllable Dynamic Top-p MoE for Large Foundation Model Pre-training},
  author={Jin, Can and Peng, Hongwu and Xiang, Mingcan and Zhang, Qixin and Yuan, Xiangchi and
          Hasan, Amit and Dibua, Ohiremen and Gong, Yifan and Kang, Yan and
          Metaxas, Dimitris N.},
  journal={arXiv:2512.13996}, year={2025}
}
```
"""
# Settings of a routing, in the order in which the card lists them.
_ROUTING = "## Routing"
_SHOWN = (
    "routing",
    "num_experts",
    "num_experts_per_tok",
    "target_experts_per_token",
    "threshold",
    "theta",
    "max_experts_per_token",
    "inference_threshold",
    "inference_experts_per_token",
    "inference_max_experts_per_token",
    "normalization",
    "weights",
    "router_dtype",
    "balance_loss",
    "balance_loss_coeff",
    "dynamic_loss_coeff",
)


def about_training(args: Namespace, iteration: int) -> dict[str, Any]:
    """What Megatron's saved arguments say about the training, for the card."""
    samples = getattr(args, "consumed_train_samples", 0) or 0
    about: dict[str, Any] = {
        "steps": iteration,
        "tokens": samples * getattr(args, "seq_length", 0),
        "global batch": getattr(args, "global_batch_size", None),
        "sequence length": getattr(args, "seq_length", None),
        "learning rate": getattr(args, "lr", None),
        "optimizer": getattr(args, "optimizer", None),
    }
    data = getattr(args, "data_path", None) or getattr(args, "train_data_path", None)
    if data:
        # A path says more about a cluster than about the data. Weights may stand between paths.
        about["data"] = ", ".join(Path(part).name for part in data if not is_number(part))
    elif getattr(args, "mock_data", False):
        about["data"] = "random tokens (--mock-data)"
    origin = getattr(args, "huggingface_source", None)
    if iteration == 0 and isinstance(origin, dict) and isinstance(origin.get("format"), str):
        return {"converted from": f"a folder of format {origin['format']}"}
    return {name: value for name, value in about.items() if value}


def write_card(
    folder: Path, config: dict[str, Any], about: dict[str, Any], how_to_load: str, dtype: str
) -> None:
    """Write the card into the folder, which holds the tokenizer already."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [mixture-of-experts, dynamic-routing, megatron]",
        "---",
        "",
        f"# {_title(config)}",
        "",
        _summary(config, about),
        "",
        "## Use",
        "",
        how_to_load,
        *_special_tokens(folder),
        "## Model",
        "",
        *_table({name: config[name] for name in _MODEL} | {"dtype": dtype}),
        "",
        "## Training",
        "",
        *_table(about or {"steps": "not known"}),
    ]
    lines += [
        "",
        *_routing(config),
        "## Citation",
        "",
        f"Written by megatron-dynmoe {__version__}. The methods:",
        "",
        _CITATIONS,
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def update_routing(folder: Path, config: dict[str, Any]) -> None:
    """Bring the card's section on routing up to date, if the folder has such a card."""
    path = folder / CARD
    text = path.read_text("utf-8") if path.is_file() else ""
    start, end = text.find(_ROUTING), text.find("## Citation")
    if 0 <= start < end:
        text = text[:start] + "\n".join(_routing(config)) + "\n" + text[end:]
        replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


_MODEL = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "moe_intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def _title(config: dict[str, Any]) -> str:
    if not config["num_experts"]:
        return "A dense language model"
    title = ROUTINGS[config["routing"]].title
    return f"A mixture-of-experts language model with {title} routing"


def _summary(config: dict[str, Any], about: dict[str, Any]) -> str:
    experts = config["num_experts"]
    sentences = []
    if config["routing"] in ("top_p", "dtop_p"):
        sentences.append(
            f"Every token chooses how many of {experts} experts it uses: it takes them in the "
            "order of their probability until the sum exceeds a threshold."
        )
    elif config["routing"] != "top_k":
        sentences.append(
            f"How many of {experts} experts a token uses is different from token to token."
        )
    elif experts:
        sentences.append(f"Every token uses {config['num_experts_per_tok']} of {experts} experts.")
    if "steps" in about:
        sentences.append("Trained with Megatron-Core and megatron-dynmoe.")
    return " ".join(sentences)


def _special_tokens(folder: Path) -> list[str]:
    """What a chat template needs, if the tokenizer takes the names of special tokens for text."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not json.loads(path.read_text("utf-8")).get("split_special_tokens"):
        return []
    return [
        "To the tokenizer, the name of a special token within a text is text, as it was in the "
        "training. For chat templates, and for texts that end with the end token's name, load it "
        "with `AutoTokenizer.from_pretrained(folder, split_special_tokens=False)`.",
        "",
    ]


def _routing(config: dict[str, Any]) -> list[str]:
    if not config["num_experts"]:
        return []
    shown = {name: config.get(name) for name in _SHOWN}
    lines = [_ROUTING, "", *_table({k: v for k, v in shown.items() if v is not None}), ""]
    calibration = config.get("calibration")
    if calibration:
        lines += [
            f"The threshold was set after the training, so that a token of {calibration['data']} "
            f"uses {calibration['mean_experts_per_token']:.3f} experts on average (over "
            f"{calibration['tokens']:,} tokens, target "
            f"{calibration['target_experts_per_token']:g}).",
            "",
        ]
    return [*lines, *_measured(config), "", *_budgets(config)]


def _budgets(config: dict[str, Any]) -> list[str]:
    """The curve by which a mean number of experts can be asked for."""
    curve = config.get("budget_curve")
    if not curve:
        return []
    made = config.get("budget_calibration")
    how = "Steered in training"
    if made:
        how = f"Measured over {made['tokens']:,} tokens of {made['data']}"
    lines = ["### Budgets", "", f"{how}; on other text the count is another.", ""]
    lines += ["| experts per token | threshold | loss, nats |", "| --- | --- | --- |"]
    for point in curve:
        loss = "-" if point.get("loss") is None else f"{point['loss']:.4f}"
        lines.append(f"| {point['experts_per_token']:g} | {point['threshold']:.6g} | {loss} |")
    first, last = curve[0]["experts_per_token"], curve[-1]["experts_per_token"]
    return [
        *lines,
        "",
        f"Ask for {first:g} to {last:g} experts per token, for the model or for each sequence:",
        "",
        "```python",
        f"model.set_budget({first:g})  # None: the trained threshold",
        f"model.generate(**tokens, experts_per_token={last:g})  # or [1, 2, 4]: one each",
        "```",
        "",
    ]


def _measured(config: dict[str, Any]) -> list[str]:
    if config["routing"] == "top_k" or (config.get("calibration") or {}).get("before"):
        return []
    by_layer = config.get("measured_experts_per_token")
    if not by_layer:
        return ["Experts per token were not measured: the model was not trained with this routing."]
    values = [value for value in by_layer if value is not None]
    return [
        f"Measured experts per token, over the last global batch of training: "
        f"**{sum(values) / len(values):.3f}** on average; by layer "
        + ", ".join("-" if value is None else f"{value:.2f}" for value in by_layer)
        + "."
    ]


def _table(values: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {_shown(value)} |" for name, value in values.items()]
    return ["| | |", "| --- | --- |", *rows]


def _shown(value: Any) -> str:
    if isinstance(value, list) and len({item for item in value if item is not None}) == 1:
        value = next(item for item in value if item is not None)  # the same in every layer
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if value >= 10000 else str(value)
    if isinstance(value, list):
        return ", ".join("-" if item is None else f"{item:.4g}" for item in value)
    return value if isinstance(value, str) else json.dumps(value)
