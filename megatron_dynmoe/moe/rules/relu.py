"""ReLU routing (ReMoE): a token uses the experts with a positive gate; an L1 loss holds the count.

The knob is the logarithm of that loss's coefficient. It acts on the gates through training, so the
count answers some steps later (docs/rules.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dynmoe.moe.rules.rule import Rule
from megatron_dynmoe.routing.route import Routing, scale, summed
from megatron_dynmoe.routing.rules.relu import choose_open


class ReLU(Rule):
    """See :mod:`megatron_dynmoe.routing.rules.relu`."""

    knob = "log10_lambda"
    entries = ("log10_lambda",)
    direction = -1  # a larger coefficient pushes more gates to zero
    # Half of the gates are positive in step 1. Until the coefficient has grown, the language-model
    # loss may open all of them.
    peak = 2.0

    def route(
        self,
        logits_TE: Tensor,
        state: Mapping[str, Tensor],
        *,
        training: bool,
        theta: Tensor | None = None,  # there is no normalization
        group: ProcessGroup | None = None,  # no token's experts depend on another token
        **batch: Any,
    ) -> Routing:
        return route(logits_TE, max_experts=self.cap(training), **batch)

    def balance_coefficient(self, state: Mapping[str, Tensor]) -> Tensor:
        """``lambda / k``, with which the balance loss of the gates is ``lambda`` times L1."""
        target = self.dynmoe.target_experts_per_token
        assert target is not None
        return 10.0 ** state[self.knob].squeeze() / target.targets[-1]


def route(
    logits_TE: Tensor,
    *,
    max_experts: int | None = None,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
) -> Routing:
    """Choose, and sum up what the L1 loss and the counters need.

    Args:
        logits_TE: [T, E], any floating dtype. The computation is in float32, or in float64 if the
            logits are float64. Tokens are ordered as ``position * num_sequences + sequence``.
        max_experts: the cap, or None.
        num_sequences: B.
        valid_T: [T], bool, False for padding. Padding is routed, but no sum includes it.

    Returns:
        See :class:`Routing`. ``prob_sums_BE`` are sums of all gates, those that the cap has cut
        included, so that the L1 loss reaches them, too. Gates are no distribution: their entropy is
        reported as 0.

    Raises:
        ValueError: the number of tokens is not a multiple of ``num_sequences``.
    """
    logits_TE, _ = scale(logits_TE, None, num_sequences)
    chosen = choose_open(logits_TE, max_experts)
    none = logits_TE.new_zeros(())
    return summed(logits_TE, *chosen, num_sequences, valid_T, entropy=none)
