"""Dispatch and combine on routing maps of every kind, against sums computed without dispatch.

Expert e multiplies by e + 1. Tokens are small whole numbers and weights multiples of 1/16, so that
every sum is exact in float64, in any order, and the largest difference from the reference is 0. The
flex dispatcher takes bf16 only, and numbers that are small enough for it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.moe.flex import _VariableKDeepEP
from megatron_dynmoe.moe.layer import DynMoELayer
from tests.distributed.imbalance import workloads

NUM_EXPERTS, HIDDEN, TOKENS = 8, 8, 12
FLEX = ("deepep", "hybridep")


def routing_maps(rank: int, world_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """This rank's maps by name, each [T, E] bool."""
    empty = torch.zeros(TOKENS, NUM_EXPERTS, dtype=torch.bool)
    maps = {"random": torch.rand(TOKENS, NUM_EXPERTS, generator=generator) < 0.3}
    maps["random, no token without an expert"] = maps["random"].clone()
    maps["random, no token without an expert"][:, rank] = True
    maps["all to one expert"] = empty.clone()
    maps["all to one expert"][:, 5] = True
    maps["no token for expert 3"] = maps["random"].clone()
    maps["no token for expert 3"][:, 3] = False
    maps["no token for the first rank"] = maps["random"].clone()
    maps["no token for the first rank"][:, : NUM_EXPERTS // world_size] = False
    maps["no token for the last rank"] = maps["random"].clone()
    maps["no token for the last rank"][:, -NUM_EXPERTS // world_size :] = False
    maps["every token to every expert"] = ~empty
    maps["one token"] = maps["random, no token without an expert"][:1].clone()
    maps["rank r uses 2 r + 1 experts"] = empty.clone()
    maps["rank r uses 2 r + 1 experts"][:, : 2 * rank + 1] = True
    maps["only the first rank routes"] = maps["random"] & (rank == 0)
    maps["no token at all"] = empty.clone()
    return maps | workloads(rank, world_size, NUM_EXPERTS)


def most_experts(map_TE: Tensor) -> int:
    """The most experts of any token of any rank."""
    most = map_TE.sum(dim=1).max()
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return max(int(most), 1)


class FixedRouter(torch.nn.Module):
    """Routes as it is told."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None):
        return self.probs_TE, self.map_TE

    def set_layer_number(self, layer_number: int) -> None:
        pass


class ScalingExperts(torch.nn.Module):
    """Expert e of all multiplies its rows by (e + 1) and by their weights."""

    def __init__(self, num_local_experts: int, config: Any, **kwargs: Any) -> None:
        super().__init__()
        first = parallel_state.get_expert_model_parallel_rank() * num_local_experts
        self.scales = torch.arange(first, first + num_local_experts) + 1

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor):
        assert int(tokens_per_expert.sum()) == len(rows) == len(probs)
        scales = self.scales.repeat_interleave(tokens_per_expert.long())
        return (rows * scales.unsqueeze(-1) * probs.unsqueeze(-1)).to(rows.dtype), None


class ScalingSharedExperts(torch.nn.Module):
    """Multiplies every token by a number that the experts do not reach in float64."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__()
        self.scale = shared_scale(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.scale


def shared_scale(config: TransformerConfig) -> int:
    if config.moe_shared_expert_intermediate_size is None:
        return 0
    return 100 if config.params_dtype == torch.float64 else 64


def main() -> None:
    """Run the variant on the command line, ``stock`` or ``ours``, and print one line of JSON."""
    dispatcher, shared, whose = sys.argv[1:]
    kind = {"moe_token_dispatcher_type": dispatcher}
    if is_flex := dispatcher in FLEX:
        kind = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": dispatcher}
    world_size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=world_size)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=NUM_EXPERTS,
        expert_model_parallel_size=world_size,
        moe_router_topk=2,
        moe_shared_expert_intermediate_size=HIDDEN if shared == "shared" else None,
        add_bias_linear=False,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16 if is_flex else torch.float64,
        bf16=is_flex,
        **kind,
    )
    layer = (DynMoELayer if whose == "ours" else MoELayer)(
        config, MoESubmodules(ScalingExperts, ScalingSharedExperts, FixedRouter), layer_number=1
    )
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    print("seed: the rank")
    waits: list[str] = []
    torch.cuda.Event.synchronize = lambda event: waits.append("for copies to the host")
    found = {
        name: largest_differences(layer, map_TE, generator, whose == "stock")
        for name, map_TE in routing_maps(rank, world_size, generator).items()
    }
    print("DIFFERENCES " + json.dumps(found))
    print(f"WAITS {len(waits)}")


def largest_differences(
    layer: MoELayer, map_TE: Tensor, generator: torch.Generator, may_raise: bool
) -> dict[str, float]:
    """Of output and gradients from their references, over this rank's tokens."""
    num_tokens, dtype = len(map_TE), layer.config.params_dtype
    # In bf16 a number has eight digits.
    largest, unit = (8, 1 / 16) if dtype == torch.float64 else (1, 1 / 2)

    def whole_numbers(*shape: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)

    hidden_TD, grad_TD = whole_numbers(num_tokens, HIDDEN), whole_numbers(num_tokens, HIDDEN)
    weights_TE = (whole_numbers(num_tokens, NUM_EXPERTS).abs() + 1) * unit * map_TE
    probs_TE = weights_TE if dtype == torch.float64 else weights_TE.float()
    hidden_TD.requires_grad_()
    probs_TE.requires_grad_()
    layer.router.map_TE, layer.router.probs_TE = map_TE, probs_TE
    manager = getattr(layer.token_dispatcher, "_comm_manager", None)
    if isinstance(manager, _VariableKDeepEP):
        manager.router_topk = most_experts(map_TE)  # the tightest cap

    scales_E = torch.arange(NUM_EXPERTS).double() + 1
    weights_T1 = (probs_TE.detach() * scales_E).sum(dim=-1, keepdim=True)
    weights_T1 += shared_scale(layer.config)
    dots_T1 = (hidden_TD.detach() * grad_TD).sum(dim=-1, keepdim=True)
    expected = {
        "output": hidden_TD.detach() * weights_T1,
        "input gradient": grad_TD * weights_T1,
        "weight gradient": dots_T1 * scales_E * map_TE,
    }
    with contextlib.suppress(RuntimeError) if may_raise else contextlib.nullcontext():
        output, _ = layer(hidden_TD.unsqueeze(1))
        output.backward(grad_TD.unsqueeze(1))
        actual = dict(
            zip(expected, (output.squeeze(1), hidden_TD.grad, probs_TE.grad), strict=True)
        )
        # A weight outside of the map may have no gradient at all.
        actual["weight gradient"] = actual["weight gradient"] * map_TE
        return {
            name: (actual[name] - reference).abs().max().item()
            for name, reference in expected.items()
        }
    return dict.fromkeys(expected, float("inf"))
