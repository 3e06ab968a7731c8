"""What a run reports: names, reductions, and the places they are written to.

The statistics come reduced from :mod:`megatron_dynmoe.control.update`. Once per iteration,
upstream's metrics tracker takes them to the console, TensorBoard and W&B.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    set_moe_metrics_tracker,
)
from megatron.training import get_args, get_timers
from megatron.training.training import num_floating_point_operations

from megatron_dynmoe.routing.counters import RoutingStatistics
from megatron_dynmoe.runs import metric_names as names
from megatron_dynmoe.runs.tensorboard import LayerHistory, knob_of, tensorboard_layout
from megatron_dynmoe.settings.config import DynMoEConfig


class RoutingSummary(NamedTuple):
    """Means over the tokens that the statistics cover.

    Lists have one entry per layer, which is NaN for layers without experts.
    """

    experts_per_token: float
    std_experts_per_token: float  # over tokens and layers
    experts_per_token_by_layer: list[float]
    threshold: float  # mean over layers
    threshold_by_layer: list[float]
    theta_by_layer: list[float]
    balance_loss: float
    dynamic_loss: float
    max_over_mean_load: (
        float  # the busiest expert of a layer against that layer's mean, worst layer
    )
    median_load: float  # the same in the median layer, and at the 95th percentile of layers
    high_load: float
    max_violation: float  # the same less 1, mean over layers
    rank_imbalance: float  # rows of the busiest expert-parallel rank over the mean rank's
    busiest_rank_rows: float  # of a dispatch; NaN without expert parallelism
    share_at_cap: float
    share_not_finite: float  # share of tokens with a logit that is NaN or infinite
    first_not_finite: int  # number of the first layer with such a token, 0 if there is none
    tokens: float  # token-layer pairs / MoE layers: tokens that entered the model

    @property
    def has_ranks(self) -> bool:
        """Whether rows travelled between expert-parallel ranks."""
        return not math.isnan(self.busiest_rank_rows)

    @property
    def busiest_rank_experts(self) -> float:
        """Experts per token, if every rank had as many rows as the busiest one."""
        return self.experts_per_token * self.rank_imbalance


def summarize(statistics: RoutingStatistics) -> RoutingSummary:
    """Turn reduced statistics [L, ...] into numbers on the host in one device-to-host copy."""
    layer = RoutingStatistics(statistics.packed.cpu())
    has_experts = layer.routers > 0
    pooled = layer.pooled()
    mean = pooled.mean_experts
    variance = pooled.squared_experts / pooled.tokens - mean.square()
    load_LE = layer.assignments[has_experts]
    load_L = load_LE.amax(dim=-1) / load_LE.mean(dim=-1)
    if not len(load_L):
        load_L = torch.full((1,), torch.nan)
    return RoutingSummary(
        experts_per_token=mean.item(),
        std_experts_per_token=variance.clamp(min=0).sqrt().item(),
        experts_per_token_by_layer=layer.mean_experts.tolist(),
        threshold=(pooled.knobs / pooled.routers).item(),
        threshold_by_layer=(layer.knobs / layer.routers).tolist(),
        theta_by_layer=layer.thetas.tolist(),
        balance_loss=(pooled.balance_loss / pooled.micro_batches).item(),
        dynamic_loss=(pooled.dynamic_loss / pooled.micro_batches).item(),
        max_over_mean_load=load_L.max().item(),
        median_load=load_L.quantile(0.5).item(),
        high_load=load_L.quantile(0.95).item(),
        max_violation=load_L.mean().item() - 1,
        rank_imbalance=pooled.rank_imbalance.item(),
        busiest_rank_rows=(pooled.busiest_rows / pooled.dispatches).item(),
        share_at_cap=(pooled.tokens_at_cap / pooled.tokens).item(),
        share_not_finite=(pooled.not_finite / pooled.tokens).item(),
        first_not_finite=next((n for n, count in enumerate(layer.not_finite, 1) if count), 0),
        tokens=(pooled.tokens / has_experts.sum()).item(),
    )


def scalars(
    summary: RoutingSummary, dynmoe: DynMoEConfig, iteration: int
) -> Iterator[tuple[str, float]]:
    """Names and values for TensorBoard and W&B, of the step that ends as ``iteration``."""
    yield names.EXPERTS, summary.experts_per_token
    if dynmoe.target_experts_per_token is not None:  # logged, as a resumed run may change it
        yield names.TARGET, dynmoe.target_experts_per_token.at_step(iteration)
    yield names.STD_EXPERTS, summary.std_experts_per_token
    if knob_of(dynmoe) is not None:
        yield names.THRESHOLD, summary.threshold
    yield names.BALANCE_LOSS, summary.balance_loss
    yield names.DYNAMIC_LOSS, summary.dynamic_loss
    yield names.MAX_OVER_MEAN_LOAD, summary.max_over_mean_load
    yield names.MEDIAN_LOAD, summary.median_load
    yield names.HIGH_LOAD, summary.high_load
    yield names.MAX_VIOLATION, summary.max_violation
    if summary.has_ranks:
        yield names.BUSIEST_RANK, summary.busiest_rank_experts
        yield names.BUSIEST_RANK_ROWS, summary.busiest_rank_rows
    if dynmoe.max_experts_per_token is not None:
        yield names.SHARE_AT_CAP, summary.share_at_cap
    if summary.first_not_finite:
        yield names.SHARE_NOT_FINITE, summary.share_not_finite
    by_layer = {names.EXPERTS_OF_LAYER: summary.experts_per_token_by_layer}
    if dynmoe.normalization == "drn":
        by_layer[names.THETA_OF_LAYER] = summary.theta_by_layer
    if dynmoe.scope == "layer":
        by_layer[names.THRESHOLD_OF_LAYER] = summary.threshold_by_layer
    for quantity, values in by_layer.items():
        for index, value in enumerate(values):
            if value == value:  # the values of layers without experts are NaN
                yield names.of_layer(quantity, index + 1), value


class DynMoEMetricsTracker(MoEMetricsTracker):
    """Upstream's tracker, which here also reports the routing.

    The training loop calls ``report`` on every rank after every iteration. Only the last rank holds
    writers and prints, so only that rank reads the statistics.
    """

    def __init__(self, dynmoe: DynMoEConfig) -> None:
        super().__init__()
        self.dynmoe = dynmoe
        self._step: RoutingStatistics | None = None
        self._interval: RoutingStatistics | None = None
        self._num_samples = 0
        self._targets: list[float] = []  # of the steps of the interval, if they are drawn
        self._has_layout = False
        self._history = LayerHistory()

    def add(self, statistics: RoutingStatistics) -> None:
        """Keep the statistics of one global batch; a re-run of the same batch replaces them.

        Steps that the optimizer skips are reported too: their tokens were routed and computed.
        """
        self._step = statistics

    def report(
        self,
        *args: Any,
        iteration: int,
        writer: Any = None,
        wandb_writer: Any = None,
        **kwargs: Any,
    ) -> str:
        """Report upstream's metrics and the routing; return the addition to the console line."""
        line = super().report(
            *args, iteration=iteration, writer=writer, wandb_writer=wandb_writer, **kwargs
        )
        args_of_run = get_args()
        if self._step is not None:
            step, self._step = self._step, None
            self._interval = step if self._interval is None else self._interval + step
            self._num_samples += get_current_global_batch_size()  # the batch size may ramp up
            if self.dynmoe.drawn_target is not None:
                self._targets.append(self.dynmoe.drawn_target.at_step(iteration))
            if iteration % args_of_run.tensorboard_log_interval == 0:
                self._write_step(step, iteration, writer, wandb_writer)
        if iteration % args_of_run.log_interval == 0 and self._interval is not None:
            if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                line += self._report_interval(args_of_run, iteration, writer, wandb_writer)
            self._interval, self._num_samples, self._targets = None, 0, []
        evaluates = args_of_run.eval_interval and iteration % args_of_run.eval_interval == 0
        if writer is not None and (evaluates or iteration == args_of_run.train_iters):
            self._write_heat_map(iteration, writer)
        return line

    def _report_interval(self, args: Any, iteration: int, writer: Any, wandb_writer: Any) -> str:
        assert self._interval is not None
        summary = summarize(self._interval)
        # Upstream stops this timer during evaluation and checkpoints, and resets it after us.
        seconds = get_timers()("interval-time").elapsed(reset=False)
        # Duplicates over tensor-parallel ranks cancel in a mean, but not in this sum. So it counts
        # samples.
        tokens = self._num_samples * args.seq_length
        flops = floating_point_operations(args, self._num_samples, summary.experts_per_token)
        rates = {
            names.TOKENS_PER_SECOND: tokens / seconds,
            names.TFLOPS_PER_SECOND: flops / seconds / 1e12,
        }
        if summary.has_ranks:
            rates[names.SHARE_WAITING] = share_of_step_waiting(args, summary)
        self._write(rates, iteration, writer, wandb_writer)
        self._history.add(iteration, summary.experts_per_token_by_layer)
        print(_layer_table(summary, self.dynmoe), flush=True)
        target = self.dynmoe.target_experts_per_token
        aim = f" (target {target.at_step(iteration):g})" if target is not None else ""
        if self._targets:
            aim = f" (target {sum(self._targets) / len(self._targets):.4f})"
        cap = self.dynmoe.max_experts_per_token
        not_finite = (
            f" tokens with NaN or infinite logits: {summary.share_not_finite:.2%}, "
            f"from layer {summary.first_not_finite} |"
            if summary.first_not_finite
            else ""
        )
        waiting = (
            f" busiest rank / mean: {summary.rank_imbalance:.3f} |"
            f" waiting for it: {rates[names.SHARE_WAITING]:.1%} |"
            if summary.has_ranks
            else ""
        )
        at_cap = f" tokens at cap {cap}: {summary.share_at_cap:.2%} |" if cap is not None else ""
        knob = knob_of(self.dynmoe)
        threshold = "" if knob is None else f" {knob}: {summary.threshold:.5f} |"
        return (
            f" experts per token: {summary.experts_per_token:.4f}{aim} |{threshold}"
            f" balance loss: {summary.balance_loss:.4f} |"
            f" dynamic loss: {summary.dynamic_loss:.4f} |"
            f" max/mean load: {summary.max_over_mean_load:.2f} |{waiting}{at_cap}{not_finite}"
            f" tokens/s: {tokens / seconds:.0f} |"
            f" TFLOP/s from measured experts: {flops / seconds / 1e12:.3g} |"
        )

    def _write_step(
        self, step: RoutingStatistics, iteration: int, writer: Any, wandb_writer: Any
    ) -> None:
        if writer is not None or wandb_writer is not None:  # on no other rank does the host read
            summary = summarize(step)
            values = dict(scalars(summary, self.dynmoe, iteration))
            self._write(values, iteration, writer, wandb_writer)
        if writer is not None and not self._has_layout:
            writer.add_custom_scalars(tensorboard_layout(self.dynmoe, summary.has_ranks))
            self._has_layout = True

    def _write_heat_map(self, iteration: int, writer: Any) -> None:
        try:
            figure = self._history.draw()
            if figure is not None:
                writer.add_figure(names.HEAT_MAP, figure, iteration)
        except Exception as error:  # a failed picture must not end a training
            print(f"warning: no heat map at iteration {iteration}: {error}", flush=True)

    @staticmethod
    def _write(values: dict[str, float], iteration: int, writer: Any, wandb_writer: Any) -> None:
        if writer is not None:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
        if wandb_writer is not None:
            wandb_writer.log(values, iteration)


def _layer_table(summary: RoutingSummary, dynmoe: DynMoEConfig) -> str:
    rows = {"experts per token": summary.experts_per_token_by_layer}
    if dynmoe.scope == "layer":
        rows[knob_of(dynmoe) or ""] = summary.threshold_by_layer
    if dynmoe.normalization == "drn":
        rows["theta"] = summary.theta_by_layer
    return "\n".join(
        f"  {name + ' by layer':<27}"
        + " ".join("     -" if value != value else f"{value:6.3f}" for value in values)
        for name, values in rows.items()
    )


def install_metrics_tracker(dynmoe: DynMoEConfig) -> None:
    """Make upstream's loop report the routing of the run that starts."""
    set_moe_metrics_tracker(DynMoEMetricsTracker(dynmoe))


def floating_point_operations(args: Any, num_samples: int, experts_per_token: float) -> float:
    """Floating-point operations of training on some samples, forward and backward.

    This is upstream's own formula with the measured number of experts instead of
    ``--moe-router-topk``, in which the formula is linear.
    """
    measured = copy.copy(args)
    measured.moe_router_topk = experts_per_token
    return num_floating_point_operations(measured, num_samples)


def share_of_step_waiting(args: Any, summary: RoutingSummary) -> float:
    """The share of a step's time in which the mean rank waits for the busiest one, 0 to 1.

    Time is taken as floating-point operations: those of the routed experts take as much longer as
    the busiest rank has more rows, and everything else takes as long on every rank.
    """
    fixed, mean = (
        floating_point_operations(args, 1, experts) for experts in (0.0, summary.experts_per_token)
    )
    lost = (mean - fixed) * (summary.rank_imbalance - 1)
    return lost / (mean + lost)
