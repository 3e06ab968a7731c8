"""Upstream's HybridModel with our modules in it: ``--hybrid-layer-pattern``."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

from megatron_dynmoe.backends.torch_native import native_norm
from megatron_dynmoe.model.settled import Settled
from megatron_dynmoe.model.spec import with_our_modules

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig
    from megatron.training.models.hybrid import HybridModelConfig

# The two halves of a layer of a GPTModel, by the names of their submodules.
_ATTENTION = ("input_layernorm", "self_attention", "self_attn_bda")
_MLP = ("pre_mlp_layernorm", "mlp", "mlp_bda")


def model_config_from_args(args: Namespace) -> GPTModelConfig | HybridModelConfig:
    """The config of upstream's model: a HybridModel if there is a pattern, else a GPTModel."""
    build = hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args
    return build(args)


class NativeStack(HybridStack):
    """Upstream's stack of layers; only its last norm, which is Transformer Engine's, is ours."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        """Build the stack; arguments as upstream."""
        super().__init__(config, *args, **(kwargs | {"post_layer_norm": False}))
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = native_norm(config, config.hidden_size, config.layernorm_epsilon)


def hybrid_stack_spec(transformer: TransformerConfig, settled: Settled) -> ModuleSpec:
    """Build the spec of a stack from the halves of the layers that a GPTModel would have.

    Args:
        transformer: upstream's config, with back end torch_native.
        settled: the run's settings.
    """
    spec = TransformerBlockSubmodules(
        layer_specs=get_gpt_decoder_layer_specs(
            transformer,
            use_transformer_engine=False,
            normalization=transformer.normalization,
            qk_l2_norm=transformer.qk_l2_norm,
        ),
        layer_norm=None,
    )
    layers = [
        layer.submodules for layer in with_our_modules(spec, transformer, settled).layer_specs
    ]
    frequency = transformer.moe_layer_freq
    has_experts = frequency if isinstance(frequency, list) else [0] * len(layers)
    parts = {"attention_layer": _one_sublayer(layers[0], *_ATTENTION)}
    for layer, sparse in zip(layers, has_experts, strict=True):
        parts.setdefault("moe_layer" if sparse else "mlp_layer", _one_sublayer(layer, *_MLP))
    return ModuleSpec(module=NativeStack, submodules=HybridStackSubmodules(**parts))


def _one_sublayer(layer: TransformerLayerSubmodules, *names: str) -> ModuleSpec:
    """A layer with these submodules alone; upstream's defaults for the others do nothing."""
    kept = {name: getattr(layer, name) for name in (*names, "sharded_state_dict_keys_map")}
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**kept))
