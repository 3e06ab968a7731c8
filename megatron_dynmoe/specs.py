"""Where the plugin enters a model: upstream's layer spec with our MoE layer and router.

``--spec megatron_dynmoe.specs dynmoe_layer_spec`` names :func:`dynmoe_layer_spec`; with it the
stock ``pretrain_gpt.py`` trains with dynamic routing, its settings read from ``DYNMOE_CONFIG``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training import print_rank_0

from megatron_dynmoe.arguments import adopt_upstream_balance_loss, config_from_environment
from megatron_dynmoe.config import AUTO, DynMoEConfig
from megatron_dynmoe.control import calibrate
from megatron_dynmoe.control.pi import PIController
from megatron_dynmoe.control.update import GlobalBatchUpdate
from megatron_dynmoe.metrics import install_metrics_tracker
from megatron_dynmoe.moe.layer import DynMoELayer
from megatron_dynmoe.routing.router import TopPRouter
from megatron_dynmoe.upstream_flags import check_upstream_settings

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

# The factor by which the response of the count may grow before the loop becomes unstable.
MIN_GAIN_MARGIN = 3.0


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

    Called once per chunk; installs the update at the end of a global batch and the metrics with
    the first.

    Args:
        config: upstream's model config. Its ``transformer`` is adapted: routing in fp32, and the
            hook that ends a global batch.
        vp_stage: the chunk's virtual pipeline stage.
        dynmoe: settings as the user gave them.

    Raises:
        ValueError: a setting of ours or of upstream makes no sense with dynamic routing.
    """
    transformer = config.transformer
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    if not dynmoe.is_dynamic:
        return spec
    check_upstream_settings(transformer)
    resolved, controller = settle(dynmoe, transformer)

    transformer.moe_router_dtype = "fp32"
    if not isinstance(transformer.finalize_model_grads_func, GlobalBatchUpdate):
        transformer.finalize_model_grads_func = GlobalBatchUpdate(
            resolved, controller, transformer.finalize_model_grads_func
        )
        install_metrics_tracker(resolved)
        settings = ", ".join(
            f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in resolved.to_dict().items()
        )
        print_rank_0(f"> dynamic routing: {settings}")
        if controller is not None:
            _warn_of_high_gains(resolved, controller, transformer)

    router = partial(
        TopPRouter,
        dynmoe=resolved,
        initial_threshold=controller.initial_threshold if controller else resolved.threshold,
    )
    spec = dataclasses.replace(
        spec, layer_specs=[_with_dynamic_moe(layer, router) for layer in spec.layer_specs]
    )
    return spec


def settle(
    dynmoe: DynMoEConfig, transformer: TransformerConfig
) -> tuple[DynMoEConfig, PIController | None]:
    """Fill defaults and compute what ``auto`` stands for, from the model's own configuration.

    Returns:
        The resolved settings and, for ``dtop_p``, the controller.

    Raises:
        ValueError: a setting makes no sense with another or with the model.
    """
    num_experts = transformer.num_moe_experts
    resolved = dynmoe.resolve(num_experts)
    if not resolved.is_controlled:
        return resolved, None
    targets, plant = _targets(resolved), _plant(resolved, transformer)
    low, high = resolved.min_threshold, resolved.max_threshold
    computed = dict(
        zip(("proportional_gain", "integral_gain"), _gains(targets, plant), strict=True),
        initial_threshold=min(
            max(calibrate.initial_threshold(target=targets[0], **plant), low), high
        ),
    )
    resolved = dataclasses.replace(
        resolved,
        **{name: value for name, value in computed.items() if getattr(resolved, name) == AUTO},
    )
    controller = PIController(
        num_experts=num_experts,
        initial_threshold=resolved.initial_threshold,
        proportional_gain=resolved.proportional_gain,
        integral_gain=resolved.integral_gain,
        min_threshold=low,
        max_threshold=high,
    )
    return resolved, controller


def _targets(resolved: DynMoEConfig) -> list[float]:
    return [target for _, target in resolved.target_experts_per_token.points]


def _plant(resolved: DynMoEConfig, transformer: TransformerConfig) -> dict[str, Any]:
    """What the response of the count to the threshold depends on, but for the target."""
    return {
        "num_experts": transformer.num_moe_experts,
        "normalized": resolved.normalization == "drn",
        # The gate reads normalized hidden states of root mean square 1.
        "logits_std": transformer.init_method_std * math.sqrt(transformer.hidden_size),
        "max_experts": resolved.max_experts_per_token,
    }


def _gain_margin(gains: tuple[float, float], targets: list[float], plant: dict[str, Any]) -> float:
    steepest = max(calibrate.plant_slope(target=target, **plant) for target in targets)
    return calibrate.gain_margin(*gains, steepest, plant["num_experts"])


def _gains(targets: list[float], plant: dict[str, Any]) -> tuple[float, float]:
    """The default gains at the last target of a schedule, where the run spends most of its time.

    Reduced where another target responds so much more strongly that the loop would come too close
    to instability.
    """
    gains = calibrate.default_gains(target=targets[-1], **plant)
    scale = min(1.0, _gain_margin(gains, targets, plant) / MIN_GAIN_MARGIN)
    return gains[0] * scale, gains[1] * scale


def _warn_of_high_gains(
    resolved: DynMoEConfig, controller: PIController, transformer: TransformerConfig
) -> None:
    gains = controller.proportional_gain, controller.integral_gain
    margin = _gain_margin(gains, _targets(resolved), _plant(resolved, transformer))
    if margin < 0.999 * MIN_GAIN_MARGIN:  # _gains stops at the margin itself
        print_rank_0(
            f"WARNING: proportional_gain {gains[0]:.4g} and integral_gain {gains[1]:.4g} become "
            f"unstable once the count responds {margin:.2g} times as strongly as at the start; "
            f"ask for {MIN_GAIN_MARGIN:g} or more, or use auto."
        )


def _with_dynamic_moe(layer: Any, router: Any) -> Any:
    """A copy of one layer's spec whose MoE layer, if it has one, is ours."""
    mlp = layer.submodules.mlp
    if not (isinstance(mlp, partial) and mlp.func is MoELayer):
        return layer
    # Upstream shares one spec object among all layers.
    layer = copy.copy(layer)
    submodules = dataclasses.replace(mlp.keywords["submodules"], router=router)
    layer.submodules = dataclasses.replace(
        layer.submodules, mlp=partial(DynMoELayer, **(mlp.keywords | {"submodules": submodules}))
    )
    return layer
