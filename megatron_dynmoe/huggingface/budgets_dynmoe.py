"""Budgets: a mean number of experts per token that is asked for after the training.

The config's ``budget_curve`` holds measured points: with this threshold, the tokens of some text
used so many experts on average. A budget b between the points (b0, t0) and (b1, t1) has the
threshold t0 + (b - b0) * (t1 - t0) / (b1 - b0). It is a mean over tokens and layers: on other text
the count is another, so outputs report it (``experts_per_token``).

Exported models ship with this file, so it imports nothing from the package.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

# A budget that went through float32 may lie this far, relatively, beyond an end of the curve.
_ROUNDING = 1e-6
_CALIBRATE = "dynmoe calibrate --model DIR --data FILE --budgets 1,1.5,2,3,4 --in-place"

Curve = Sequence[dict[str, Any]]


def check_curve(curve: Any, num_experts: int) -> None:
    """Check a curve: ``experts_per_token`` and ``threshold`` of at least one point, both ascending.

    Raises:
        ValueError: it is no such list; the message names the entry.
    """
    if not isinstance(curve, (list, tuple)) or not curve:
        raise ValueError(
            f"budget_curve is {curve!r}: use a list of points, each with experts_per_token, "
            f"threshold and loss, or null. To measure one: {_CALIBRATE}"
        )
    ranges: dict[str, tuple[float, float]] = {
        "experts_per_token": (1, num_experts),
        "threshold": (0, 1),
        "loss": (0, math.inf),
    }
    for index, point in enumerate(curve):
        if not isinstance(point, dict):
            raise ValueError(f"budget_curve[{index}] is {point!r}: use names and numbers.")
        for name, (low, high) in ranges.items():
            value: Any = point.get(name)
            if name == "loss" and value is None:
                continue
            if not is_number(value) or not low <= value <= high:
                numbers = f"{low} to {high}" if high < math.inf else f"a number from {low}"
                raise ValueError(f"budget_curve[{index}].{name} is {value!r}: use {numbers}.")
    for index, (before, point) in enumerate(pairwise(curve), 1):
        for name in ("experts_per_token", "threshold"):
            if point[name] <= before[name]:
                raise ValueError(
                    f"budget_curve[{index}].{name} is {point[name]}, not above the {before[name]} "
                    f"before it: both numbers have to rise. To measure anew: {_CALIBRATE}"
                )


def threshold_at(
    curve: Curve | None, budget: Any, cap: int | None = None, name: str = "experts_per_token"
) -> float:
    """The threshold for a budget.

    Args:
        curve: as :func:`check_curve` accepts it; None: the model has none.
        budget: mean experts per token.
        cap: the most experts that a token may use, or None.
        name: what asked for the budget, for messages.

    Raises:
        ValueError: there is no curve, or the budget is beyond its ends or above the cap.
    """
    if curve is None:
        raise ValueError(
            f"{name} is {budget!r}, and the model has no budget_curve, which says the "
            f"threshold for it. To measure one, if its routing has a threshold (top_k, top_p or "
            f"dtop_p): {_CALIBRATE}"
        )
    low, high = curve[0]["experts_per_token"], curve[-1]["experts_per_token"]
    if not is_number(budget) or not low * (1 - _ROUNDING) <= budget <= high * (1 + _ROUNDING):
        raise ValueError(
            f"{name} is {budget!r}, and the model's budget_curve goes from {low:g} to "
            f"{high:g}: use a number in this range, or measure a wider one: {_CALIBRATE}"
        )
    if cap is not None and budget > cap:
        raise ValueError(
            f"{name} is {budget:g}, and no token may use more than {cap} "
            "(the cap): use less, or raise the cap and measure the curve anew."
        )
    for before, point in pairwise(curve):
        if budget <= point["experts_per_token"]:
            return _between(before, point, max(budget, low))
    return float(curve[-1]["threshold"])


def thresholds_of(
    config: Any, budgets: Any, rows: Tensor, training: bool = False
) -> Tensor | float | None:
    """The thresholds of a forward's tokens.

    Args:
        config: has ``budget_curve`` and ``cap``.
        budgets: mean experts per token: a number, or a list or tensor of one for each of B
            sequences; None: the model's own. A compiled forward cannot look at a tensor's values.
            It takes the curve's next end for those beyond one.
        rows: [B, S] or [B, S, D], for its shape and device.
        training: whether the cap of training applies.

    Returns:
        [B * S, 1] float32; one number if all are the same; None for None.

    Raises:
        ValueError: a budget cannot be honored, or there is another number of them.
    """
    if budgets is None:
        return None
    batch, length = rows.shape[:2]
    curve, cap = config.budget_curve, config.cap(training)
    if isinstance(budgets, Tensor):
        if torch.compiler.is_compiling() and curve is not None:
            values_B = _interpolated(curve, budgets).to(rows.device)
            _check_number(values_B.numel(), batch if budgets.dim() else 1)
            return values_B.expand(batch).repeat_interleave(length).unsqueeze(-1)
        budgets = budgets.tolist()
    if not isinstance(budgets, (list, tuple)):
        return threshold_at(curve, budgets, cap)
    values = [threshold_at(curve, budget, cap) for budget in budgets]
    _check_number(len(values), batch)
    if len(set(values)) == 1:
        return values[0]  # a single token is chosen for faster with a number
    values_B = torch.tensor(values, device=rows.device)
    return values_B.repeat_interleave(length).unsqueeze(-1)


class GeneratesWithBudgets(GenerationMixin):
    """``generate`` with ``experts_per_token``, and a budget for all that a model computes."""

    config: Any

    def set_budget(self, experts_per_token: float | None) -> None:
        """Let the model use so many experts per token in inference, until this is called again.

        It sets ``config.inference_experts_per_token``, which ``save_pretrained`` keeps, and which
        an ``experts_per_token`` given to ``generate`` or ``forward`` overrides.

        Args:
            experts_per_token: mean experts per token; None: the trained threshold.

        Raises:
            ValueError: the model has no ``budget_curve``, or the budget lies beyond it.
        """
        if experts_per_token is not None:
            threshold_at(self.config.budget_curve, experts_per_token, self.config.cap(False))
        self.config.inference_experts_per_token = experts_per_token
        if _in_generation_config(self.generation_config) is not None:
            self.generation_config.experts_per_token = None  # or generate would go on with that one

    def _prepare_generation_config(
        self, generation_config: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Give ``forward`` what the generation's config asks for, and refuse what cannot be."""
        config, inputs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        if inputs.get("experts_per_token") is None:
            inputs["experts_per_token"] = _in_generation_config(config)
        budgets = inputs["experts_per_token"]
        if budgets is None:
            del inputs["experts_per_token"]
            return config, inputs
        several = budgets.flatten().tolist() if isinstance(budgets, Tensor) else budgets
        for budget in several if isinstance(several, (list, tuple)) else [several]:
            threshold_at(self.config.budget_curve, budget, self.config.cap(False))
        if config.guidance_scale not in (None, 1):
            raise ValueError(
                f"guidance_scale is {config.guidance_scale}, whose second text would be read "
                "without experts_per_token: give it to model.set_budget instead."
            )
        return config, inputs

    def _expand_inputs_for_generation(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Give each beam and each sample of a sequence that sequence's budget."""
        budgets, rows = kwargs.get("experts_per_token"), kwargs.get("input_ids")
        if isinstance(budgets, (list, tuple)):
            exact = torch.float32 if self.device.type == "mps" else torch.float64
            budgets = torch.tensor(budgets, dtype=exact, device=self.device)
        if isinstance(budgets, Tensor):
            if rows is not None:
                _check_number(budgets.numel(), len(rows))
            kwargs["experts_per_token"] = budgets.flatten()
        return super()._expand_inputs_for_generation(**kwargs)

    def init_continuous_batching(self, generation_config: Any = None, **kwargs: Any) -> Any:
        """Refuse a budget, which this would ignore; else as in every model."""
        asked_for = generation_config or self.generation_config
        _refuse_for_a_server(_in_generation_config(asked_for))
        return super().init_continuous_batching(generation_config, **kwargs)

    def generate_batch(self, *args: Any, experts_per_token: Any = None, **kwargs: Any) -> Any:
        """Refuse a budget, which this would ignore; else as in every model."""
        _refuse_for_a_server(experts_per_token)
        return super().generate_batch(*args, **kwargs)


def _in_generation_config(config: Any) -> Any:
    return getattr(config, "experts_per_token", None)


def _refuse_for_a_server(budget: Any) -> None:
    if budget is not None:
        raise ValueError(
            f"experts_per_token is {budget!r}, and continuous batching has one budget for all "
            "requests: give it to model.set_budget, or as inference_experts_per_token in "
            "config.json."
        )


def _check_number(number: int, batch: int) -> None:
    if number != batch:
        raise ValueError(
            f"experts_per_token has {number} budgets, and the batch {batch} sequences: give one "
            "number for all, or one for each sequence."
        )


def _between(before: dict[str, Any], point: dict[str, Any], budget: Any) -> Any:
    """The threshold between two points, exact at both: of a number, or of each in a tensor."""
    low, high = before["experts_per_token"], point["experts_per_token"]
    share = (budget - low) / (high - low)
    return before["threshold"] * (1 - share) + point["threshold"] * share


def _interpolated(curve: Curve, budgets_B: Tensor) -> Tensor:
    """The thresholds of a tensor of budgets, without a look at them: float32."""
    exact_B = budgets_B.flatten().double()
    values_B = torch.full_like(exact_B, curve[0]["threshold"])
    for before, point in pairwise(curve):
        beyond = exact_B > before["experts_per_token"]
        values_B = torch.where(beyond, _between(before, point, exact_B), values_B)
    return values_B.clamp(max=curve[-1]["threshold"]).float()


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
