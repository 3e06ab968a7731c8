"""The back end that is Transformer Engine's: what our layers need beside upstream's spec.

Upstream takes attention, norms and linear layers from Transformer Engine. Its experts are one
``GroupedLinear`` for all experts of a rank with ``--moe-grouped-gemm``, and one linear layer after
another without. With a dynamic routing experts have few rows or many, so they are always grouped
here. Weights, results and checkpoints are the same.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import torch
from megatron.core.utils import get_te_version, is_te_min_version

from megatron_dynmoe.backends.attention.context_parallel import (
    EXCHANGE,
    check_heads,
    kinds_of_exchange,
)
from megatron_dynmoe.settings.messages.refusals import FlagError, SettingError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# The first whose GroupedLinear upstream uses (core/extensions/transformer_engine.py).
FIRST_GROUPED = "1.9.0"
# How its attention splits a sequence; upstream's help calls the second one allgather.
_EXCHANGES = ("p2p", "all_gather", EXCHANGE, "a2a+p2p")


def version_without_grouped_experts() -> str | None:
    """The installed version, if it is too old to group experts; else None."""
    return None if is_te_min_version(f"{FIRST_GROUPED}.dev0") else str(get_te_version())


def check_version() -> None:
    """Refuse a version that is too old to group experts.

    Raises:
        SettingError: the message names the version and the remedy.
    """
    if old := version_without_grouped_experts():
        raise SettingError(
            "backend",
            "transformer_engine",
            f", and version {old} of Transformer Engine cannot group experts",
            f"install {FIRST_GROUPED} or later, or use auto or torch_native",
        )


def group_experts(transformer: TransformerConfig) -> None:
    """Have upstream's spec take grouped experts, with or without ``--moe-grouped-gemm``."""
    transformer.moe_grouped_gemm = bool(transformer.num_moe_experts)


def check_experts(transformer: TransformerConfig) -> None:
    """Refuse what its grouped experts cannot do.

    Args:
        transformer: upstream's config of a model on this back end.

    Raises:
        FlagError: the model has biases that upstream would stop at.
    """
    if transformer.add_bias_linear and transformer.bias_dropout_fusion:
        raise FlagError(
            "disable_bias_linear",
            None,
            ", and grouped experts of Transformer Engine take no biases beside Megatron's fused "
            "bias and dropout",
            "give --disable-bias-linear, or --no-bias-dropout-fusion",
        )


def check_context_parallel(transformer: TransformerConfig) -> None:
    """Refuse a split of sequences at which its attention would stop in the first step.

    Args:
        transformer: upstream's config of a model on this back end.

    Raises:
        FlagError: the message names the flag, its value and the remedy.
    """
    context = transformer.context_parallel_size
    if context == 1:
        return
    kinds = kinds_of_exchange(transformer)
    for kind in kinds:
        if kind not in _EXCHANGES:
            raise FlagError(
                "cp_comm_type",
                kind,
                f", and Transformer Engine splits sequences by {', '.join(_EXCHANGES)}",
                "use one of these",
            )
    if transformer.params_dtype == torch.float32:
        raise FlagError(
            "context_parallel_size",
            context,
            ", and the model is in float32, but the attention of Transformer Engine splits "
            "sequences in 16 bits only",
            f"give --bf16, or use --moe-dynamic-backend torch_native --cp-comm-type {EXCHANGE}",
        )
    if EXCHANGE in kinds:
        check_heads(transformer)


def check_permutation(transformer: TransformerConfig) -> None:
    """Refuse a dispatcher that gives Transformer Engine's permutation no rows, on any back end.

    Raises:
        FlagError: ``--moe-permute-fusion`` is given, and ranks without rows are possible.
    """
    ranks = transformer.expert_model_parallel_size
    gathers = transformer.moe_token_dispatcher_type == "allgather"
    if transformer.moe_permute_fusion and gathers and ranks > 1:
        raise FlagError(
            "moe_permute_fusion",
            True,
            " with --moe-token-dispatcher-type allgather and --expert-model-parallel-size "
            f"{ranks}, and Transformer Engine's permutation stops at a rank whose experts no "
            "token chose",
            "use alltoall, or leave --moe-permute-fusion out",
        )


def check_mask(args: Namespace) -> None:
    """Refuse a mask that this attention would not read.

    Upstream tells it that the mask is causal. Its fast kernels then read no mask, and in bf16
    documents would see each other without an error.

    Raises:
        FlagError: ``--reset-attention-mask`` is given.
    """
    if args.reset_attention_mask:
        raise FlagError(
            "reset_attention_mask",
            True,
            ", and the attention of transformer_engine reads no mask but the causal one",
            "use --moe-dynamic-backend torch_native, or leave it out",
        )
