"""A dispatcher that sends as many rows as were routed, for any routing map.

Upstream's all-gather dispatcher derives every count from the map and needs no change. Upstream's
all-to-all dispatcher assumes that it sends ``tokens * moe_router_topk`` rows.
"""

import contextlib
import math
from functools import partial

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_dynmoe.moe.permute import (
    RowOrder,
    fit_rows,
    order_rows,
    permute,
    rows_of,
    unpermute,
    weights_of,
)
from megatron_dynmoe.moe.recompute import computed_again, recomputes_activations
from megatron_dynmoe.routing.counters import RoutingCounters


class VariableKAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Upstream's all-to-all dispatcher with a measured number of rows.

    It is correct for every map: experts or ranks without a token, all tokens at one expert, every
    token at every expert. It costs one device-to-host copy before the permutation, as upstream's
    does with a capacity factor. It needs no copy if it makes room for ``rows_per_token`` rows per
    token instead of counting them; that requires a single rank, and experts that take their counts
    on the device. Tokens that do not fit are left out, and ``counters`` tell of it. On a single
    rank the rows are already in the order of the experts, so it skips upstream's second
    permutation.

    Attributes:
        rows_per_token: how many there is room for in the mean over tokens; None: rows are counted.
        counters: where overflows are counted; None: no token has more than ``rows_per_token``.
        rows_of_local_experts: of the last dispatch, [number of local experts] int64 on the device.
    """

    rows_per_token: float | None = None
    counters: RoutingCounters | None = None
    rows_of_local_experts: torch.Tensor
    # The first two are upstream's; row_order is kept between dispatch and combine.
    num_out_tokens: torch.Tensor | int
    tokens_per_expert: torch.Tensor | None
    row_order: RowOrder | None
    # Those that are permuted, [T, D], from dispatch to the experts if they gather rows again.
    tokens: torch.Tensor | None = None
    # Whether the experts of this pass take the tokens and their order in place of rows.
    leaves_tokens: bool = False

    def make_room(self, rows_per_token: float, counters: RoutingCounters) -> None:
        """Make room in the passes that follow for this mean, and count those that need more."""
        self.rows_per_token, self.counters = rows_per_token, counters

    def count_rows(self) -> None:
        """Count the rows in the passes that follow."""
        self.rows_per_token = self.counters = None

    def _room(self, num_tokens: int) -> int | None:
        if self.rows_per_token is None:
            return None
        return math.ceil(num_tokens * self.rows_per_token)

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Compute the counts and splits of one dispatch.

        Args:
            routing_map: [T, E], bool.

        Returns:
            The number of tokens of each local expert, [number of local experts] int64.
        """
        tokens_per_local_expert = super().preprocess(routing_map)
        self.rows_of_local_experts = tokens_per_local_expert
        room = self._room(len(routing_map))
        self.num_out_tokens = routing_map.sum() if room is None else room
        if room is None:
            self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the rows that this rank sends, and put them in the order of the experts.

        Args:
            hidden_states: [..., D].
            routing_map: [T, E], bool.
            probs: [T, E], the weights.

        Returns:
            Rows [R, D], or the tokens if the experts gather them, and the weights of the rows, [R].
        """
        if self.config.moe_permute_fusion:  # Transformer Engine's kernels
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        room = self._room(len(routing_map))
        if self.counters is not None and room is not None:
            routing_map, overflows = fit_rows(routing_map, room)
            self.counters.sums.overflows.add_(overflows)
        self.hidden_shape = hidden_states.shape
        self.probs, self.routing_map = probs, routing_map
        tokens_TD = hidden_states.reshape(-1, self.hidden_shape[-1])
        self.tokens_per_expert = self.preprocess(routing_map)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_permutation_1", self.tokens_per_expert
        )
        self.row_order = order_rows(
            routing_map, int(self.num_out_tokens), all_used=self.rows_per_token is None
        )
        if self.leaves_tokens:
            return tokens_TD, weights_of(probs, self.row_order)
        self.tokens = tokens_TD.detach() if self.gathers_again else None
        return permute(tokens_TD, probs, self.row_order)

    @property
    def gathers_again(self) -> bool:
        """Whether the backward pass gathers the rows again: they came from no other rank."""
        return self.has_all_experts and recomputes_activations(self.config)

    @property
    def has_all_experts(self) -> bool:
        """Whether no row travels, and the order of rows is ours."""
        return self.ep_size * self.tp_size == 1 and not self.config.moe_permute_fusion

    def keeping_no_rows(self, rows_RD: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Let the experts, which run within, keep the tokens instead of their rows, if possible."""
        tokens_TD, self.tokens = self.tokens, None
        if tokens_TD is None:
            return contextlib.nullcontext()
        assert self.row_order is not None
        return computed_again(rows_RD, partial(rows_of, tokens_TD, self.row_order))

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rows, tokens of each local expert and weights, as the experts take them."""
        if self.ep_size * self.tp_size > 1:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        tokens_per_expert, self.tokens_per_expert = self.tokens_per_expert, None
        assert tokens_per_expert is not None
        return global_input_tokens, tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Bring the experts' rows into the order in which they are sent back."""
        if self.ep_size * self.tp_size > 1:
            return super().combine_preprocess(hidden_states)
        return hidden_states

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Add up each token's rows and the output of its shared experts."""
        if self.config.moe_permute_fusion:
            return super().combine_postprocess(permutated_local_input_tokens)
        row_order, self.row_order = self.row_order, None
        assert row_order is not None
        output = permutated_local_input_tokens
        if not self.leaves_tokens:
            output = unpermute(output, row_order)
        output = output.view(self.hidden_shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Copy counts to the host and wait, as upstream does, but only if rows are counted."""
        if self.rows_per_token is not None:
            return tokens_per_expert
        return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
