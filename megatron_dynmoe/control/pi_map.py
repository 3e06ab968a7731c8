"""The control law for a target that is drawn anew for every batch: it steers a map.

The map gives a threshold for every target. It is held at a few targets, the *knots*, and read in
between (:mod:`megatron_dynmoe.routing.threshold_map`). Each knot has a PI controller of its own,
which gets a share of the error. ``docs/controller.md`` derives the shares and the stability.

Letters: K knots, S maps (1, or the number of layers if each layer has its own).
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.control.pi import PIController
from megatron_dynmoe.routing.threshold_map import ordered, read
from megatron_dynmoe.settings.distribution import place_between


@dataclass(frozen=True)
class MapController:
    """Each knot is a :class:`PIController`; the error ``e`` of a batch is shared between two.

    A target lies between two knots, whose weights ``w`` in the map add up to 1. Knot k gets

        e_k = e w_k / sum_j w_j^2,

    so that its response would remove the whole error at this target if the gains did. Then

        S_k <- order(clamp(S_k + e_k))
        m_k  = order(clamp(threshold_0k + K_pk e_k + K_ik S_k)).

    ``order`` keeps the map from falling: it takes the nearest map that does not, with the weights
    ``1 / K_ik`` (for the sums, the map is ``threshold_0k + K_ik S_k``). With one knot it is the law
    of :class:`PIController` to the last bit.

    Attributes:
        knots: K targets in experts per token, increasing.
        laws: the controller of each. Their bounds are the same.
        direction: 1 if the count rises with the threshold, -1 if it falls. Then the map falls.
    """

    knots: tuple[float, ...]
    laws: tuple[PIController, ...]
    direction: int = 1

    @property
    def initial_map(self) -> tuple[float, ...]:
        """The threshold of each knot before the first batch."""
        return tuple(law.initial_threshold for law in self.laws)

    @property
    def initial_threshold(self) -> float:
        """The threshold at the mean target before the first batch."""
        first_K = torch.tensor(self.initial_map, dtype=torch.float64)
        return float(self.at_mean_target(first_K))

    def at_mean_target(self, map_SK: Tensor) -> Tensor:
        """The thresholds of evaluations, [S]: those in the middle of the range of targets."""
        return read(map_SK, place_between(self.knots, (self.knots[0] + self.knots[-1]) / 2))

    @torch.no_grad()
    def step(
        self, map_SK: Tensor, integrals_SK: Tensor, measured_S: Tensor, target: float
    ) -> tuple[Tensor, Tensor]:
        """Compute one update, after one global batch. The result is new tensors.

        Maps whose measurement is not finite keep their state, as in :meth:`PIController.step`.

        Args:
            map_SK: [S, K] float32, the thresholds before this batch.
            integrals_SK: [S, K] float32, the sums of the errors of each knot; 0 at the start.
            measured_S: [S] floating point, mean experts per token over the global batch.
            target: the target of that batch, in mean experts per token.

        Returns:
            The next map and integrals, [S, K] float32 each.
        """
        law = _stacked(self.laws, map_SK.device)
        errors_SK = self._shared(measured_S, target)
        sums_SK = self._ordered_sums(law, law.integral_after(errors_SK, integrals_SK))
        next_SK = self._ordered(law, law.threshold_at(errors_SK, sums_SK))
        is_finite_S1 = (measured_S - measured_S == 0).unsqueeze(-1)
        return (
            torch.where(is_finite_S1, next_SK, map_SK),
            torch.where(is_finite_S1, sums_SK, integrals_SK),
        )

    @torch.no_grad()
    def map_after(self, measured_S: Tensor, target: float, integrals_SK: Tensor) -> Tensor:
        """The map after a batch whose error the sums include already, [S, K] float32."""
        law = _stacked(self.laws, integrals_SK.device)
        return self._ordered(law, law.threshold_at(self._shared(measured_S, target), integrals_SK))

    def _shared(self, measured_S: Tensor, target: float) -> Tensor:
        """Divide the error between the two knots around the target, [S, K] float32."""
        error_S = (self.direction * (target - measured_S) / self.laws[0].num_experts).float()
        knot, way = place_between(self.knots, target)
        errors_SK = error_S.new_zeros(*error_S.shape, len(self.knots))
        size = (1 - way) ** 2 + way**2
        errors_SK[..., knot] = error_S * ((1 - way) / size)
        if way:
            errors_SK[..., knot + 1] = error_S * (way / size)
        return errors_SK

    def _ordered(self, law: Any, map_SK: Tensor) -> Tensor:
        return self.direction * ordered(self.direction * map_SK, 1 / law.integral_gain)

    def _ordered_sums(self, law: Any, sums_SK: Tensor) -> Tensor:
        """The sums whose map is in order; those that are in order keep every bit."""
        if len(self.knots) == 1:
            return sums_SK
        settled_SK = law.initial_threshold + law.integral_gain * sums_SK
        ordered_SK = self._ordered(law, settled_SK)
        moved_SK = (ordered_SK - law.initial_threshold) / law.integral_gain
        return torch.where(ordered_SK == settled_SK, sums_SK, moved_SK)


@dataclass(frozen=True)
class _Stacked(PIController):
    """Several laws as one, whose numbers are tensors over the knots, [K] float32."""

    bounds: tuple[Tensor, Tensor] | None = None

    @property
    def integral_bounds(self) -> Any:
        return self.bounds


@lru_cache
def _stacked(laws: tuple[PIController, ...], device: torch.device) -> Any:
    def of_knots(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=device)

    names = ("initial_threshold", "proportional_gain", "integral_gain")
    numbers: Any = {name: of_knots(getattr(law, name) for law in laws) for name in names}
    low, high = zip(*(law.integral_bounds for law in laws), strict=True)
    return dataclasses.replace(
        _Stacked(**vars(laws[0])), **numbers, bounds=(of_knots(low), of_knots(high))
    )
