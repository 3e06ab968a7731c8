"""The control law of DTop-p: a positional PI controller on the top-p threshold.

The law is a pure elementwise function. State and measurement have the shape [S]. S is 1 if one
threshold serves all layers (scope ``global``), or the number of layers if each layer has its own
threshold (scope ``layer``).
``docs/controller.md`` derives the stability limits and the default gains.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PIController:
    """``threshold_{t+1} = clamp(threshold_0 + K_p e_t + K_i sum_{i<=t} e_i)``.

    The error ``e = (target - measured) / num_experts`` is the missing share of the experts. While
    tokens use fewer experts than the target, the error is positive and raises the threshold.

    The DTop-p paper states neither bounds nor anti-windup. Here the sum is clamped to the range
    in which the integral term alone keeps the threshold within its bounds. A saturated threshold
    therefore leaves its bound at the first error of the opposite sign. The sum also stays small, so
    that float32 neither drifts nor stalls in a run of any length.

    Attributes:
        num_experts: routed experts of a layer.
        initial_threshold: ``threshold_0``, the threshold at zero error and zero sum.
        proportional_gain: ``K_p``, threshold per unit of error.
        integral_gain: ``K_i``, threshold per unit of summed error. 0 keeps the sum at 0.
        min_threshold: lower bound of the threshold.
        max_threshold: upper bound of the threshold.

    Raises:
        ValueError: a value is out of its range.
    """

    num_experts: int
    initial_threshold: float
    proportional_gain: float
    integral_gain: float
    min_threshold: float = 0.0
    max_threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(
                f"num_experts is {self.num_experts}: the controller needs at least 1 routed expert"
            )
        if not 0 <= self.min_threshold < self.max_threshold <= 1:
            raise ValueError(
                f"min_threshold is {self.min_threshold} and max_threshold is "
                f"{self.max_threshold}: set 0 <= min_threshold < max_threshold <= 1"
            )
        if not self.min_threshold <= self.initial_threshold <= self.max_threshold:
            raise ValueError(
                f"initial_threshold is {self.initial_threshold}: it must lie between min_threshold "
                f"{self.min_threshold} and max_threshold {self.max_threshold}; widen them or use "
                "the computed value"
            )
        for name in ("proportional_gain", "integral_gain"):
            gain = getattr(self, name)
            if not (math.isfinite(gain) and gain >= 0):
                raise ValueError(
                    f"{name} is {gain}: it must be finite and not negative, since a larger "
                    "threshold never selects fewer experts; use the computed value"
                )

    @property
    def integral_bounds(self) -> tuple[float, float]:
        """The range of the sum for which the integral term alone stays within the bounds."""
        if self.integral_gain == 0:
            return 0.0, 0.0
        return (
            (self.min_threshold - self.initial_threshold) / self.integral_gain,
            (self.max_threshold - self.initial_threshold) / self.integral_gain,
        )

    @torch.no_grad()
    def step(
        self, threshold: Tensor, integral: Tensor, measured: Tensor, target: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Compute one update, after one global batch. The result is new tensors.

        If an error is not finite, its element keeps its state. This happens if no token was counted
        (0 / 0) or the layer has no experts.

        Args:
            threshold: [S] float32, the threshold during the measured batch.
            integral: [S] float32, the sum of the errors before this batch; 0 at the start.
            measured: [S] floating point, mean experts per token over the global batch.
            target: the target for that batch, in mean experts per token; a number, or [S].

        Returns:
            The next threshold and integral, [S] float32 each.
        """
        error = ((target - measured) / self.num_experts).to(integral.dtype)
        next_integral = (integral + error).clamp(*self.integral_bounds)
        next_threshold = (
            self.initial_threshold
            + self.proportional_gain * error
            + self.integral_gain * next_integral
        ).clamp(self.min_threshold, self.max_threshold)
        finite = error.isfinite()
        return (
            torch.where(finite, next_threshold, threshold),
            torch.where(finite, next_integral, integral),
        )
