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
from megatron_dynmoe.routing.relu import route_relu
from megatron_dynmoe.routing.route import Routing
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import SettingError


class ReLU(Rule):
    """See :mod:`megatron_dynmoe.routing.relu`."""

    knob = "log10_lambda"
    entries = ("log10_lambda",)
    direction = -1  # a larger coefficient pushes more gates to zero
    # Half of the gates are positive in step 1. Until the coefficient has grown, the language-model
    # loss may open all of them.
    peak = 2.0

    def __init__(self, dynmoe: DynMoEConfig, first: float | None, num_experts: int) -> None:
        super().__init__(dynmoe, first, num_experts)
        if dynmoe.balance_loss == "none":
            raise SettingError(
                "balance_loss",
                "none",
                f", and with {{routing}} {dynmoe.routing!r} its gradient is what holds the count",
                "use aux_loss (as in the paper), seq_aux_loss or global_aux_loss",
            )

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
        return route_relu(logits_TE, max_experts=self.cap(training), **batch)

    def balance_coefficient(self, state: Mapping[str, Tensor]) -> Tensor:
        """``lambda / k``, with which the balance loss of the gates is ``lambda`` times L1."""
        target = self.dynmoe.target_experts_per_token
        assert target is not None
        return 10.0 ** state[self.knob].squeeze() / target.targets[-1]
