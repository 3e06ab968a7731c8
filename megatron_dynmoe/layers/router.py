"""A router that keeps its threshold, for models in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_dynmoe.layers.moe import Choice, Gate
from megatron_dynmoe.routing.keep_dtype import KeepDtype
from megatron_dynmoe.settings.config import DynMoEConfig


class Router(KeepDtype, Gate):
    """Sends each token to the fewest experts whose probabilities exceed a threshold.

    The defaults are DTop-p's, for which a :class:`~megatron_dynmoe.Controller` moves the threshold.
    Dynamic MoE has a fixed one: ``threshold=0.4, normalization="none", weights="raw"``, in a layer
    with ``Losses(balance_loss_coeff=1e-2, dynamic_loss_coeff=1e-4)``.

    Attributes:
        threshold: [1] float32, a buffer, which is saved with the model and never cast.
        settings: the checked settings.
    """

    threshold: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        threshold: float = 0.4,
        max_experts_per_token: int | None = None,
        normalization: str = "drn",
        weights: str = "renormalized",
        init_std: float = 0.02,
    ) -> None:
        """Make a router.

        Args:
            threshold: cumulative probability in [0, 1]; a controller replaces it by its first.
            max_experts_per_token: the cap; None: no cap.
            normalization: ``drn`` or ``none``.
            weights: ``renormalized`` or ``raw``.
            init_std: standard deviation of the gate's first weights.

        Raises:
            ValueError: a setting makes no sense; the message names it.
        """
        given = DynMoEConfig(
            routing="top_p",
            threshold=threshold,
            max_experts_per_token=max_experts_per_token,
            normalization=normalization,
            weights=weights,
        )
        settings = given.resolve(num_experts)
        super().__init__(hidden_size, num_experts, normalization == "drn")
        self.settings, self.init_std = settings, init_std
        nn.init.normal_(self.weight, std=init_std)
        self.register_buffer("threshold", torch.tensor([threshold], dtype=torch.float32))

    def choice(self) -> Choice:
        """See :class:`~megatron_dynmoe.layers.moe.Choice`."""
        return Choice(
            self.threshold,
            self.settings.max_experts_per_token,
            normalized=self.settings.normalization == "drn",
            renormalize=self.settings.weights == "renormalized",
        )
