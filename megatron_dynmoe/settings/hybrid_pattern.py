"""``--hybrid-layer-pattern``: a model whose layers are written down one by one.

A layer of a ``GPTModel`` is attention and an MLP; upstream's ``HybridModel`` counts each of them as
a layer of its own. So ``*E*E`` is what ``--num-layers 2`` is elsewhere, and its layers with experts
are the second and the fourth.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable
from typing import Any, TypeGuard

from megatron_dynmoe.settings.messages.refusals import FlagError

ATTENTION, DENSE, EXPERTS, PIPE = "*", "-", "E", "|"
_PAIRS = re.compile(r"(\*[E-])+")
_REMEDY = "use * for attention, - for a dense MLP, E for experts and | between pipeline stages"
_REFUSED = {
    "M": "Mamba, which has no CPU kernel",
    "G": "gated delta net, which has no CPU kernel",
    "D": "sparse latent attention, which needs Transformer Engine",
    "+": "latent attention, which needs Transformer Engine",
    "/": "the start of multi-token prediction, whose layers would keep upstream's router",
}
# Settings that a GPTModel obeys and a HybridModel does not, with the values that change nothing.
_NOT_FOR_PATTERNS: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "use_rope_scaling": (False,),
    "position_embedding_type": ("learned_absolute", "rope", "none"),
    "mtp_num_layers": (None, 0),
}


def adapt_pattern(args: Any) -> None:
    """Check the pattern, and set what follows from it: the layers, and which of them have experts.

    Args:
        args: Megatron's arguments, parsed and not yet validated. ``num_layers`` and
            ``moe_layer_freq`` are set if there is a pattern.

    Raises:
        FlagError: the pattern, or a setting beside it, cannot be trained.
    """
    if args.hybrid_override_pattern is not None:
        raise FlagError(
            "hybrid_override_pattern",
            args.hybrid_override_pattern,
            ", which Megatron calls --hybrid-layer-pattern by now",
            "give it by that name",
        )
    pattern = args.hybrid_layer_pattern
    if pattern is None:
        return
    layers = pattern.replace(PIPE, "")
    _check_symbols(pattern, layers)
    _check_stages(pattern, args.pipeline_model_parallel_size)
    for name, works in _NOT_FOR_PATTERNS.items():
        if (value := getattr(args, name)) not in works:
            raise FlagError(
                name,
                value,
                f", which a model by --hybrid-layer-pattern {pattern} does not have",
                "leave one of them out",
            )
    if args.num_layers not in (None, len(layers)):
        raise FlagError(
            "num_layers",
            args.num_layers,
            f", and --hybrid-layer-pattern {pattern} has {len(layers)} layers (attention and MLP "
            "are one each)",
            f"give {len(layers)}, or leave it out",
        )
    args.num_layers = len(layers)
    sparse = [int(symbol == EXPERTS) for symbol in layers]
    if bool(args.num_experts) != any(sparse):
        raise FlagError(
            "num_experts",
            args.num_experts,
            f", and --hybrid-layer-pattern {pattern} has {sum(sparse)} layers with experts (E)",
            "give both or neither",
        )
    if args.moe_layer_freq not in (1, sparse):
        raise FlagError(
            "moe_layer_freq",
            args.moe_layer_freq,
            f", and --hybrid-layer-pattern {pattern} says which layers have experts",
            "leave it out",
        )
    if any(sparse):
        args.moe_layer_freq = sparse


def check_losses_of_stages(args: Any) -> None:
    """Refuse losses that upstream reports, if a pipeline stage has no experts.

    Upstream adds up tables of these losses over the stages, a row for each layer. On a stage of a
    ``HybridModel`` without experts its table has a row for each layer with experts, so the sum
    fails, or waits forever.

    Args:
        args: Megatron's arguments, with the balance loss that upstream itself is to compute.

    Raises:
        FlagError: there is such a stage and such a loss.
    """
    pattern, num_stages = args.hybrid_layer_pattern, args.pipeline_model_parallel_size
    if pattern is None or num_stages == 1 or EXPERTS not in pattern:
        return
    stages = pattern.split(PIPE)
    if len(stages) == 1:
        size = len(pattern) // num_stages
        stages = [pattern[first : first + size] for first in range(0, len(pattern), size)]
    if all(EXPERTS in stage for stage in stages):
        return
    losses = {"moe_z_loss_coeff": None, "moe_router_load_balancing_type": "none"}
    for name, unused in losses.items():
        if (value := getattr(args, name)) != unused:
            raise FlagError(
                name,
                value,
                f", which needs a layer with experts (E) in every pipeline stage of "
                f"--hybrid-layer-pattern {pattern}",
                "move one into each stage, or " + ("give none" if unused else "leave it out"),
            )


def layers_of_kinds(pattern: str | None, sparse: tuple[bool, ...]) -> dict[str, set[int]]:
    """The layers that have attention, an MLP of either kind, experts and a dense MLP, from 0.

    Args:
        pattern: None: every layer has attention and an MLP.
        sparse: for each layer, whether it has experts.
    """
    every = set(range(len(sparse)))
    experts = {layer for layer in every if sparse[layer]}
    attention, dense = every, every - experts
    if pattern is not None:
        symbols = pattern.replace(PIPE, "")
        attention = {layer for layer in every if symbols[layer] == ATTENTION}
        dense -= attention
    return {"attention": attention, "mlp": experts | dense, "experts": experts, "dense": dense}


def as_whole_layers(args: Namespace) -> Namespace:
    """The arguments of the ``GPTModel`` that a model by a pattern equals, if there is one.

    There is one if the pattern is attention and an MLP in turn. Each pair is one layer of it.

    Args:
        args: Megatron's arguments of a trained model.

    Returns:
        The same arguments if there is no pattern, or another one.
    """
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if not is_in_pairs(pattern):
        return args
    sparse = [int(symbol == EXPERTS) for symbol in pattern.replace(PIPE, "")[1::2]]
    of_layers = {"num_layers": len(sparse), "moe_layer_freq": sparse if any(sparse) else 1}
    return Namespace(**vars(args) | of_layers | {"hybrid_layer_pattern": None})


def is_in_pairs(pattern: Any) -> TypeGuard[str]:
    """Whether a pattern is attention and an MLP in turn, as in the layers of a ``GPTModel``."""
    return isinstance(pattern, str) and bool(_PAIRS.fullmatch(pattern.replace(PIPE, "")))


def pairs(sparse: Iterable[bool]) -> str:
    """The pattern of a ``GPTModel``'s layers, of which some have experts."""
    return "".join(ATTENTION + (EXPERTS if experts else DENSE) for experts in sparse)


def _check_symbols(pattern: str, layers: str) -> None:
    for symbol in layers:
        if symbol not in (ATTENTION, DENSE, EXPERTS):
            meaning = _REFUSED.get(symbol, "no kind of layer")
            problem = f", in which {symbol} is {meaning}"
            raise FlagError("hybrid_layer_pattern", pattern, problem, _REMEDY)
    if not layers:
        raise FlagError("hybrid_layer_pattern", repr(pattern), ", a model without layers", _REMEDY)


def _check_stages(pattern: str, num_stages: int) -> None:
    stages = pattern.split(PIPE)
    if len(stages) > 1 and (len(stages) != num_stages or "" in stages):
        raise FlagError(
            "hybrid_layer_pattern",
            pattern,
            f", and --pipeline-model-parallel-size is {num_stages}",
            f"put {PIPE} between its stages, with a layer or more in each, or leave {PIPE} out",
        )
