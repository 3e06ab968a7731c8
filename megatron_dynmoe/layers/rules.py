"""Rules of routing for models in plain PyTorch, beside top-k and top-p, which the gate knows.

The mathematics of a rule is in ``routing``: in training, the rule of the same name in ``moe/rules``
calls the same functions. A row of :data:`LAYER_RULES` says what a model's configuration has to
hold. Exports ship with this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_dynmoe.routing.rules.expert_threshold import choose_above_thresholds
from megatron_dynmoe.routing.rules.null_experts import fill_slots
from megatron_dynmoe.routing.rules.relu import choose_open
from megatron_dynmoe.routing.rules.seq_top_k import select_above
from megatron_dynmoe.routing.select import weigh


class Chosen(NamedTuple):
    """What a rule chose for T tokens.

    Attributes:
        probs_TE: what losses are computed from: probabilities, or the scores in their place.
        map_TE: bool, which experts a token uses; it may be none.
        weights_TE: zero where not chosen.
        residual_T: the weight of the token itself in the layer's output; None: zero for all.
    """

    probs_TE: Tensor
    map_TE: Tensor
    weights_TE: Tensor
    residual_T: Tensor | None = None


class Choose(Protocol):
    """Chooses experts, as in evaluations of the training: nothing is learned, tokens are alone."""

    def __call__(
        self, logits_TE: Tensor, state: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> Chosen:
        """Choose.

        Args:
            logits_TE: [T, E + X] float32 or wider, normalized if the model normalizes.
            state: the entries of ``LayerRule.state``, float32.
            settings: the model's ``weights`` and ``max_experts_per_token``, the latter as it
                applies, and the names of ``LayerRule.settings``.
        """


@dataclass(frozen=True)
class LayerRule:
    """A rule, as a model's configuration describes it.

    Attributes:
        choose: see :class:`Choose`.
        state: the entries of its state in each layer, each with the number of its values: ``one``
            or ``experts``.
        settings: its settings beside those that all rules have, each with the values that it may
            have: in words, and a check of a value and the most experts of a token.
        defaults: values of settings that all rules have, if a configuration leaves them out.
        fixed: settings that all rules have, and of which it knows one value only.
        reads: the entries of its state that ``choose`` reads; None: all.
        extra_logits: how many rows the gate has beside those of the experts, from the settings.
    """

    choose: Choose
    state: Mapping[str, str]
    settings: Mapping[str, tuple[str, Callable[[Any, int], bool]]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] | None = None
    extra_logits: Callable[[Mapping[str, Any]], int] = lambda _: 0

    def lengths(self, num_experts: int) -> dict[str, int]:
        """The number of values of each entry."""
        sizes = {"one": 1, "experts": num_experts}
        return {name: sizes[size] for name, size in self.state.items()}


def _expert_threshold(
    logits_TE: Tensor, state: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Chosen:
    cap, renormalize = settings["max_experts_per_token"], settings["weights"] == "renormalized"
    return Chosen(*choose_above_thresholds(logits_TE, state["thresholds"], cap, renormalize))


def _seq_top_k(
    logits_TE: Tensor, state: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Chosen:
    """SeqTopK without a look at other tokens: all probabilities above the layer's threshold."""
    probs_TE = logits_TE.softmax(dim=-1)
    map_TE = select_above(probs_TE, state["score_threshold"], settings["max_experts_per_token"])
    return Chosen(probs_TE, map_TE, weigh(probs_TE, map_TE, settings["weights"] == "renormalized"))


def _null_experts(
    logits_TE: Tensor, state: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Chosen:
    slots = fill_slots(
        logits_TE,
        state["null_bias"],
        null_slots=settings["null_slots"],
        identity=settings["null_kind"] == "identity",
        max_experts=settings["max_experts_per_token"],
        renormalize=settings["weights"] == "renormalized",
    )
    return Chosen(slots.among_experts_TE, slots.map_TE, slots.weights_TE, slots.residual_T)


def _relu(logits_TE: Tensor, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Chosen:
    """ReMoE's gates. Lambda acts in training only; an export keeps it for a training to go on."""
    return Chosen(*choose_open(logits_TE, settings["max_experts_per_token"]))


# By routing.
LAYER_RULES: dict[str, LayerRule] = {
    "expert_threshold": LayerRule(
        _expert_threshold,
        {"share": "one", "thresholds": "experts", "batches": "one"},
        {
            "threshold_decay": (
                "a number from 0 to below 1",
                lambda decay, _: isinstance(decay, float | int) and 0 <= decay < 1,
            )
        },
        reads=("thresholds",),
    ),
    "null_experts": LayerRule(
        _null_experts,
        {"share": "one", "null_bias": "one"},
        {
            "null_slots": (
                "a whole number, at least the most slots of a token (the caps, or all experts)",
                lambda slots, most: type(slots) is int and slots >= most,
            ),
            "null_kind": ("zero or identity", lambda kind, _: kind in ("zero", "identity")),
        },
        defaults={"weights": "renormalized", "balance_loss": "global_aux_loss"}
        | {"balance_loss_coeff": 1e-2},
        reads=("null_bias",),
        extra_logits=lambda _: 1,
    ),
    "seq_top_k": LayerRule(
        _seq_top_k,
        {"score_threshold": "one"},
        defaults={"weights": "renormalized", "balance_loss": "seq_aux_loss"}
        | {"balance_loss_coeff": 1e-2},
    ),
    "relu": LayerRule(
        _relu,
        {"log10_lambda": "one"},
        {"control_law": ("pi or sign", lambda law, _: law in ("pi", "sign"))},
        defaults={"balance_loss": "aux_loss"},
        fixed={"normalization": "none", "weights": "raw", "dynamic_loss_coeff": 0.0},
        reads=(),
    ),
}


def _tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # one that later passes with gradients can use, too
        return torch.tensor(values, dtype=torch.float32, device=device)


_kept_tensor = lru_cache(maxsize=1024)(_tensor)


def chooser(
    config: Mapping[str, Any], layer: int, max_experts: int | None, device: torch.device
) -> Callable[[Tensor], Chosen]:
    """What chooses in a layer by its logits, if the routing of a model's config is such a rule.

    Args:
        config: the fields of the model's configuration.
        max_experts: the cap, or None.
    """
    rule = LAYER_RULES[config["routing"]]
    # A forward pass does not copy the same numbers to the device again.
    make = _tensor if torch.compiler.is_compiling() else _kept_tensor
    state = {
        name: make(tuple(layers[layer]), device)
        for name, layers in (config["router_state"] or {}).items()
        if rule.reads is None or name in rule.reads
    }
    settings = {"weights": config["weights"], "max_experts_per_token": max_experts}
    settings |= config["rule_settings"] or {}
    return partial(rule.choose, state=state, settings=settings)
