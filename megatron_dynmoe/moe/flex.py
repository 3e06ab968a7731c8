"""Upstream's flex dispatcher for any routing map: permutation and transfer in one kernel.

Its back ends differ in what they take. HybridEP takes the routing map, so upstream's code fits.
DeepEP takes K expert ids per token, and -1 for no expert. Upstream takes the K largest weights and
marks none as missing, which is wrong without an error if tokens use different numbers of experts.
"""

from __future__ import annotations

import inspect

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher, _DeepepManager
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.settings.messages.refusals import FlagError

DEEPEP_MOST_IDS = 32  # of one token; csrc/kernels/legacy of DeepEP asserts it
DEEPEP_ALIGNMENT = 16  # bytes of a row; csrc/legacy/buffer.hpp asserts it
# What Megatron-Core 0.19.2 passes by name (core/transformer/moe/fused_a2a.py).
_PASSED = {
    "deepep": (
        *("topk_idx", "topk_weights", "num_tokens_per_rank", "num_tokens_per_rdma_rank"),
        *("is_token_in_rank", "num_tokens_per_expert", "handle", "previous_event"),
        *("async_finish", "allocate_on_comm_stream"),
    ),
    "hybridep": (
        *("hidden", "routing_map", "probs", "scaling_factor", "num_of_experts_per_rank"),
        *("pad_multiple", "num_permuted_tokens", "non_blocking"),
    ),
}


class VariableKFlexTokenDispatcher(MoEFlexTokenDispatcher):
    """Upstream's flex dispatcher; only the metadata that DeepEP gets are made from the map."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        most_experts: int,
    ) -> None:
        """Build the dispatcher; ``most_experts`` is the most that any token can use."""
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        if config.moe_flex_dispatcher_backend == "deepep":
            self._comm_manager = _VariableKDeepEP(
                group=self.tp_ep_group,
                num_local_experts=num_local_experts,
                router_topk=self.tp_size * most_experts,
                num_experts=self.tp_size * config.num_moe_experts,
                config=config,
            )


class _VariableKDeepEP(_DeepepManager):
    def setup_metadata(self, routing_map: Tensor, probs: Tensor) -> None:
        """Turn map and weights into ids and weights [T, K], with -1 in unused places.

        Args:
            routing_map: [T, number of ranks, experts of a rank], bool.
            probs: the weights, in the same shape.
        """
        map_TE, probs_TE = routing_map.flatten(1), probs.flatten(1)
        last = self.num_experts - 1
        experts_E = torch.arange(self.num_experts, device=map_TE.device)
        # A weight may be 0, so the map chooses. Unused places sort behind the last expert.
        ids_TE = torch.where(map_TE, experts_E, last + 1)
        ids_TK = ids_TE.topk(self.router_topk, largest=False).values
        used_TK = ids_TK <= last
        probs_TK = probs_TE.gather(1, ids_TK.clamp(max=last))
        self.token_probs = torch.where(used_TK, probs_TK, 0.0)
        self.token_indices = ids_TK.masked_fill(~used_TK, -1)


def check_flex(transformer: TransformerConfig, cap: int | None, here: bool = True) -> None:
    """Refuse the flex dispatcher if it cannot run as it is set.

    Args:
        transformer: the model's config, with ``moe_token_dispatcher_type`` flex.
        cap: the most experts that a token may use; None: all.
        here: whether it runs on this machine, which then needs the package.

    Raises:
        FlagError: a package is missing or has another interface, or cannot take the model's
            type or size, so many experts or so few ranks.
    """
    backend, elsewhere = transformer.moe_flex_dispatcher_backend, "use alltoall"
    installed = {"deepep": fused_a2a.HAVE_DEEP_EP, "hybridep": fused_a2a.HAVE_HYBRIDEP}
    if backend not in installed:
        raise _flex_with(
            backend,
            "whose buffers are sized by a fixed number of experts per token",
            f"use deepep or hybridep, or {elsewhere} as dispatcher",
        )
    if here and not installed[backend]:
        branch = "" if backend == "deepep" else ", from its branch hybrid-ep"
        raise _flex_with(
            backend,
            "and the package deep_ep cannot be imported",
            f"install DeepEP{branch}, or {elsewhere}",
        )
    if here:
        _check_interface(backend)
    if backend == "deepep":
        _check_deepep(transformer, cap, elsewhere)
    if transformer.params_dtype != torch.bfloat16:
        dtype = str(transformer.params_dtype).removeprefix("torch.")
        raise _flex_with(
            backend,
            f"whose kernels take bf16, and the model is {dtype}",
            f"give --bf16, or {elsewhere}",
        )


def _flex_with(backend: str, problem: str, remedy: str) -> FlagError:
    beside = f" with --moe-flex-dispatcher-backend {backend}, {problem}"
    return FlagError("moe_token_dispatcher_type", "flex", beside, remedy)


def _check_interface(backend: str) -> None:
    """Refuse a version of the package whose function does not take what Megatron passes."""
    function = (
        fused_a2a.Buffer.dispatch
        if backend == "deepep"
        else fused_a2a.HybridEPBuffer.dispatch_with_permute
    )
    takes = inspect.signature(function).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    missing = [name for name in _PASSED[backend] if name not in takes]
    if missing and not takes_any:
        raise _flex_with(
            backend,
            f"and {function.__qualname__} of the installed deep_ep does not take "
            f"{', '.join(missing)}, which Megatron-Core passes",
            "install its newest version, or use alltoall",
        )


def _check_deepep(transformer: TransformerConfig, cap: int | None, elsewhere: str) -> None:
    tensor = transformer.expert_tensor_parallel_size or transformer.tensor_model_parallel_size
    if tensor * transformer.expert_model_parallel_size == 1:
        raise _flex_with("deepep", "which needs more than one expert-parallel rank", elsewhere)
    ids = tensor * (cap or transformer.num_moe_experts)
    if ids > DEEPEP_MOST_IDS:
        experts = f", so a token may use {cap or transformer.num_moe_experts}"
        per_rank = "" if tensor == 1 else f" on each of {tensor} tensor-parallel ranks"
        most = DEEPEP_MOST_IDS // tensor
        remedy = f"give at most {most}, for inference, too, or {elsewhere}" if most else elsewhere
        raise FlagError(
            "moe_dynamic_max_experts_per_token",
            cap,
            f"{experts}{per_rank}, and DeepEP takes at most {DEEPEP_MOST_IDS} ids per token",
            remedy,
        )
    if transformer.hidden_size * torch.bfloat16.itemsize % DEEPEP_ALIGNMENT:
        raise FlagError(
            "hidden_size",
            transformer.hidden_size,
            f", and DeepEP sends rows of bf16 in whole pieces of {DEEPEP_ALIGNMENT} bytes",
            f"use a multiple of 8, or {elsewhere}",
        )
