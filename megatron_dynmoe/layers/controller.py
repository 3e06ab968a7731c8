"""DTop-p's controller for models in plain PyTorch: counts enter, thresholds move."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dynmoe.control.pi import PIController
from megatron_dynmoe.control.settle import settle
from megatron_dynmoe.layers.router import Router
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import SettingError

_NAMES = {"target_experts_per_token": "target"}  # of settings, as the controller calls them


class Controller:
    """Holds the mean number of experts per token of some routers at a target.

    All routers of a model share one threshold, as DTop-p has it; for one each, make a controller
    for each layer. Make it before a checkpoint is loaded: it sets the routers' first threshold.
    ``docs/controller.md`` derives the law and its default gains.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float | str,
        *,
        proportional_gain: float | str | None = None,
        integral_gain: float | str | None = None,
        initial_threshold: float | str | None = None,
        min_threshold: float | None = None,
        max_threshold: float | None = None,
    ) -> None:
        """Take over the routers in a model.

        What is None has the default of the training, which is ``auto`` for gains and the first
        threshold: they are computed from the routers.

        Args:
            target: mean experts per token, or a schedule over updates such as ``"0:8,1000:2"``.
            proportional_gain: K_P, a number or ``auto``.
            integral_gain: K_I, a number or ``auto``.
            initial_threshold: the threshold before the first update, a number or ``auto``.
            min_threshold: no update sets a lower one.
            max_threshold: no update sets a higher one.

        Raises:
            ValueError: the model has no router of :class:`megatron_dynmoe.Router`, or routers that
                cannot share a threshold; or a setting makes no sense. The message names it.
        """
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        if not self.routers:
            raise ValueError(
                "the model has no megatron_dynmoe.Router: give a model, or a layer, that has one."
            )
        kinds = {
            (
                *router.weight.shape,
                router.settings.max_experts_per_token,
                router.settings.normalization,
                router.init_std,
            )
            for router in self.routers
        }
        if len(kinds) > 1:
            raise ValueError(
                f"the model's {len(self.routers)} routers differ in size, cap, normalization or "
                "init_std, so one threshold is not the same in each: make a controller for each "
                "layer."
            )
        router = self.routers[0]
        num_experts, hidden_size = router.weight.shape
        sizes = SimpleNamespace(
            num_moe_experts=num_experts, hidden_size=hidden_size, init_method_std=router.init_std
        )
        try:
            given = DynMoEConfig.from_dict(
                {
                    "routing": "dtop_p",
                    "target_experts_per_token": target,
                    "max_experts_per_token": router.settings.max_experts_per_token,
                    "normalization": router.settings.normalization,
                    "proportional_gain": proportional_gain,
                    "integral_gain": integral_gain,
                    "initial_threshold": initial_threshold,
                    "min_threshold": min_threshold,
                    "max_threshold": max_threshold,
                },
                source="Controller",
            )
            if given.drawn_target is not None:
                raise SettingError(
                    "target_experts_per_token",
                    given.drawn_target,
                    ", and only trainings with Megatron draw targets",
                    "give a number, or a schedule such as 0:8,1000:2",
                )
            settled, law = settle(given.resolve(num_experts), sizes)
        except SettingError as error:
            raise ValueError(error.worded(lambda name: _NAMES.get(name, name))) from None
        assert isinstance(law, PIController)
        self.law, self.target = law, settled.control.target
        self.updates = 0
        self.measured = torch.full_like(router.threshold, torch.nan)
        self.integral = torch.zeros_like(router.threshold)
        self._set(torch.full_like(router.threshold, law.initial_threshold))

    @property
    def threshold(self) -> Tensor:
        """The threshold that all routers have, [1] float32."""
        return self.routers[0].threshold

    @torch.no_grad()
    def update(self, counts: Tensor | Iterable[Tensor]) -> None:
        """Move the threshold after a step of the optimizer; the host waits for no device.

        Args:
            counts: the experts of each token, of all layers and micro-batches since the last
                update: a tensor of any shape, or several. 0 stands for padding.

        Raises:
            ValueError: there are no counts, or they are no whole numbers, as in a layer's whole
                output.
        """
        several = [counts] if isinstance(counts, Tensor) else list(counts)
        if not several:
            raise ValueError(
                "counts is empty: give the experts of each token of at least one layer."
            )
        for one in several:
            if not isinstance(one, Tensor) or one.is_floating_point():
                kind = one.dtype if isinstance(one, Tensor) else type(one).__name__
                raise ValueError(
                    f"counts has values of {kind}: give the output's experts_per_token, tensors of "
                    "whole numbers, one for each token."
                )
        experts, tokens = (
            torch.stack([sums.double() for sums in each]).sum()
            for each in zip(*((one.sum(), (one > 0).sum()) for one in several), strict=True)
        )
        self.measured = (experts / tokens).float().reshape(1).to(self.threshold.device)
        threshold, self.integral = self.law.step(
            self.threshold,
            self.integral.to(self.threshold.device),
            self.measured,
            self.target.at(self.updates),
        )
        self._set(threshold)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What goes on after a restart, beside the thresholds, which are the model's."""
        return {"integral": self.integral, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.integral, self.updates = state["integral"], state["updates"]

    def _set(self, threshold: Tensor) -> None:
        for router in self.routers:
            router.threshold.copy_(threshold)
