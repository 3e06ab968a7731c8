"""Where the plugin enters a model: upstream's layer spec with our MoE layer and router.

``--spec megatron_dynmoe.specs dynmoe_layer_spec`` names :func:`dynmoe_layer_spec`; with it the
stock ``pretrain_gpt.py`` trains with dynamic routing, its settings read from ``DYNMOE_CONFIG``.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training import get_args, print_rank_0

from megatron_dynmoe.arguments import adopt_upstream_balance_loss, config_from_environment
from megatron_dynmoe.backends import choice, torch_native
from megatron_dynmoe.config import AUTO, DynMoEConfig
from megatron_dynmoe.control.pi import PIController
from megatron_dynmoe.control.settle import MIN_GAIN_MARGIN, settle, settled_gain_margin
from megatron_dynmoe.control.update import GlobalBatchUpdate
from megatron_dynmoe.metrics import install_metrics_tracker
from megatron_dynmoe.moe.layer import DynMoELayer
from megatron_dynmoe.moe.router import DynamicRouter
from megatron_dynmoe.moe.rules import RULES
from megatron_dynmoe.planning.startup import memory_report
from megatron_dynmoe.upstream_flags import check_upstream_settings

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig


def dynmoe_layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The ``--spec`` target: settings from the YAML file that ``DYNMOE_CONFIG`` names.

    Raises:
        ValueError: ``DYNMOE_CONFIG`` is not set, or a setting makes no sense.
    """
    dynmoe = config_from_environment()
    if dynmoe is None:
        raise ValueError(
            "DYNMOE_CONFIG is not set: with --spec megatron_dynmoe.specs dynmoe_layer_spec it must "
            "name a YAML file of settings, such as 'routing: dtop_p'."
        )
    transformer = config.transformer
    # Upstream's defaults here are values, so only others can be told to be a user's choice.
    kinds, coefficients = transformer.moe_router_load_balancing_type, transformer.moe_aux_loss_coeff
    dynmoe = adopt_upstream_balance_loss(
        dynmoe,
        kinds if dynmoe.is_dynamic and kinds != "aux_loss" else None,
        coefficients if dynmoe.is_dynamic and coefficients != 0 else None,
    )
    return layer_spec(config, vp_stage=vp_stage, dynmoe=dynmoe)


def layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None, *, dynmoe: DynMoEConfig
) -> TransformerBlockSubmodules:
    """Upstream's layer spec for one model chunk, with dynamic routing where it has experts.

    Called once per chunk; with the first it installs the update at the end of a global batch and
    the metrics, and hands the resolved settings to the checkpoint.

    Args:
        config: upstream's model config. Its ``transformer`` is adapted: routing in fp32, and the
            hook that ends a global batch.
        vp_stage: the chunk's virtual pipeline stage.
        dynmoe: settings as the user gave them.

    Raises:
        ValueError: a setting of ours or of upstream makes no sense with dynamic routing.
    """
    transformer = config.transformer
    plan = _settle_backend(dynmoe, transformer)
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    if plan.backend == "torch_native":
        spec = torch_native.with_native_modules(spec, plan, transformer)
    if not vp_stage:
        print_rank_0(choice.describe(plan, transformer))
    if not dynmoe.is_dynamic:
        return spec
    check_upstream_settings(transformer)
    resolved, controller = settle(dynmoe, transformer)
    if resolved.row_buffer == "worst_case":
        _check_worst_case_rows(plan, transformer)

    transformer.moe_router_dtype = "fp32"
    first_threshold = controller.initial_threshold if controller else resolved.threshold
    rule = RULES[resolved.routing](resolved, first_threshold)
    if not isinstance(transformer.finalize_model_grads_func, GlobalBatchUpdate):
        transformer.finalize_model_grads_func = GlobalBatchUpdate(
            resolved, controller, transformer.finalize_model_grads_func, rule.direction
        )
        install_metrics_tracker(resolved)
        # Megatron saves its arguments with the model; settings from YAML would not be among them.
        with suppress(AssertionError):  # a training loop of one's own has none
            get_args().moe_dynamic_settings = resolved.to_dict()
            print_rank_0(memory_report(get_args(), resolved, plan))
        settings = ", ".join(
            f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in resolved.to_dict().items()
        )
        print_rank_0(f"> dynamic routing: {settings}")
        if controller is not None:
            _warn_of_high_gains(resolved, controller, transformer)

    caps = resolved.max_experts_per_token, resolved.inference_max_experts_per_token
    rows_per_token = max(cap or 0 for cap in caps) if resolved.row_buffer == "worst_case" else None
    router = partial(DynamicRouter, dynmoe=resolved, rule=rule)
    spec = dataclasses.replace(
        spec,
        layer_specs=[
            _with_dynamic_moe(layer, router, rows_per_token) for layer in spec.layer_specs
        ],
    )
    return spec


def _settle_backend(dynmoe: DynMoEConfig, transformer: TransformerConfig) -> choice.Plan:
    """Choose the back end and let upstream's config agree with it."""
    optimizer = "adam"
    with suppress(AssertionError):  # a training loop of one's own has no arguments
        optimizer = get_args().optimizer
    impl: str | None = transformer.transformer_impl
    if impl == "transformer_engine" and not choice.has_transformer_engine():
        impl = None  # upstream's default, which cannot have been meant
    plan = choice.plan(dynmoe.backend or AUTO, impl, transformer, optimizer)
    transformer.transformer_impl = choice.implementation(plan.backend)
    return plan


def _warn_of_high_gains(
    resolved: DynMoEConfig, controller: PIController, transformer: TransformerConfig
) -> None:
    margin = settled_gain_margin(resolved, transformer)
    if margin < 0.999 * MIN_GAIN_MARGIN:  # computed gains stop at the margin itself
        print_rank_0(
            f"WARNING: proportional_gain {controller.proportional_gain:.4g} and integral_gain "
            f"{controller.integral_gain:.4g} become unstable once the count responds {margin:.2g} "
            f"times as strongly as at the start; ask for {MIN_GAIN_MARGIN:g} or more, or use auto."
        )


def _check_worst_case_rows(plan: choice.Plan, transformer: TransformerConfig) -> None:
    """Refuse ``row_buffer`` worst_case where the number of rows is needed on the host."""
    remedy = "leave row_buffer out (measured)"
    if plan.backend != "torch_native" or "experts" in plan.kept:
        reason = f"the experts are upstream's ({plan.kept.get('experts', plan.backend)})"
        remedy += ", or use torch_native"
    elif choice.gemm_of(transformer) == "a loop":
        reason = "the experts' GEMMs run in a loop on this device, in this dtype and these sizes"
        remedy += ", or use bf16 on Hopper or later and sizes in multiples of 16 bytes"
    elif transformer.moe_token_dispatcher_type != "alltoall":
        reason = f"--moe-token-dispatcher-type is {transformer.moe_token_dispatcher_type}"
        remedy += ", or use alltoall"
    elif transformer.expert_model_parallel_size * transformer.tensor_model_parallel_size > 1:
        reason = (
            f"rows travel between ranks (--expert-model-parallel-size "
            f"{transformer.expert_model_parallel_size}, --tensor-model-parallel-size "
            f"{transformer.tensor_model_parallel_size})"
        )
    elif transformer.moe_permute_fusion:
        reason = "--moe-permute-fusion is given"
        remedy += ", or leave that out"
    else:
        return
    raise ValueError(
        "row_buffer (--moe-dynamic-row-buffer) is 'worst_case', but the host has to know the "
        f"number of rows, because {reason}: {remedy}."
    )


def _with_dynamic_moe(layer: Any, router: Any, rows_per_token: int | None) -> Any:
    """A copy of one layer's spec whose MoE layer, if it has one, is ours."""
    mlp = layer.submodules.mlp
    if not (isinstance(mlp, partial) and mlp.func is MoELayer):
        return layer
    # Upstream shares one spec object among all layers.
    layer = copy.copy(layer)
    submodules = dataclasses.replace(mlp.keywords["submodules"], router=router)
    layer.submodules = dataclasses.replace(
        layer.submodules,
        mlp=partial(
            DynMoELayer,
            **(mlp.keywords | {"submodules": submodules, "rows_per_token": rows_per_token}),
        ),
    )
    return layer
