"""The control law of DTop-p: a positional PI controller on a rule's knob, the threshold.

The law is a pure elementwise function. State and measurement have the shape [S]. S is 1 if one
threshold serves all layers (scope ``global``), or the number of layers if each layer has its own
threshold (scope ``layer``).
``docs/controller.md`` derives the stability limits and the default gains.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# What the law takes for the error of a batch. See PIController.
SHARE, RELATIVE, SIGN = "share", "relative", "sign"
# A relative error counts no more than this, above the target as below: twice the target is only far
# off, as no experts at all are.
MOST_RELATIVE_ERROR = 1.0


@dataclass(frozen=True)
class PIController:
    """``threshold_{t+1} = clamp(threshold_0 + K_p e_t + K_i sum_{i<=t} e_i)``.

    The error ``e = (target - measured) / num_experts`` is the missing share of the experts. While
    tokens use fewer experts than the target, the error is positive and raises the threshold.

    If the knob acts through training, the count starts far off the target and answers late. The
    error is then ``relative``, ``(target - measured) / target``, at most 1 in size, so that the
    gains depend neither on N nor on the target, and a dense start moves the knob by a known amount;
    or it is the ``sign`` of that. With the sign and ``K_p`` = 0 the knob moves by ``K_i`` in every
    step.

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
        errors: ``share`` (above), ``relative`` or ``sign``.

    ``DynMoEConfig.resolve`` has checked the values: the bounds lie in the knob's range with the
    initial threshold between them, and no gain is negative.
    """

    num_experts: int
    initial_threshold: float
    proportional_gain: float
    integral_gain: float
    min_threshold: float = 0.0
    max_threshold: float = 1.0
    errors: str = SHARE

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
        error = self.error(measured, target).to(integral.dtype)
        next_integral = self.integral_after(error, integral)
        next_threshold = self.threshold_at(error, next_integral)
        finite = error - error == 0  # two kernels; isfinite takes four
        return (
            torch.where(finite, next_threshold, threshold),
            torch.where(finite, next_integral, integral),
        )

    def error(self, measured: Tensor, target: Tensor | float) -> Tensor:
        """The error of a batch, [S], in the dtype of the measurement."""
        missing = target - measured
        if self.errors == SIGN:
            return missing.sign()
        if self.errors == RELATIVE:  # both are negative if the count falls with the knob
            size = target.abs() if isinstance(target, Tensor) else abs(target)
            return (missing / size).clamp(-MOST_RELATIVE_ERROR, MOST_RELATIVE_ERROR)
        return missing / self.num_experts

    def integral_after(self, error: Tensor, integral: Tensor) -> Tensor:
        """The sum that includes the last error, within its bounds, [S] float32."""
        return (integral + error).clamp(*self.integral_bounds)

    def threshold_at(self, error: Tensor, integral: Tensor) -> Tensor:
        """The threshold for the last error and the sum that includes it, [S] float32."""
        unbounded = (
            self.initial_threshold + self.proportional_gain * error + self.integral_gain * integral
        )
        return unbounded.clamp(self.min_threshold, self.max_threshold)
