"""DynMoELayer: upstream's MoE layer with a dispatcher that fits any routing map."""

from __future__ import annotations

import contextlib

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.moe.dispatch import VariableKAlltoAllTokenDispatcher
from megatron_dynmoe.moe.experts import GroupedExperts
from megatron_dynmoe.moe.flex import VariableKFlexTokenDispatcher
from megatron_dynmoe.moe.router import DynamicRouter


class DynMoELayer(MoELayer):
    """Upstream's MoELayer; only its all-to-all and its flex dispatcher are replaced.

    The forward pass is upstream's: route, dispatch preprocess (permute), dispatch, experts,
    combine, postprocess (unpermute, add the shared experts).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        *,
        rows_per_token: int | None = None,
        most_experts: int | None = None,
    ) -> None:
        """Build the layer.

        Args:
            rows_per_token: see :class:`VariableKAlltoAllTokenDispatcher`.
            most_experts: the most that any token can use; None: all of them.

        All else is as upstream.
        """
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        # Upstream chooses the dispatcher by a string, so ours cannot be passed in.
        experts = (self.num_local_experts, self.local_expert_indices, config, pg_collection)
        if config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = VariableKAlltoAllTokenDispatcher(*experts)
            self.token_dispatcher.rows_per_token = rows_per_token
        elif config.moe_token_dispatcher_type == "flex":
            self.token_dispatcher = VariableKFlexTokenDispatcher(
                *experts, most_experts=most_experts or config.num_moe_experts
            )
        if self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        if isinstance(self.router, DynamicRouter) and self.ep_group.size() > 1:
            self.router.counters.ep_group = self.ep_group
        self._tokens: Tensor | None = None  # between route and postprocess, if they are put out

    def route(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Route as upstream does, and keep the tokens if they are a part of the output."""
        routed = super().route(hidden_states, padding_mask)
        if getattr(self.router, "last_residual", None) is not None:
            self._tokens = hidden_states
        return routed

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Postprocess as upstream does, and add each token by the weight that the rule gives it.

        The tokens are those of this rank, as the output is: nothing is dispatched.
        """
        output = super().postprocess(output, shared_expert_output)
        if self._tokens is not None:
            weights_SB1 = self.router.last_residual.view(*self._tokens.shape[:-1], 1)
            output = output + (self._tokens * weights_SB1).to(output.dtype)
            self._tokens = self.router.last_residual = None  # or they would keep the graph
        return output

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Permute the tokens, as upstream does, and note the rows that this rank will receive.

        Experts that gather their rows get the tokens as they are. The first pass of a layer that is
        recomputed runs without gradients and is not counted.
        """
        router, dispatcher = self.router, self.token_dispatcher
        if isinstance(dispatcher, VariableKAlltoAllTokenDispatcher):
            dispatcher.leaves_tokens = (
                dispatcher.has_all_experts
                and isinstance(self.experts, GroupedExperts)
                and self.experts.gathers(hidden_states)
            )
        rows = super().preprocess(hidden_states, probs, routing_map)
        if (
            isinstance(router, DynamicRouter)
            and isinstance(dispatcher, VariableKAlltoAllTokenDispatcher)
            and router.counters.ep_group is not None
            and self.training
            and torch.is_grad_enabled()
        ):
            router.counters.received.append(dispatcher.rows_of_local_experts)
        return rows

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Run the experts as upstream does, without keeping rows that can be gathered again."""
        keeping: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        dispatcher = self.token_dispatcher
        if isinstance(dispatcher, VariableKAlltoAllTokenDispatcher):
            if dispatcher.leaves_tokens:
                tokens_TD, counts_E, probs_R = dispatcher.dispatch_postprocess(hidden_states, probs)
                return self.experts(tokens_TD, counts_E, probs_R, order=dispatcher.row_order)
            keeping = dispatcher.keeping_no_rows(hidden_states)
        with keeping:
            return super().routed_experts_compute(hidden_states, probs)
