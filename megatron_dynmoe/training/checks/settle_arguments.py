"""Checks and settles Megatron's arguments before Megatron validates them.

This needs neither processes nor a device nor files other than those that the flags name, so that a
plan refuses what a training refuses, in the same words.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_dynmoe.backends import choice, transformer_engine
from megatron_dynmoe.settings.arguments import (
    adapt_balance_loss,
    config_from_args,
    naming_flags,
)
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.hybrid_pattern import adapt_pattern, check_losses_of_stages
from megatron_dynmoe.settings.messages.refusals import FlagError
from megatron_dynmoe.settings.upstream_flags import check_query_groups, check_upstream_settings
from megatron_dynmoe.training.checks.argument_checks import check_arguments, check_top_k
from megatron_dynmoe.training.checks.intervals import check_intervals

# These modes of upstream's script need batches and losses of their own.
_OTHER_BATCHES = {
    "sft": "fine-tuning on packed sequences",
    "fim_data": "fill-in-the-middle data",
    "dataloader_inter_document_masking": "masking between packed documents",
    "hybrid_context_parallel": "hybrid context parallelism",
    "logits_load_dir": "distillation from cached logits",
}
# These settings build a model that dynamic routing cannot be put into.
OTHER_MODELS = (
    "spec",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "experimental_attention_variant",
)


def settle_arguments(args: Namespace, here: bool = True) -> tuple[DynMoEConfig, choice.BackEnd]:
    """Refuse what cannot be trained, and set what follows from our settings.

    Args:
        args: Megatron's arguments, parsed and not yet validated. They are changed.
        here: whether the run is on this machine, which then needs its packages.

    Returns:
        Our settings with their defaults filled in, and the back end.

    Raises:
        ValueError: the message names the flag, its value and the remedy.
    """
    adapt_pattern(args)
    _check_model(args)
    dynmoe = adapt_balance_loss(args, config_from_args(args))
    check_losses_of_stages(args)
    if not here and dynmoe.backend == "transformer_engine" and not choice.has_transformer_engine():
        chosen = choice.BackEnd(dynmoe.backend, "asked for")
    else:
        with naming_flags(args):
            chosen = choice.choose_backend(dynmoe.backend, args.transformer_impl)
    args.transformer_impl = chosen.implementation
    choice.adapt_arguments(args)
    choice.adapt_masks(chosen.backend, args)
    choice.check_norms(chosen.backend, args)
    if chosen.backend == "transformer_engine" and dynmoe.is_dynamic:
        transformer_engine.check_mask(args)
    _check_modes(args, dynmoe, chosen)
    check_intervals(args)
    check_arguments(args)
    check_query_groups(args)
    if dynmoe.is_dynamic:
        check_upstream_settings(args, dynmoe.routing)
    else:
        check_top_k(args)
    with naming_flags(args):
        return dynmoe.resolve(args.num_experts), chosen


def _check_model(args: Namespace) -> None:
    """Ask for the model before anything that follows from it."""
    if any(getattr(args, name, None) for name in OTHER_MODELS):
        return
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(args, name) is None:
            raise FlagError(
                name,
                None,
                ", and no model is without it",
                "describe a model, or start from a recipe, which dynmoe recipe lists",
            )


def _check_modes(args: Namespace, dynmoe: DynMoEConfig, chosen: choice.BackEnd) -> None:
    """Refuse what needs other batches, or other models with our layers."""
    for mode, meaning in _OTHER_BATCHES.items():
        if getattr(args, mode, None):
            raise FlagError(
                mode,
                getattr(args, mode),
                f", but {meaning} is not part of this entry point",
                "use Megatron's pretrain_gpt.py with --spec megatron_dynmoe.specs "
                "dynmoe_layer_spec and DYNMOE_CONFIG",
            )
    if args.hybrid_layer_pattern and chosen.backend != "torch_native":
        raise FlagError(
            "hybrid_layer_pattern",
            args.hybrid_layer_pattern,
            f", and the back end is {chosen.backend} ({chosen.why}), which builds no such model",
            "give --moe-dynamic-backend torch_native",
        )
    if not (dynmoe.is_dynamic or dynmoe.backend == "torch_native" or args.hybrid_layer_pattern):
        return
    for name in OTHER_MODELS:
        if getattr(args, name, None):
            raise FlagError(
                name,
                getattr(args, name),
                f", but with routing {dynmoe.routing!r} and back end {chosen.backend!r} this entry "
                "point builds the model's layers itself",
                "leave it out",
            )
