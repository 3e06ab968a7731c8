"""The memory of one GPU, part by part.

Weights, gradients and optimizer state are exact except for buffers of some kilobytes. Activations
are an estimate for the ``torch_native`` back end with fused attention: the tensors that its
operations keep, and the largest temporary step. CUDA's context, NCCL's buffers and fragmentation
are not included.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from megatron_dynmoe.planning.layout import Layout
from megatron_dynmoe.planning.precision import Precision, Recompute
from megatron_dynmoe.planning.shape import (
    ModelShape,
    layers_of,
    parameters_on_gpu,
    total_parameters,
)
from megatron_dynmoe.planning.worst_case import (
    ROUTER_BYTES,
    ExpertSizes,
    kept_row_bytes,
    mean_rows,
    passing_row_bytes,
    worst_case_rows,
)
from megatron_dynmoe.settings.config import DynMoEConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU.

    Attributes:
        activations: everything that does not depend on the routing, including the router.
        expert_rows: everything whose size is proportional to the number of rows.
        update: temporaries of the optimizer's step, when there are no activations any more.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    expert_rows: float
    update: float

    @property
    def total(self) -> float:
        """The most that exists at once."""
        return self.state + max(self.activations + self.expert_rows, self.update)

    @property
    def state(self) -> float:
        """The parts that exist before the first step; they are exact."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class MemoryModel:
    """The quantities that determine the memory of a run's GPUs.

    Attributes:
        shards_optimizer: whether the distributed optimizer is used.
        gathers_tokens: whether tokens are gathered instead of sent (the allgather dispatcher).
        mask_bytes: bytes of the dropout mask per hidden value.
        fuses_activation: whether the activation function is one kernel, forward and backward.
    """

    shape: ModelShape
    layout: Layout
    precision: Precision
    recompute: Recompute
    shards_optimizer: bool
    gathers_tokens: bool
    mask_bytes: int
    fuses_activation: bool

    @classmethod
    def from_args(cls, args: Namespace, layout: Layout, dynmoe: DynMoEConfig) -> MemoryModel:
        """Read Megatron's arguments; defaults that Megatron derives have to be filled in.

        Args:
            dynmoe: resolved settings.

        Raises:
            ValueError: the planner does not know the effect of a setting that is used.
        """
        return cls(
            shape=ModelShape.from_args(args, dynmoe),
            layout=layout,
            precision=Precision.from_args(args),
            recompute=Recompute.from_args(args),
            shards_optimizer=args.use_distributed_optimizer,
            gathers_tokens=args.moe_token_dispatcher_type == "allgather",
            mask_bytes=1 if args.hidden_dropout else 0,
            fuses_activation=args.swiglu and args.bias_swiglu_fusion,
        )

    @property
    def local_tokens(self) -> int:
        """The number of tokens of a micro-batch that one rank routes."""
        return self._tokens // (self.layout.tensor if self.layout.sequence_parallel else 1)

    @property
    def _tokens(self) -> int:
        return self.layout.seq_length * self.layout.micro_batch // self.layout.context

    def fullest(self, rows_per_token: float) -> tuple[int, Memory]:
        """Find the pipeline rank that needs most under a balanced load, and what it needs."""
        rows = mean_rows(self.local_tokens, self.layout.expert_tensor, rows_per_token)
        return self._fullest(rows, self.local_tokens * rows_per_token)

    def of_stage(self, stage: int, rows_per_token: float, imbalance: float = 1.0) -> Memory:
        """Compute what a GPU of a pipeline rank needs.

        Args:
            stage: the pipeline rank, from 0.
            rows_per_token: the mean of all tokens.
            imbalance: how many times the mean the experts of this GPU get.
        """
        rows = mean_rows(self.local_tokens, self.layout.expert_tensor, rows_per_token)
        return self._of_stage(stage, rows * imbalance, self.local_tokens * rows_per_token)

    def least_expert_traffic(self, rows_per_token: float, imbalance: float = 1.0) -> float:
        """Compute the bytes that experts of a layer must read and write in a forward pass.

        These are, once each, the tokens and their outputs, the weights of the experts, what the
        first GEMM puts out (the backward pass needs it), and, written and read, the activation and
        the rows.

        Args:
            rows_per_token, imbalance: as in :meth:`of_stage`.
        """
        shape, sizes = self.shape, self._experts
        rows = mean_rows(self.local_tokens, self.layout.expert_tensor, rows_per_token) * imbalance
        width = (shape.gate_factor + 2) * sizes.ffn + 2 * shape.hidden
        weights = sizes.num_local * (shape.gate_factor + 1) * sizes.ffn * shape.hidden
        numbers = 2 * self.local_tokens * shape.hidden + weights + rows * width
        return numbers * self.precision.activation if any(shape.moe_layers) else 0

    def worst_case(self, cap: int | None) -> tuple[int, Memory]:
        """Find the same if every layer has the most rows that the cap allows."""
        layout, num_experts = self.layout, self.shape.num_experts
        if not num_experts:
            return self.fullest(0)
        rows = worst_case_rows(
            self.local_tokens, num_experts, layout.expert, layout.expert_tensor, cap
        )
        return self._fullest(rows, self.local_tokens * min(cap or num_experts, num_experts))

    def cap_that_fits(self, num_bytes: float) -> int | None:
        """Find the largest cap whose worst case fits; None if even a cap of 1 does not fit."""
        fitting = (
            cap
            for cap in range(self.shape.num_experts, 0, -1)
            if self.worst_case(cap)[1].total <= num_bytes
        )
        return next(fitting, None)

    def state(self, stage: int) -> tuple[float, float, float]:
        """Bytes of weights, gradients and optimizer state on each GPU of a pipeline rank."""
        parameters = parameters_on_gpu(self.shape, self.layout, stage)
        return (
            self.precision.weight * parameters.total,
            self.precision.gradient * parameters.total,
            self.precision.optimizer * self._updated_parameters(stage),
        )

    def _updated_parameters(self, stage: int) -> float:
        """The parameters that the optimizer of each GPU of a pipeline rank updates."""
        parameters = parameters_on_gpu(self.shape, self.layout, stage)
        if not self.shards_optimizer:
            return parameters.total
        dense_ranks = self.layout.data * self.layout.context
        return parameters.dense / dense_ranks + parameters.expert / self.layout.expert_data

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: weights, main parameters and moments."""
        each = self.precision.weight + self.precision.optimizer - self.precision.gradient_copies
        if self.shards_optimizer and self.precision.weight == 4:
            each += 4  # the distributed optimizer saves float32 weights a second time
        return each * total_parameters(self.shape)

    def _fullest(self, rows: float, sent_rows: float) -> tuple[int, Memory]:
        stages = range(self.layout.pipeline)
        each = [self._of_stage(stage, rows, sent_rows) for stage in stages]
        stage = max(stages, key=lambda index: each[index].total)
        return stage, each[stage]

    def _of_stage(self, stage: int, rows: float, sent_rows: float) -> Memory:
        return Memory(
            *self.state(stage),
            *self._activations(stage, rows, sent_rows),
            self.precision.update * self._updated_parameters(stage),
        )

    def _activations(self, stage: int, rows: float, sent_rows: float) -> tuple[float, float]:
        """Activation bytes of a pipeline rank: those that do not depend on rows, and the others."""
        layers = [
            self.shape.moe_layers[index] for index in layers_of(self.shape, self.layout, stage)
        ]
        stored, again = self._stored_and_recomputed(layers)
        in_flight = self._micro_batches_in_flight(stage)

        kept_bytes = kept_row_bytes(self._experts, rows)
        keeps_rows = not self.recompute.modules & {"moe"}
        expert_rows = kept_bytes * in_flight * sum(stored) * keeps_rows
        activations = in_flight * sum(map(self._kept_bytes, stored))
        if self.recompute.method:
            activations += in_flight * self._num_inputs_kept(len(layers)) * self._hidden_bytes
        if self.layout.pipeline > 1:  # the schedule holds what it has received and sent last
            activations += 2 * self._hidden_bytes

        # The activations of layers that are recomputed together exist at once, for one micro-batch.
        at_once = sum(again) if self.recompute.method else any(layers) * (not keeps_rows)
        passing_rows = kept_bytes * at_once
        if any(layers):
            is_spread = self.layout.expert * self.layout.expert_tensor > 1
            passing_rows += passing_row_bytes(self._experts, rows, sent_rows, is_spread)
            passing_rows += self._gathered_tokens_bytes
        passing = self._passing_bytes
        if self.recompute.method:
            passing += sum(map(self._kept_bytes, again))
        # No layer is at work while the loss is computed.
        loss = self._output_bytes if stage == self.layout.pipeline - 1 else 0
        if loss > passing + passing_rows:
            return activations + loss, expert_rows
        return activations + passing, expert_rows + passing_rows

    def _stored_and_recomputed(self, layers: list[bool]) -> tuple[list[bool], list[bool]]:
        """Find the layers whose activations are kept, and the largest group recomputed at once."""
        recompute = self.recompute
        if recompute.method == "block":
            # Only the first layers are recomputed, and each is a group of its own.
            return layers[recompute.num_layers :], sorted(layers)[-1:]
        if recompute.method == "uniform":
            size = recompute.num_layers
            groups = [layers[first : first + size] for first in range(0, len(layers), size)]
            return [], max(groups, key=sum)
        return layers, []

    def _num_inputs_kept(self, num_layers: int) -> int:
        if self.recompute.method == "block":
            return min(self.recompute.num_layers, num_layers)
        return -(-num_layers // self.recompute.num_layers)

    def _micro_batches_in_flight(self, stage: int) -> float:
        """The most micro-batches whose activations a pipeline rank holds under 1F1B."""
        layout = self.layout
        ahead = layout.pipeline - stage
        if layout.stages_per_rank == 1:
            return min(ahead, layout.num_micro_batches)
        chunks = 2 * (ahead - 1) + (layout.stages_per_rank - 1) * layout.pipeline + 1
        most = layout.num_micro_batches * layout.stages_per_rank
        return min(chunks, most) / layout.stages_per_rank

    @property
    def _experts(self) -> ExpertSizes:
        shape, layout = self.shape, self.layout
        recomputed = "moe_act" in self.recompute.modules
        # Rows that came from other ranks cannot be gathered again.
        is_spread = layout.expert * layout.expert_tensor > 1 or self.gathers_tokens
        return ExpertSizes(
            shape.hidden,
            shape.expert_ffn // layout.expert_tensor,
            shape.gate_factor,
            shape.num_experts // layout.expert,
            self.precision.activation,
            self.fuses_activation,
            keeps_rows=is_spread or not recomputed,
            keeps_activations=not recomputed,
        )

    @property
    def _hidden_bytes(self) -> int:
        """Bytes of a micro-batch's hidden states between layers."""
        return self.local_tokens * self.shape.hidden * self.precision.activation

    def _kept_bytes(self, is_moe: bool) -> float:
        """Bytes that a layer keeps from forward to backward, not counting rows."""
        shape, size, modules = self.shape, self.precision.activation, self.recompute.modules
        tokens = self._tokens / self.layout.tensor  # for parts that tensor parallelism splits
        # The input and the output of each norm.
        kept: float = self._hidden_bytes * (2 if "layernorm" in modules else 4)
        kept += 2 * self.local_tokens * (4 + self.mask_bytes * shape.hidden)
        # Queries, keys and values before and after rotation; the attention's output; and its
        # normalizer in float32. Flash attention, which takes half precision only, writes the output
        # in the layout that the projection takes. Of others that layout needs a copy.
        projected = shape.query_size + shape.key_value_size
        rotated = 0 if shape.positions else shape.query_size + shape.key_value_size / 2
        outputs = shape.query_size * (1 if size == 2 or "core_attn" in modules else 2)
        kept += tokens * ((projected + rotated + outputs) * size + 4 * shape.num_heads)
        if not shape.positions:  # cosines and sines, for queries and for keys
            positions = self.layout.seq_length // self.layout.context
            kept += 4 * positions * shape.query_size // shape.num_heads * size
        width = shape.gate_factor + 1
        if not is_moe:
            return kept + ("mlp" not in modules) * tokens * width * shape.ffn * size
        if "moe" in modules:
            return kept
        kept += self.local_tokens * shape.num_experts * ROUTER_BYTES
        return kept + ("shared_experts" not in modules) * tokens * width * shape.shared_ffn * size

    @property
    def _passing_bytes(self) -> float:
        """The most temporary bytes of a layer, without rows: gradients at its largest GEMM."""
        shape, tokens = self.shape, self._tokens / self.layout.tensor
        dense_ffn = 0 if all(shape.moe_layers) else shape.ffn
        # Gradients of the activation's output and input, and what lies between.
        between = 0 if self.fuses_activation else shape.gate_factor + 2
        widest = max(
            2 * (shape.query_size + shape.key_value_size),
            (shape.gate_factor + 1 + between) * max(dense_ffn, shape.shared_ffn),
        )
        return 4 * self._hidden_bytes + tokens * widest * self.precision.activation

    @property
    def _gathered_tokens_bytes(self) -> float:
        """Bytes of the tokens of all ranks that share experts, with their maps and weights."""
        ranks = self.layout.expert * self.layout.expert_tensor
        if not self.gathers_tokens or ranks == 1:
            return 0
        width = 2 * self.shape.hidden * self.precision.activation
        return ranks * self.local_tokens * (width + 5 * self.shape.num_experts)

    @property
    def _output_bytes(self) -> float:
        """Bytes of the last norm, logits and their float32 copy for the loss, per micro-batch."""
        logits = self._tokens * self.shape.vocab / self.layout.tensor
        return 2 * self._hidden_bytes + logits * (4 + self.precision.activation)
