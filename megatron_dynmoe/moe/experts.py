"""GroupedExperts: the SwiGLU experts of a rank as two stacked weights and grouped GEMMs.

The module needs nothing but PyTorch. Weights, results and checkpoints equal those of upstream's
SequentialMLP, which holds two linear layers for each expert and runs one expert after another.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

from megatron_dynmoe.moe.fused import fused_experts, is_fused
from megatron_dynmoe.moe.grouped_linear import grouped_linear
from megatron_dynmoe.moe.permute import RowOrder
from megatron_dynmoe.moe.recompute import computed_again, recomputes_activations

_EXTRA_STATE = "_extra_state"


class GroupedExperts(MegatronModule):
    """The experts of one rank. Upstream builds and calls this class in place of SequentialMLP.

    E is the number of local experts, D the hidden size, F the experts' FFN size on this rank.

    Attributes:
        weight1: [E, 2F, D], gate rows first.
        weight2: [E, D, F].
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        """Build the experts; arguments are upstream's."""
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.dp_group = pg_collection.ep, pg_collection.expt_dp
        self.tp_group = pg_collection.expt_tp
        weights1, weights2 = [], []
        # Upstream's layers draw the weights in upstream's order, so that a seed gives the same
        # weights as with the back end `local`.
        for _ in range(num_local_experts):
            shared: dict[str, Any] = {
                "config": config,
                "bias": False,
                "skip_bias_add": True,
                "is_expert": True,
                "tp_group": self.tp_group,
            }
            hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
            fc1 = ColumnParallelLinear(
                hidden,
                2 * ffn,
                init_method=config.init_method,
                gather_output=False,
                stride=2,
                **shared,
            )
            fc2 = RowParallelLinear(
                ffn,
                hidden,
                init_method=config.output_layer_init_method,
                input_is_parallel=True,
                **shared,
            )
            weights1.append(fc1.weight)
            weights2.append(fc2.weight)
        self.weight1, self.weight2 = _stacked(weights1), _stacked(weights2)

    def forward(
        self,
        hidden_RD: Tensor,
        tokens_per_expert: Tensor,
        probs_R: Tensor,
        order: RowOrder | None = None,
    ) -> tuple[Tensor, None]:
        """Run every row through its expert and weight the result.

        Args:
            hidden_RD: [R, D], the rows of expert 0, then those of expert 1, ...
            tokens_per_expert: [E] int64, on any device; sums to R, or to less if there is room for
                more rows.
            probs_R: [R] float32, the rows' weights.
            order: if given, ``hidden_RD`` are tokens, [T, D], of which these are the rows; only if
                the experts :meth:`gather <gathers>`.

        Returns:
            [R, D] (or each token's sum, [T, D]) in the input's dtype, and None for a bias.
        """
        if self.gathers(hidden_RD):
            weights = self.weight1, self.weight2
            return fused_experts(hidden_RD, probs_R, *weights, tokens_per_expert, order), None
        assert order is None
        gate_up = grouped_linear(hidden_RD, self.weight1, tokens_per_expert)
        weighted_RF = self._activated(gate_up, probs_R)
        again: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if recomputes_activations(self.config):
            inputs = gate_up.detach(), probs_R.detach()
            again = computed_again(weighted_RF, partial(self._activated, *inputs))
        with again:
            return grouped_linear(weighted_RF, self.weight2, tokens_per_expert), None

    def gathers(self, tokens: Tensor) -> bool:
        """Whether these experts take tokens and the order of their rows in place of the rows."""
        sizes = *self.weight1.shape[1:], *self.weight2.shape[1:]
        return is_fused(tokens.device, tokens.dtype, *sizes)

    def _activated(self, gate_up_R2F: Tensor, probs_R: Tensor) -> Tensor:
        """As in upstream, the weights multiply the activations and not the outputs."""
        if self.config.bias_activation_fusion:
            return weighted_bias_swiglu_impl(gate_up_R2F, None, probs_R.unsqueeze(-1))
        return _WeightedSwiGLU.apply(gate_up_R2F, probs_R)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the weights under the names and in the global shapes of upstream's experts.

        Raises:
            ValueError: the metadata ask for one tensor per expert.
        """
        if (metadata or {}).get("singleton_local_shards", False):
            raise ValueError(
                "The checkpoint is to name every expert's tensors on its own (singleton local "
                "shards), which torch_native's experts cannot do: use --moe-dynamic-backend local."
            )
        sharded: ShardedStateDict = {}
        for name, weight, layer, tp_axis, num_parts in (
            ("weight1", self.weight1, "linear_fc1", 1, 2),
            ("weight2", self.weight2, "linear_fc2", 2, 1),
        ):
            key = f"{prefix}experts.{layer}"
            sharded[f"{prefix}{name}"] = self._sharded(
                weight, f"{key}.weight", tp_axis, num_parts, sharded_offsets
            )
            # Upstream's layers save an empty state beside each weight and expect to load it again.
            first = self.ep_group.rank() * self.num_local_experts
            for expert in range(self.num_local_experts):
                experts = self.ep_group.size() * self.num_local_experts
                offset = (len(sharded_offsets), first + expert, experts)
                sharded[f"{prefix}{layer}.{expert}.{_EXTRA_STATE}"] = (
                    make_sharded_object_for_checkpoint(
                        None,
                        f"{key}.{_EXTRA_STATE}",
                        (*sharded_offsets, offset),
                        replica_id=(0, self.tp_group.rank(), self.dp_group.rank()),
                    )
                )
        return sharded

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load everything except the empty states."""
        for name in [name for name in state_dict if name.endswith(_EXTRA_STATE)]:
            if name.startswith(prefix):
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _sharded(
        self, weight: Tensor, key: str, tp_axis: int, num_parts: int, layers: tuple[Any, ...]
    ) -> ShardedTensorFactory:
        """Describe a weight [E, ...] as a part of [layers, all experts, ...].

        Args:
            tp_axis: the axis that tensor parallelism splits.
            num_parts: 2 if gate and up lie in this axis and are split separately, else 1.
            layers: the offset in the axis of layers, which the weight itself does not have.
        """
        prepended = len(layers)
        ep_rank, ep_size = self.ep_group.rank(), self.ep_group.size()
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()

        def build(
            key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None
        ) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *layers,
                    (prepended, ep_rank, ep_size),
                    (prepended + tp_axis, tp_rank + number * tp_size, num_parts * tp_size),
                    replica_id=replica_id,
                    prepend_axis_num=prepended,
                )
                for number, part in enumerate(tensor.chunk(num_parts, dim=tp_axis))
            ]

        def merge(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts, dim=tp_axis)

        return ShardedTensorFactory(key, weight, build, merge, (0, 0, self.dp_group.rank()))


class _WeightedSwiGLU(torch.autograd.Function):
    """probs * silu(gate) * up; only the inputs are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up_R2F: Tensor, probs_R: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_R2F, probs_R)
        gate, up = gate_up_R2F.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up).mul_(probs_R.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, probs = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        grad_activated = grad_RF * up
        grad_probs = torch.linalg.vecdot(grad_activated.to(probs.dtype), activated.to(probs.dtype))
        torch.mul(grad_RF, activated.mul_(probs.unsqueeze(-1)), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(
            grad_activated.mul_(probs.unsqueeze(-1)), gate, grad_input=grad_gate
        )
        return grad_gate_up, grad_probs


def _stacked(weights: list[torch.nn.Parameter]) -> torch.nn.Parameter:
    """Stack the weights into one parameter that upstream treats as an expert's."""
    stacked = torch.nn.Parameter(torch.stack([weight.detach() for weight in weights]))
    # These say which data-parallel ranks share the parameter, and how TP splits it.
    for name in ("allreduce", "tensor_model_parallel", "partition_stride"):
        if hasattr(weights[0], name):
            setattr(stacked, name, getattr(weights[0], name))
    stacked.partition_dim = getattr(weights[0], "partition_dim", 0) + 1  # type: ignore[attr-defined]
    return stacked
