"""Dispatchers that send as many rows as were routed, whatever the routing map.

Upstream's all-gather dispatcher derives every count from the map and needs no change. Its
all-to-all dispatcher takes ``tokens * moe_router_topk`` for the number of rows it sends.
"""

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class VariableKAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Upstream's all-to-all dispatcher with a measured number of rows.

    Right for every map: experts or ranks without a token, all tokens to one expert, every token to
    every expert. Costs one device-to-host copy before the permutation, as upstream's does with a
    capacity factor.
    """

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Compute the counts and splits of one dispatch.

        Args:
            routing_map: [T, E], bool.

        Returns:
            Tokens of each local expert, [number of local experts] int64.
        """
        tokens_per_local_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert
