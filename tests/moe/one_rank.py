"""Real Megatron in the test's own process: the CPU layer, a world of one, and small modules."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.helpers.megatron_arguments import keep_help_texts


@functools.cache
def megatron_on_cpu() -> None:
    """Put the CPU layer under this process. Stays for its other tests, which do not notice."""
    from megatron_dynmoe.backends import cpu

    cpu.install()
    # A test before this one may have imported Megatron without the layer: nothing is to compile.
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True
    from megatron_dynmoe.upstream import patches

    patches.install()
    keep_help_texts()


def world_of_one() -> None:
    """Megatron's process groups, each with this rank alone, and its generators at their start."""
    megatron_on_cpu()
    _initialize_groups()
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)


@functools.cache
def _initialize_groups() -> None:
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()


def forget_global_state() -> None:
    """What a test left in upstream's globals."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def transformer_config(num_experts: int = 4, hidden_size: int = 8, **settings: Any) -> Any:
    """A TransformerConfig of two small MoE layers; ``settings`` override."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    defaults: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": hidden_size,
        "num_attention_heads": 2,
        "num_moe_experts": num_experts,
        "moe_ffn_hidden_size": 12,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "init_method_std": 0.5,
    }
    return TransformerConfig(**(defaults | settings))


def prepared_spec(config: Any, dynmoe: Any) -> Any:
    """The layer spec of a training that is prepared for these settings."""
    from megatron_dynmoe.model.prepare import prepare_training
    from megatron_dynmoe.model.settled import settle_run
    from megatron_dynmoe.model.spec import layer_spec

    settled = settle_run(dynmoe.resolve(config.num_moe_experts), config)
    prepare_training(settled, config)
    return layer_spec(SimpleNamespace(transformer=config), settled=settled)


def moe_layer(dynmoe: Any, **settings: Any) -> Any:
    """The DynMoELayer of the first layer, built from the spec as a model builds it."""
    config = transformer_config(**settings)
    spec = prepared_spec(config, dynmoe)
    layer = spec.layer_specs[0].submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    return layer


def steered(dynmoe: Any, **settings: Any) -> tuple[Any, Callable[[], None]]:
    """Such a layer, and what ends its global batch."""
    layer = moe_layer(dynmoe, **settings)
    return layer, end_of_batch(layer)


def end_of_batch(*layers: Any) -> Callable[[], None]:
    """What ends a global batch of layers: the rule and the controller move."""
    model = torch.nn.ModuleList(layers)
    model.config = layers[0].config
    update = model.config.finalize_model_grads_func
    update.finalize = lambda *_: None
    return lambda: update([model])


def router(dynmoe: Any, **settings: Any) -> Any:
    """The DynamicRouter of such a layer."""
    return moe_layer(dynmoe, **settings).router


def in_a_buffer(weight: torch.Tensor) -> Any:
    """A parameter as Megatron's DistributedDataParallel leaves it."""
    parameter: Any = torch.nn.Parameter(weight.detach())
    parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    parameter.grad_added_to_main_grad = False
    return parameter


def buffer_after_two_micro_batches(
    overlap: bool, device: str = "cpu", **settings: Any
) -> dict[str, torch.Tensor]:
    """The weights' gradients in the buffer of Megatron's DistributedDataParallel."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )

    from megatron_dynmoe.settings.config import DynMoEConfig

    world_of_one()
    torch.manual_seed(1)
    dynmoe = DynMoEConfig(routing="top_p", threshold=0.4, backend="torch_native")
    layer = moe_layer(dynmoe, num_experts=4, **{"moe_ffn_hidden_size": 16} | settings).to(device)
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=overlap)
    parallel = DistributedDataParallel(layer.config, ddp, layer)
    parallel.zero_grad_buffer()
    for micro_batch in (1, 2):
        hidden = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(micro_batch))
        with parallel.no_sync() if micro_batch == 1 else torch.enable_grad():
            parallel(hidden.to(device))[0].square().sum().backward()
    parallel.finish_grad_sync()
    return {
        name: parameter.main_grad.clone()
        for name, parameter in layer.named_parameters()
        if "experts" in name or "router.weight" in name
    }
