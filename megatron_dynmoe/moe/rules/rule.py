"""What a router, the controller, the planner and a checkpoint have to know about a rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dynmoe.routing.route import Routing
from megatron_dynmoe.settings.config import DynMoEConfig


class Rule(ABC):
    """How logits become weights and a routing map.

    Attributes:
        knob: the name in ``first_state`` of the one number that a controller may move, or None.
        direction: 1 if the count rises with the knob, -1 if it falls.
        fall: the count in the first steps over that of most of a run, if no controller holds it.
            The planner assumes it.
        peak: the largest count of the first steps over that of step 1, if the knob acts through
            training. The planner assumes it.
        entries: the names in ``first_state``, which are those in a checkpoint.
        extra_logits: rows of the gate beyond one for each expert, X.
        by_sequence: whether it has to know the sequences. If not, and the balance loss does not
            need them either, all tokens of a micro-batch count as one.
        num_sums: how many numbers of its own the rule sums over a global batch, W.
        pools: whether these are those of all layers together if all have one knob (scope
            ``global``).
        first_state: the rule's state at the start of training, by name. The router holds each as a
            float32 buffer [number of values] that is saved with the model, beside the controller's
            sum of errors and the measured count. The knob has one value.
        fixed: the part of ``first_state`` that the user has fixed. These values replace those of a
            checkpoint.
    """

    knob: ClassVar[str | None] = None
    direction: ClassVar[int] = 1
    fall: ClassVar[float] = 1.0
    peak: ClassVar[float] = 1.0
    entries: ClassVar[tuple[str, ...]] = ()
    by_sequence: ClassVar[bool] = False
    extra_logits: int = 0
    num_sums: int = 0
    pools: ClassVar[bool] = False
    first_state: Mapping[str, tuple[float, ...]]
    fixed: Mapping[str, tuple[float, ...]]

    def __init__(self, dynmoe: DynMoEConfig, first: float | None, num_experts: int) -> None:
        """Build the rule of a run.

        Args:
            dynmoe: resolved settings.
            first: the knob's value in the first step: where the controller starts or, without one,
                the setting ``threshold``, which is None if the routing has no such setting.
            num_experts: E.

        Raises:
            SettingError: the rule cannot do what a setting asks for, such as a cap of this size.
                Settings that it never reads are refused before (``settings/routings.py``).
        """
        self.dynmoe, self.num_experts = dynmoe, num_experts
        self.first_state = {} if self.knob is None or first is None else {self.knob: (first,)}
        self.fixed = {} if dynmoe.is_controlled else self.first_state

    def start(self, logits_std: float) -> None:
        """Set what of ``first_state`` depends on the logits, before a router reads it.

        Args:
            logits_std: the standard deviation of the logits in the first step; 1 if they are
                normalized.
        """
        return  # most rules need no scale

    def cap(self, training: bool) -> int | None:
        """Return the most experts that a token may use, or None."""
        dynmoe = self.dynmoe
        return dynmoe.max_experts_per_token if training else dynmoe.inference_max_experts_per_token

    @abstractmethod
    def route(
        self,
        logits_TE: Tensor,
        state: Mapping[str, Tensor],
        *,
        theta: Tensor | None,
        num_sequences: int,
        valid_T: Tensor | None,
        training: bool,
        group: ProcessGroup | None,
    ) -> Routing:
        """Route one micro-batch, and sum over its tokens what losses and counts need.

        Args:
            logits_TE: [T, E] float32, the gate's output after z-loss; [T, E + X] with extra logits.
            state: the current values under the names of ``first_state``.
            theta: [1], the scale of normalized logits; None: they are not normalized.
            num_sequences: B; tokens are ordered as ``position * B + sequence``.
            valid_T: [T], bool, False for padding; None: no padding.
            training: False in evaluation and inference.
            group: the ranks that share the tokens of these sequences; None if there is one.
        """

    def balance_coefficient(self, state: Mapping[str, Tensor]) -> Tensor | float:
        """The coefficient of the load-balance loss; a number of the state if the rule moves it."""
        return self.dynmoe.loss_coefficients.balance

    def next_state(
        self, state: Mapping[str, Tensor], sums_RW: Tensor, next_knob_R1: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Compute the state of R routers after a global batch, without the controlled knob.

        It is written together with the controller's step: not if the optimizer skips the step, or
        if a logit was not finite.

        Args:
            state: that of the batch, by the names of ``first_state``, [R, number of values] each.
            sums_RW: [R, W] float64, ``Routing.sums_W`` over all tokens of the batch and all ranks.
            next_knob_R1: [R, 1] float32, where the controller puts the knobs for the next batch;
                None without a controller.

        Returns:
            The new values, float32, of the names that change.
        """
        return {}

    @staticmethod
    def crossings(logits_TE: Tensor, max_experts: int | None) -> Tensor:
        """Compute the values of the knob at which tokens gain or lose an expert.

        Only a rule with a controller needs this. Where the controller starts and its default gains
        are computed from it (:mod:`megatron_dynmoe.control.calibrate`).

        Args:
            logits_TE: [T, E] float64, normalized if the routing normalizes.
            max_experts: the cap, or None.

        Returns:
            [T, K - L] float64, K the most and L the fewest experts of a token (``least_experts`` in
            ``settings/routings.py``, mostly 1): for its (L+1)th, ..., K-th expert the value above
            which the token uses it or, if the count falls with the knob, below which.
        """
        raise NotImplementedError("a controlled routing needs its rule's crossings")
