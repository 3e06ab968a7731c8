"""From settled settings to upstream's layer spec with our modules in it: a pure function."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_dynmoe.backends import torch_native
from megatron_dynmoe.model.settled import Settled
from megatron_dynmoe.moe.layer import DynMoELayer
from megatron_dynmoe.moe.router import DynamicRouter

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig


def layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None, *, settled: Settled
) -> TransformerBlockSubmodules:
    """Build the spec of one model chunk, with dynamic routing in the layers that have experts.

    Args:
        config: upstream's model config.
        vp_stage: the chunk's virtual pipeline stage.
        settled: the run's settings.
    """
    transformer, implementation = config.transformer, settled.backend.implementation
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=implementation == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return with_our_modules(spec, transformer, settled)


def with_our_modules(
    spec: TransformerBlockSubmodules, transformer: TransformerConfig, settled: Settled
) -> TransformerBlockSubmodules:
    """Copy a spec of upstream's, with the back end's modules and dynamic routing in its layers."""
    if settled.backend.backend == "torch_native":
        spec = torch_native.with_native_modules(spec, settled.backend, transformer)
    if settled.rule is None:
        return spec
    router = partial(
        DynamicRouter, dynmoe=settled.dynmoe, rule=settled.rule, initial_map=settled.initial_map
    )
    layers = [_with_dynamic_moe(layer, router, settled) for layer in spec.layer_specs]
    return dataclasses.replace(spec, layer_specs=layers)


def _with_dynamic_moe(layer: Any, router: Any, settled: Settled) -> Any:
    """Copy one layer's spec, and replace its MoE layer, if it has one, by ours."""
    mlp = layer.submodules.mlp
    if not (isinstance(mlp, partial) and mlp.func is MoELayer):
        return layer
    # Upstream shares one spec object among all layers.
    layer = copy.copy(layer)
    submodules = dataclasses.replace(mlp.keywords["submodules"], router=router)
    ours = {
        "submodules": submodules,
        "rows_per_token": settled.rows_per_token,
        "most_experts": settled.most_experts,
    }
    layer.submodules = dataclasses.replace(
        layer.submodules, mlp=partial(DynMoELayer, **(mlp.keywords | ours))
    )
    return layer
