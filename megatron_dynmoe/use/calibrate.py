"""Finds the threshold that gives an exported model a target mean of experts per token on real text.

This works for models trained with a threshold and for models trained with top-k. The routing of a
layer depends on the experts that earlier layers chose, so the threshold is found by repeated
measurement: a sample of the router's probabilities says how far to move, and the mean over all
tokens says how far off the threshold still is.

Letters: N sequences, S positions of a sequence, T tokens, E experts, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dynmoe.control.calibrate import mean_experts_per_token, threshold_for_target
from megatron_dynmoe.conversion.hugging_face.card import CARD, update_routing
from megatron_dynmoe.conversion.hugging_face.words import CONFIG
from megatron_dynmoe.huggingface.encoding import encode_document
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.storage.atomic import replace_file
from megatron_dynmoe.storage.json_files import read_json, write_json
from megatron_dynmoe.storage.manifest import update_manifest

# So many probabilities are kept of one pass, over all layers: 16 MiB.
MAX_SAMPLED_PROBS = 2**22
# Three to six are usually enough; bisection, the last resort, takes about twenty per threshold.
EXTRA_PASSES = 20

Threshold = float | list[float | None]


@dataclass(frozen=True)
class Measurement:
    """Means over all tokens of one pass."""

    loss: float  # nats per predicted token
    experts_by_layer: list[float]  # one entry per MoE layer
    tokens: int
    probs_LTE: Tensor  # the router's probabilities for a sample of the tokens

    @property
    def experts(self) -> float:
        return sum(self.experts_by_layer) / len(self.experts_by_layer)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Calibration:
    """A threshold that gives the target, and the measurement made with it."""

    target: float
    scope: str
    threshold: Threshold
    measurement: Measurement


@dataclass(frozen=True)
class Point:
    """A point of a curve of budgets: what to ask for, and what was measured with its threshold."""

    experts: float  # as asked for, if it was, and else as measured
    threshold: float
    measurement: Measurement

    def to_json(self) -> dict[str, Any]:
        return {
            "experts_per_token": self.experts,
            "threshold": self.threshold,
            "loss": round(self.measurement.loss, 6),
        }


def tolerance(target: float) -> float:
    """How far a measured mean may be from the target: 0.5 %, at most 0.01."""
    return min(0.01, 0.005 * target)


def read_tokens(
    data: Sequence[str],
    tokenizer: Any,
    *,
    num_tokens: int,
    sequence_length: int,
    text_key: str = "text",
) -> Tensor:
    """Read the first tokens of some files, packed into sequences as for training.

    Each document is encoded as in training, one after another: see
    :mod:`megatron_dynmoe.huggingface.encoding`.

    Args:
        data: files of text, folders or globs; see :mod:`megatron_dynmoe.data.text.readers`.
        num_tokens: the number of tokens, rounded down to whole sequences (one at least).
        sequence_length: S; it is shorter if the whole text is shorter.
        text_key: the field or column that holds the text; not for ``.txt``.

    Returns:
        [N, S], int64.

    Raises:
        ValueError: a file cannot be read, or all files together hold fewer than two tokens.
    """
    wanted = max(num_tokens, sequence_length)
    tokens: list[int] = []
    for text in _documents(data, text_key):
        tokens += encode_document(tokenizer, text)
        if len(tokens) >= wanted:
            break
    if len(tokens) < 2:
        raise ValueError(f"data {' '.join(data)}: there is no text")
    length = min(sequence_length, len(tokens))
    num_sequences = max(1, min(num_tokens, len(tokens)) // length)
    return torch.tensor(tokens[: num_sequences * length]).view(num_sequences, length)


@torch.no_grad()
def measure(model: Any, tokens_NS: Tensor, batch_size: int, label: str = "") -> Measurement:
    """Run one pass over the tokens with the routing that the model's config asks for."""
    num_tokens = tokens_NS.numel()
    num_layers, num_experts = model.config.mlp_layer_types.count("sparse"), model.config.num_experts
    stride = math.ceil(num_tokens * num_layers * num_experts / MAX_SAMPLED_PROBS)
    loss_sum, num_predicted = 0.0, 0
    experts_L = torch.zeros(num_layers, dtype=torch.int64)
    sampled = []
    with tqdm(total=num_tokens, desc=label, unit=" tokens", leave=False, disable=None) as bar:
        for batch_BS in tokens_NS.split(batch_size):
            batch_BS = batch_BS.to(model.device)
            output = model(batch_BS, use_cache=False, output_router_logits=True)
            for logits_SV, labels_S in zip(output.logits, batch_BS, strict=True):
                # One sequence at a time: in float32, the logits are the largest tensor of all.
                loss_sum += torch.nn.functional.cross_entropy(
                    logits_SV[:-1].float(), labels_S[1:], reduction="sum"
                ).item()
            num_predicted += batch_BS[:, 1:].numel()
            experts_L += output.experts_per_token.sum(dim=(1, 2)).cpu()
            # These are the inputs of the softmax: normalized, if the model normalizes.
            probs_LTE = [
                logits_BSE.flatten(0, 1)[::stride].softmax(dim=-1).float()
                for logits_BSE in output.router_logits
            ]
            sampled.append(torch.stack(probs_LTE).cpu())
            bar.update(batch_BS.numel())
    return Measurement(
        loss_sum / num_predicted,
        (experts_L.double() / num_tokens).tolist(),
        num_tokens,
        torch.cat(sampled, dim=1),
    )


def calibrate(
    measure_at: Callable[[Threshold, str], Measurement],
    start: Measurement,
    target: float,
    *,
    scope: str = "global",
    cap: int | None = None,
    sparse: list[bool],
    name: str = "calibration",
) -> Calibration:
    """Find the threshold whose measured mean is the target, within :func:`tolerance`.

    Args:
        measure_at: runs a pass with a threshold; the text labels the pass.
        start: a pass with any routing, for a first guess.
        target: mean experts per token.
        scope: ``global`` for one threshold and the mean over layers, or ``layer`` for one per
            layer, each with the target as its mean.
        cap: the most experts that a token may use, or None.
        sparse: for each transformer layer, whether it is an MoE layer; other layers get the
            threshold None.
        name: what the passes are called.

    Raises:
        ValueError: the target is out of range, or no threshold gives it.
    """
    searches = [
        _Search(threshold_for_target(probs_TE, target, cap)) for probs_TE, _ in _parts(start, scope)
    ]
    for number in range(1, EXTRA_PASSES + 3 * len(searches)):
        threshold = _as_setting(searches, scope, sparse)
        result = measure_at(threshold, f"{name}, pass {number}")
        parts = _parts(result, scope)
        if all(abs(mean - target) <= tolerance(target) for _, mean in parts):
            return Calibration(target, scope, threshold, result)
        # The threshold of a layer that is right stays, so that later layers can settle on it.
        moved = False
        for search, (probs_TE, mean) in zip(searches, parts, strict=True):
            if moved or abs(mean - target) > tolerance(target):
                moved |= search.correct(probs_TE, mean, target, cap, in_new_surroundings=moved)
        if not moved:
            break
    raise ValueError(
        f"no threshold gives {target:g} experts per token within {tolerance(target):.4g}: the last "
        f"of {number} passes gave {', '.join(f'{mean:.4f}' for _, mean in parts)}. Where many "
        "probabilities are equal, the mean jumps; choose another target or scope"
    )


def check_routing(config: Any) -> None:
    """Refuse a model whose experts are chosen by no threshold that a calibration could find.

    Raises:
        ValueError: it has another rule, or no experts.
    """
    if "sparse" not in config.mlp_layer_types:
        raise ValueError("the model has no layer with experts, so there is nothing to calibrate")
    if config.rule is not None:
        raise ValueError(
            f"routing is {config.routing!r}, which has no threshold to calibrate: give a model "
            "with routing 'top_p', 'dtop_p' or 'top_k'"
        )


def check_target(config: Any, target: float, flag: str = "--target") -> None:
    """Refuse a target that no routing of this model can give, before anything is measured.

    Raises:
        UsageError: the target is below 1, or above the cap or the number of experts.
        ValueError: the model has no threshold to calibrate.
    """
    check_routing(config)
    most = max_experts(config) or config.num_experts
    if not 1 <= target <= most:
        raise UsageError(
            f"{flag} is {target:g}: a token uses at least 1 expert and here at most {most}, so "
            f"use 1 to {most}"
        )


def max_experts(config: Any) -> int | None:
    """The cap in inference, or None."""
    return config.inference_max_experts_per_token or config.max_experts_per_token


def set_threshold(config: Any, threshold: Threshold) -> None:
    """Let a model route by this threshold in inference, even if it was trained with top-k.

    The normalization and the weights, raw or renormalized, stay as they are, because the experts
    were trained with them.
    """
    if config.routing == "top_k":
        config.routing, config.num_experts_per_tok = "top_p", None
    config.threshold = threshold
    config.inference_threshold = config.inference_experts_per_token = None


def write_calibration(
    folder: Path,
    calibration: Calibration | None,
    cap: int | None,
    data: str,
    curve: Sequence[Point] = (),
) -> None:
    """Put what was found, and how, into a folder's config.json and model card.

    The file is written beside the old one and renamed. If the folder has a manifest, it is updated.

    Args:
        calibration: the model's own threshold from now on; None keeps the folder's.
        cap: a new cap in inference; None keeps the folder's own.
        data: the name of the text file, for the record.
        curve: the points of a new ``budget_curve``, ascending; if there are none, the folder's
            stays, unless there is a new cap, with which it was not measured.
    """
    path = folder / CONFIG
    config = read_json(path)
    if curve:
        config["budget_curve"] = [point.to_json() for point in curve]
        config["budget_calibration"] = {
            "data": data,
            "tokens": curve[0].measurement.tokens,
            "mean_experts_per_token": [round(one.measurement.experts, 6) for one in curve],
        }
    elif cap is not None:
        config["budget_curve"] = config["budget_calibration"] = None
    if cap is not None:
        config["inference_max_experts_per_token"] = cap
    if calibration is not None:
        _set_threshold(config, calibration, data)
    replace_file(path, lambda partial: write_json(partial, config))
    update_routing(folder, config)
    update_manifest(folder, [name for name in (CONFIG, CARD) if (folder / name).exists()])


def _set_threshold(config: dict[str, Any], calibration: Calibration, data: str) -> None:
    """Put a threshold, and how it was found, into the content of a config.json."""
    before = {}
    if config["routing"] == "top_k":
        before = {name: config[name] for name in ("routing", "num_experts_per_tok")}
        config |= {"routing": "top_p", "num_experts_per_tok": None}
        # Without this, the routing "top_p" would bring the losses of top-p training with it.
        config |= {"balance_loss": "none", "balance_loss_coeff": 0.0, "dynamic_loss_coeff": 0.0}
    config["threshold"] = calibration.threshold
    config["inference_threshold"] = config["inference_experts_per_token"] = None
    config["target_experts_per_token"] = calibration.target
    measured = calibration.measurement
    config["calibration"] = {
        "target_experts_per_token": calibration.target,
        "scope": calibration.scope,
        "data": data,
        "tokens": measured.tokens,
        "mean_experts_per_token": round(measured.experts, 6),
        "loss": round(measured.loss, 6),
        **({"before": before} if before else {}),
    }


class _Search:
    """The search for one threshold; a bracket of measured ones limits a bad guess."""

    def __init__(self, threshold: float) -> None:
        self.threshold = _float32(threshold)
        self._low, self._high = 0.0, 1.0

    def correct(
        self,
        probs_TE: Tensor,
        mean: float,
        target: float,
        cap: int | None,
        in_new_surroundings: bool,
    ) -> bool:
        """Move the threshold towards the target; return False if nothing is left to try.

        Args:
            probs_TE: the probabilities of the sample.
            mean: the mean measured over all tokens.
            in_new_surroundings: whether a threshold of an earlier layer has just moved, so that
                this measurement says nothing certain about the next pass.
        """
        # The sample's mean differs from that of all tokens; its target is shifted by as much.
        on_sample = mean_experts_per_token(probs_TE, self.threshold, cap).item()
        most = min(probs_TE.shape[1], cap or probs_TE.shape[1])
        aim = min(max(target + on_sample - mean, 1.0), float(most))
        guess = threshold_for_target(probs_TE, aim, cap)
        if in_new_surroundings:
            self._low, self._high = 0.0, 1.0
        else:
            if mean < target:
                self._low = self.threshold
            else:
                self._high = self.threshold
            if not self._low < guess < self._high:
                guess = (self._low + self._high) / 2
        before, self.threshold = self.threshold, _float32(guess)
        return self.threshold != before


def _parts(measured: Measurement, scope: str) -> list[tuple[Tensor, float]]:
    """The sampled probabilities and the mean of the layers that share a threshold."""
    if scope == "global":
        return [(measured.probs_LTE.flatten(0, 1), measured.experts)]
    return list(zip(measured.probs_LTE, measured.experts_by_layer, strict=True))


def _as_setting(searches: list[_Search], scope: str, sparse: list[bool]) -> Threshold:
    if scope == "global":
        return searches[0].threshold
    thresholds = iter(search.threshold for search in searches)
    return [next(thresholds) if is_sparse else None for is_sparse in sparse]


def _float32(value: float) -> float:
    """The shortest decimal that routes the same, since routing uses thresholds in float32."""
    return float(str(np.float32(value)))


def _documents(data: Sequence[str], text_key: str) -> Iterator[str]:
    from megatron_dynmoe.data.text.inputs import expand_inputs
    from megatron_dynmoe.data.text.readers import open_reader
    from megatron_dynmoe.data.text.records import Unreadable

    def stop(unreadable: Unreadable) -> None:
        raise unreadable

    for path in expand_inputs(data, "--data"):
        for (text,) in open_reader(path, [text_key], stop):
            yield text
