"""Once per global batch: reduce the counts, compute the next knob, write it after the step.

The update has two phases. Megatron finalizes gradients before it knows whether the optimizer will
skip the step, and it may finalize a step twice if it runs the step again.

1. *Stage*, in ``finalize_model_grads_func``: all-reduce all counts at once, apply the PI law, and
   clear the counters. A second run replaces what was staged.
2. *Commit*, after the optimizer's inner step: write the staged knob (top-p's threshold), and what
   else the rule keeps, into the routers. A skipped step has no inner step, so the state does not
   change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_dynmoe.control.agreement import check_agreement
from megatron_dynmoe.control.pi_map import MapController
from megatron_dynmoe.control.settle import ControlLaw
from megatron_dynmoe.moe.router import DynamicRouter, finished_iterations
from megatron_dynmoe.moe.rules import Rule
from megatron_dynmoe.routing.counters import RoutingStatistics, clear, pack
from megatron_dynmoe.runs.metrics import DynMoEMetricsTracker
from megatron_dynmoe.settings.config import DynMoEConfig

logger = logging.getLogger(__name__)


class GlobalBatchUpdate:
    """A ``finalize_model_grads_func`` that also moves the rule's knob.

    Every rank takes part in the one all-reduce, even if its pipeline stage has no routers. All
    ranks compute the same next knob, because the reduced counts are integers in float64, whose sums
    are exact in any order.
    """

    def __init__(
        self,
        dynmoe: DynMoEConfig,
        rule: Rule,
        controller: ControlLaw | None = None,
        finalize: Callable[..., None] | None = None,
    ) -> None:
        """Wrap the training loop's hook.

        Args:
            dynmoe: the run's resolved settings.
            rule: how logits become a routing map.
            controller: the law that moves the rule's knob; None if the knob is fixed.
            finalize: the hook to run first; None: upstream's ``finalize_model_grads``.
        """
        self.dynmoe, self.rule, self.controller = dynmoe, rule, controller
        self._keeps_state = type(self.rule).next_state is not Rule.next_state
        self.finalize = finalize or finalize_model_grads
        self.statistics: RoutingStatistics | None = None  # of the last global batch
        self._measured: Tensor | None = None
        self._staged: tuple[Tensor, ...] | None = None  # as controlled_state
        self._staged_of_rule: dict[str, Tensor] = {}  # by name, a row for each router
        self._routers: list[DynamicRouter] = []
        self._hooked: set[int] = set()
        self._warned = False

    def __call__(self, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        """End a global batch; arguments are those of upstream's ``finalize_model_grads``."""
        self.finalize(model, *args, **kwargs)
        self._routers = list(routers_of(model))
        config = get_model_config(model[0])
        statistics, maps, sums = _reduce(
            self._routers,
            config.num_layers,
            config.num_moe_experts,
            (2 * self._num_knots, self.rule.num_sums),
        )
        self.statistics = statistics
        tracker = get_moe_metrics_tracker()
        if isinstance(tracker, DynMoEMetricsTracker):
            tracker.add(statistics)
        self._stage(statistics, maps, sums)
        if not self._commit_after(config.grad_scale_func):
            self._warn_once()
            self._commit()
        if self.dynmoe.check_ranks is not None:
            self._check_ranks(config.num_layers, finished_iterations() + 1)

    def _check_ranks(self, num_layers: int, iteration: int) -> None:
        assert self.dynmoe.check_ranks is not None
        if iteration % self.dynmoe.check_ranks == 0:
            # A rule that moves its own knob does so in each layer.
            has_one_threshold = self.dynmoe.scope == "global" or bool(self.rule.fixed)
            staged = self._staged, self._staged_of_rule
            check_agreement(self._routers, *staged, num_layers, has_one_threshold, iteration)

    @property
    def _num_knots(self) -> int:
        return len(self.controller.knots) if isinstance(self.controller, MapController) else 0

    @property
    def _layers(self) -> list[int]:
        """Those of this rank's routers, from 0."""
        return [router.layer_number - 1 for router in self._routers]

    def _stage(self, statistics: RoutingStatistics, maps_L2K: Tensor, sums_LW: Tensor) -> None:
        pooled = statistics.pooled(keepdim=True)
        is_invalid = pooled.is_invalid  # [1]; the state stays as it is then
        self._measured = self._next_measured(statistics, is_invalid)
        of_scope = pooled if self.dynmoe.scope == "global" else statistics
        self._staged = self._next_controlled(of_scope, maps_L2K, is_invalid)
        self._staged_of_rule = self._next_of_rule(sums_LW, is_invalid)

    @torch.no_grad()
    def _next_measured(self, statistics: RoutingStatistics, is_invalid: Tensor) -> Tensor:
        """The mean number of experts per token of each router, [R] float64."""
        if not self._routers:
            return is_invalid.new_empty(0)
        before_R = torch.cat([router.measured for router in self._routers])
        measured_R = _of_layers(statistics.mean_experts, self._layers).nan_to_num()
        return torch.where(is_invalid, before_R, measured_R)

    @torch.no_grad()
    def _next_of_rule(self, sums_LW: Tensor, is_invalid: Tensor) -> dict[str, Tensor]:
        """What the rule keeps beside the knob, by name, [R, number of values] float32 each."""
        if not (self._keeps_state and self._routers):
            return {}
        if self.rule.pools and self.dynmoe.scope == "global":
            sums_LW = sums_LW.sum(dim=0, keepdim=True).expand_as(sums_LW)
        knobs_R1 = None
        if self._staged is not None:
            knobs_R1 = _of_layers(self._staged[0].expand(len(sums_LW)), self._layers).unsqueeze(-1)
        before = {
            name: torch.stack([router.get_buffer(name) for router in self._routers])
            for name in self.rule.first_state
        }
        after = self.rule.next_state(before, _of_layers(sums_LW, self._layers), knobs_R1)
        return {name: torch.where(is_invalid, before[name], new) for name, new in after.items()}

    def _next_controlled(
        self, statistics: RoutingStatistics, maps_L2K: Tensor, is_invalid: Tensor
    ) -> tuple[Tensor, ...] | None:
        """What the controller writes, [S] each; None without a controller.

        Args:
            statistics: [S, ...], of all layers together (S = 1) or of each layer (S = L).
        """
        if self.controller is None:
            return None
        measured = statistics.mean_experts.masked_fill(is_invalid, torch.nan)
        if self.dynmoe.controlled_quantity == "busiest_rank":
            measured = measured * statistics.rank_imbalance
        # The state of all routers is reduced with the counts, so that every rank computes the same
        # step. The mean of equal values is exact in float64. The values differ only after a run
        # with scope layer is resumed with scope global.
        target = self.dynmoe.control.target.at(finished_iterations())
        if isinstance(self.controller, MapController):
            if self.dynmoe.scope == "global":
                maps_L2K = maps_L2K.sum(dim=0, keepdim=True)
            maps_S2K = (maps_L2K / statistics.routers.unsqueeze(-1)).float()
            map_SK, integrals_SK = maps_S2K.chunk(2, dim=-1)
            map_SK, integrals_SK = self.controller.step(map_SK, integrals_SK, measured, target)
            at_mean = map(self.controller.at_mean_target, (map_SK, integrals_SK))
            return *at_mean, map_SK, integrals_SK
        knob, integral = statistics.controlled
        # If the count falls with the knob, the negative count rises with it. The controller then
        # holds the negative count at the negative target.
        if self.rule.direction < 0:
            measured, target = -measured, -target
        return self.controller.step(knob, integral, measured, target)

    def _commit_after(self, grad_scale_func: Any) -> bool:
        """Register the commit to run after the step of Megatron's optimizer.

        ``megatron.training`` sets ``grad_scale_func`` to a method of its optimizer. The torch
        optimizers inside can be reached from there. The result is False if this rank has none; then
        nothing is trained here, and no step shows whether the batch was skipped.
        """
        owner = getattr(grad_scale_func, "__self__", None)
        inner = list(_torch_optimizers(owner))
        for optimizer in inner:
            if id(optimizer) not in self._hooked:
                optimizer.register_step_post_hook(lambda *_: self._commit())
                self._hooked.add(id(optimizer))
        return bool(inner)

    def _warn_once(self) -> None:
        if self.controller is not None and not self._warned:
            logger.warning(
                "config.grad_scale_func leads to no optimizer on this rank, so a step that the "
                "optimizer skips still moves the controller"
            )
        self._warned = True

    def _commit(self) -> None:
        measured_R, staged, of_rule = self._measured, self._staged, self._staged_of_rule
        self._measured, self._staged, self._staged_of_rule = None, None, {}
        if measured_R is None or not self._routers:
            return
        with torch.no_grad():
            measured = [router.measured for router in self._routers]
            torch._foreach_copy_(measured, list(measured_R.split(1)))
            if staged is not None:
                rows = [0] * len(self._routers) if self.dynmoe.scope == "global" else self._layers
                states = zip(*(router.controlled_state for router in self._routers), strict=True)
                for state, values in zip(states, staged, strict=True):
                    torch._foreach_copy_(list(state), [values[row].view(-1) for row in rows])
            for name, new in of_rule.items():
                buffers = [router.get_buffer(name) for router in self._routers]
                torch._foreach_copy_(buffers, list(new.unbind()))


def _of_layers(values_L: Tensor, layers: list[int]) -> Tensor:
    if layers == list(range(layers[0], layers[0] + len(layers))):
        return values_L[layers[0] : layers[0] + len(layers)]
    return torch.cat([values_L[layer : layer + 1] for layer in layers])


def routers_of(model: list[torch.nn.Module]) -> Iterator[DynamicRouter]:
    """Yield this rank's routers, from all of its model chunks."""
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, DynamicRouter):
                yield module


def reduce_statistics(
    routers: list[DynamicRouter], num_layers: int, num_experts: int, evaluation: bool
) -> RoutingStatistics:
    """Sum the counts of all routers over the world, and clear them.

    The tensor has the same shape on every rank, so that stages without routers can take part. If
    several ranks count the same tokens, numerator and denominator grow by the same factor, and
    means stay right.

    Returns:
        Statistics with dimension L (all layers of the model) first, float64, on the device.
    """
    return _reduce(routers, num_layers, num_experts, evaluation=evaluation)[0]


def _reduce(
    routers: list[DynamicRouter],
    num_layers: int,
    num_experts: int,
    widths: tuple[int, int] = (0, 0),
    evaluation: bool = False,
) -> tuple[RoutingStatistics, Tensor, Tensor]:
    """Reduce statistics, maps and the sums of the rule, with one all-reduce.

    Args:
        widths: of the map of a router with K knots, 2 K, and of its rule's sums, W; 0: none.

    Returns:
        The statistics; [L, 2 K] float64, sums over routers of the thresholds of the knots, and of
        their integrals; and [L, W] float64, the rule's sums.
    """
    device = torch.device(torch.cuda.current_device())
    counters = [router.evaluation_counters if evaluation else router.counters for router in routers]
    numbers = [router.layer_number for router in routers]
    states = zip(counters, map(_state, routers), strict=True)
    of_layers = dict(zip(numbers, states, strict=True))
    packed = pack(of_layers, num_layers, num_experts, device)
    if widths[0]:
        packed = torch.cat([packed, _by_layer(numbers, _maps(routers), packed, widths[0])], dim=1)
    if widths[1]:
        sums = [each.sums_W for each in counters]
        packed = torch.cat([packed, _by_layer(numbers, sums, packed, widths[1])], dim=1)
    if counters:
        clear(counters)
    torch.distributed.all_reduce(packed)
    own, maps_L2K, sums_LW = packed.split([packed.shape[1] - sum(widths), *widths], dim=1)
    return RoutingStatistics(own), maps_L2K, sums_LW


def _state(router: DynamicRouter) -> tuple[Tensor, Tensor, Tensor]:
    """Theta offset, knob and integral, [1] float32 each."""
    offset = torch.zeros_like(router.knob) if router.theta_offset is None else router.theta_offset
    return offset.detach(), router.knob, router.integral


def _by_layer(numbers: list[int], rows: Iterable[Tensor], like: Tensor, width: int) -> Tensor:
    """Put the rows of the routers into [L, width] float64; layers without a router have zeros."""
    of_layers, empty = dict(zip(numbers, rows, strict=True)), like.new_zeros(width)
    return torch.stack([of_layers.get(number, empty) for number in range(1, len(like) + 1)])


@torch.no_grad()
def _maps(routers: list[DynamicRouter]) -> Iterable[Tensor]:
    """The thresholds of each router's knots, then their integrals, [R, 2 K] float64."""
    if not routers:
        return ()
    of_knots = [getattr(r, name) for name in ("knot_thresholds", "knot_integrals") for r in routers]
    map_2RK = torch.stack(of_knots).double().view(2, len(routers), -1)
    return map_2RK.transpose(0, 1).flatten(1)


def _torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """Yield the torch optimizers inside one of Megatron's, at any depth of wrapping."""
    if isinstance(optimizer, torch.optim.Optimizer):
        yield optimizer
        return
    for inner in getattr(optimizer, "chained_optimizers", []):
        yield from _torch_optimizers(inner)
    if not hasattr(optimizer, "chained_optimizers") and hasattr(optimizer, "optimizer"):
        yield from _torch_optimizers(optimizer.optimizer)
