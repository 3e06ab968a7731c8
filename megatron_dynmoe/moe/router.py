"""DynamicRouter: upstream's router with a rule that gives each token its number of experts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import log_single_rank
from torch import Tensor

from megatron_dynmoe.moe.rules import Rule
from megatron_dynmoe.routing.counters import RoutingCounters
from megatron_dynmoe.routing.keep_dtype import KeepDtype
from megatron_dynmoe.routing.losses import (
    count_tokens,
    dynamic_loss,
    fractions,
    load_balance_loss,
)
from megatron_dynmoe.routing.route import Routing
from megatron_dynmoe.routing.threshold_map import read
from megatron_dynmoe.settings.distribution import KNOTS, place_between

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.distributed import ProcessGroup

    from megatron_dynmoe.settings.config import DynMoEConfig

logger = logging.getLogger(__name__)

# Upstream's tracker shows the balance loss under a name that depends on
# --moe-router-load-balancing-type. Our entry point sets that flag to none and reports the loss
# itself.
UPSTREAM_LOSS_NAMES = {
    "seq_aux_loss": "seq_load_balancing_loss",
    "aux_loss": "load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


class DynamicRouter(KeepDtype, TopKRouter):
    """Routes each token to as many experts as its rule says.

    Gate, input jitter, z-loss and forced balancing are upstream's. This class replaces what comes
    after them: the rule's routing, the losses and the counts.

    The state is replicated over ranks and saved with the model. All of it is float32, [1] unless
    said otherwise, and is written once per global batch:
        the rule's own state (for top-p: ``threshold``), [number of values].
        integral: the PI controller's sum of errors.
        measured: mean experts per token over the last global batch (0: none counted). Training does
            not read it; it is for readers of the checkpoint.
    If the target is drawn for each global batch, the router also has a map from targets to
    thresholds. Evaluations route at the mean target: ``threshold`` and ``integral`` are those that
    the map has there.
        knot_targets: [K], the targets of the knots (see :class:`TargetDistribution`).
        knot_thresholds: [K], the thresholds there.
        knot_integrals: [K], the sums of errors of the knots.
    The parameter theta_offset, [1], makes theta = 1 + theta_offset, which scales the normalized
    logits. It is an offset because bf16 would round small updates of a value near 1 away. It is
    one-dimensional because upstream exempts such parameters from weight decay.
    """

    integral: Tensor
    measured: Tensor
    knot_targets: Tensor
    knot_thresholds: Tensor
    knot_integrals: Tensor
    # Upstream's attributes; a type checker cannot see them through torch.nn.Module.
    config: TransformerConfig
    weight: Tensor
    bias: Tensor | None
    num_experts: int
    layer_number: int
    calculate_per_token_loss: bool
    tp_cp_group: ProcessGroup
    tp_dp_cp_group: ProcessGroup
    apply_z_loss: Callable[..., Tensor]
    reset_parameters: Callable[[], None]

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        dynmoe: DynMoEConfig,
        rule: Rule,
        initial_map: tuple[float, ...] | None = None,
    ) -> None:
        """Build the router.

        Args:
            dynmoe: resolved settings with dynamic routing.
            rule: the rule that the routers of all layers share.
            initial_map: the first threshold of each knot; None unless the target is drawn.
        """
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.dynmoe, self.rule = dynmoe, rule
        device = (
            self.weight.device if config.use_cpu_initialization else torch.cuda.current_device()
        )
        if rule.extra_logits:
            self._add_rows_to_gate(rule.extra_logits)
        for name, values in {**rule.first_state, "integral": (0.0,), "measured": (0.0,)}.items():
            first = torch.tensor(values, dtype=torch.float32, device=device)
            self.register_buffer(name, first)
        self.drawn = dynmoe.drawn_target
        self.in_force: Tensor | None = None  # the threshold of the current global batch, if drawn
        self._drawn_for: int | None = None  # how many iterations had finished before that batch
        if self.drawn is not None:
            assert initial_map is not None
            for name, values in zip(
                KNOTS, (self.drawn.knots, initial_map, (0.0,) * len(initial_map)), strict=True
            ):
                of_knots = torch.tensor(values, dtype=torch.float32, device=device)
                self.register_buffer(name, of_knots)
        self.theta_offset = None
        if dynmoe.normalization == "drn":
            self.theta_offset = torch.nn.Parameter(
                torch.zeros(1, dtype=config.params_dtype, device=device)
            )
            # Under sequence parallelism each rank sees a part of the tokens, so upstream must sum
            # the gradient over ranks, as it does for the gate.
            self.theta_offset.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        # From the last forward pass. With recomputation that may be the first pass, which the
        # counters leave out.
        self.last_not_finite: Tensor | None = None
        self.last_residual: Tensor | None = None  # [T], the weight of the token itself
        self.counters = RoutingCounters(self.num_experts, device, rule.num_sums)
        self.evaluation_counters = RoutingCounters(self.num_experts, device)

    def _add_rows_to_gate(self, rows: int) -> None:
        """Make the gate anew, with rows for more than the experts."""
        shape = self.num_experts + rows, self.weight.shape[1]
        self.weight = torch.nn.Parameter(self.weight.new_empty(shape, dtype=torch.float32))
        if self.bias is not None:
            self.bias = torch.nn.Parameter(self.bias.new_empty(shape[0], dtype=torch.float32))
        self.reset_parameters()

    @property
    def theta(self) -> Tensor:
        """The scale of the normalized logits, [1] float32."""
        if self.theta_offset is None:
            return torch.ones_like(self.measured)
        return 1 + self.theta_offset.float()

    @property
    def state(self) -> dict[str, Tensor]:
        """The current values of the rule's own state."""
        return {name: self.get_buffer(name) for name in self.rule.first_state}

    @property
    def knob(self) -> Tensor:
        """The number that a controller may move, [1] float32; NaN if the rule has no knob.

        If the target is drawn, it is that of the current global batch.
        """
        name = self.rule.knob
        if self.in_force is not None:
            return self.in_force
        return torch.full_like(self.measured, torch.nan) if name is None else self.state[name]

    @property
    def controlled_state(self) -> list[Tensor]:
        """What the controller writes: knob, integral and, if the target is drawn, the map's two."""
        assert self.rule.knob is not None
        names = [self.rule.knob, "integral", *(KNOTS[1:] if self.drawn is not None else ())]
        return [self.get_buffer(name) for name in names]

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Turn gate logits into weights and a routing map.

        Args:
            logits: [S, B, E] float32.
            padding_mask: [S, B], True for padding, which losses and counts leave out.

        Returns:
            Weights [T, E] float32 and routing map [T, E] bool, T = S * B.
        """
        dynmoe = self.dynmoe
        loss_by_sequence = dynmoe.balance_loss == "seq_aux_loss"
        num_sequences = logits.shape[1] if loss_by_sequence or self.rule.by_sequence else 1
        logits_TE = logits.flatten(end_dim=-2)
        valid_T = None if padding_mask is None else ~padding_mask.reshape(-1)

        # 1. z-loss, on the raw logits
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=None if valid_T is None else ~valid_T)

        # 2. Route: normalize, softmax, select, weigh
        routed = self.rule.route(
            logits_TE,
            self._drawn_state() if self.training else self.state,
            theta=None if self.theta_offset is None else self.theta,
            num_sequences=num_sequences,
            valid_T=valid_T,
            training=self.training,
            group=self.tp_cp_group if self.tp_cp_group.size() > 1 else None,
        )
        if not loss_by_sequence:
            routed = routed.as_one_sequence()
        self.last_not_finite, self.last_residual = routed.not_finite, routed.residual_T

        # 3. Losses and counts, once per micro-batch. A forward pass without gradients is either an
        #    evaluation or the first of the two passes of recomputation, which is not counted
        weights_TE = routed.weights_TE
        cap = self.rule.cap(self.training)
        assignments_BE = routed.assignments_BE
        assignments_E = assignments_BE[0] if len(assignments_BE) == 1 else assignments_BE.sum(dim=0)
        counted = assignments_E, routed.experts_T, cap, valid_T, routed.not_finite
        if self.training and torch.is_grad_enabled():
            self.counters.add_counts(*counted, routed.sums_W)
            weights_TE = self._attach_losses(routed, valid_T)
        elif not self.training:
            self.evaluation_counters.add_counts(*counted)
        return weights_TE, routed.map_TE

    @torch.no_grad()
    def _drawn_state(self) -> dict[str, Tensor]:
        """The rule's state for the target of this global batch.

        The threshold is read from the map at the first pass of a batch, and not when the map was
        written: after a step that the optimizer skipped, the next batch has another target, too.
        """
        if self.drawn is None:
            return self.state
        iteration = finished_iterations()
        if iteration != self._drawn_for or self.in_force is None:
            place = self.drawn.place(self.drawn.at(iteration))
            self.in_force = read(self.knot_thresholds.unsqueeze(0), place)
            self._drawn_for = iteration
        assert self.rule.knob is not None
        return self.state | {self.rule.knob: self.in_force}

    def _attach_losses(self, routed: Routing, valid_T: Tensor | None) -> Tensor:
        """Attach both losses to the weights, so that their gradients reach the router."""
        dynmoe, group = self.dynmoe, self.tp_cp_group
        assignments_BE = routed.assignments_BE
        tokens_B, _ = count_tokens(routed.map_TE, len(assignments_BE), valid_T)
        if group.size() > 1:
            torch.distributed.all_reduce(assignments_BE, group=group)
            if isinstance(tokens_B, Tensor):
                torch.distributed.all_reduce(tokens_B, group=group)
            else:  # without padding, all ranks have as many
                tokens_B *= group.size()
        tokens = tokens_B.sum() if isinstance(tokens_B, Tensor) else tokens_B * len(assignments_BE)
        fractions_BE = self._fractions(assignments_BE, tokens_B)

        balance = load_balance_loss(routed.prob_sums_BE, fractions_BE, tokens_B)
        dynamic = dynamic_loss(routed.entropy, tokens)
        self.counters.add_losses(balance.detach(), dynamic.detach(), group.size())
        asked_for = self.config.moe_router_load_balancing_type
        shown_as = UPSTREAM_LOSS_NAMES.get(
            asked_for if isinstance(asked_for, str) else asked_for[0]
        )
        if dynmoe.balance_loss != "none" and shown_as is not None:
            get_moe_metrics_tracker().record(
                shown_as,
                balance,
                self.layer_number,
                self.config.num_layers,
                reduce_group=group,
            )

        parts = []
        if coefficient := dynmoe.loss_coefficients.dynamic:
            parts.append(coefficient * dynamic)
        of_balance = self.rule.balance_coefficient(self.state)
        if dynmoe.balance_loss != "none" and (isinstance(of_balance, Tensor) or of_balance):
            parts.append(of_balance * balance)
        if not parts:
            return routed.weights_TE
        loss = sum(parts[1:], start=parts[0])
        if self.calculate_per_token_loss:
            # Upstream divides all gradients by the tokens of the global batch in this case; see
            # attach_and_log_load_balancing_loss there. It multiplies by this rank's own tokens
            # times ranks, which differs if their padding does.
            loss = loss * tokens
        return MoEAuxLossAutoScaler.apply(routed.weights_TE, loss)

    def _fractions(self, assignments_BE: Tensor, tokens_B: Tensor | int) -> Tensor:
        """Compute f of equation 7, [B, E] float32, at the scope of the balance loss."""
        if self.dynmoe.balance_loss == "global_aux_loss":
            sums = self.counters.sums
            counted = torch.cat([sums.assignments, sums.tokens.view(1)])
            torch.distributed.all_reduce(counted, group=self.tp_dp_cp_group)
            counted = counted.float()
            assignments_BE, tokens_B = counted[:-1].unsqueeze(0), counted[-1:]
        return fractions(assignments_BE, tokens_B)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load. A value that the user has fixed is a setting and replaces the checkpoint's."""
        super()._load_from_state_dict(*args, **kwargs)
        self.in_force = None
        self._move_knots()
        for name, fixed in self.rule.fixed.items():
            loaded, wanted = self.get_buffer(name), torch.tensor(fixed)
            if not torch.equal(loaded.cpu(), wanted):
                said, given = (", ".join(f"{v:g}" for v in t.tolist()) for t in (loaded, wanted))
                log_single_rank(
                    logger,
                    logging.WARNING,
                    f"layer {self.layer_number}: the checkpoint's {name} {said} is replaced by "
                    f"--moe-dynamic-{name} {given}",
                )
                loaded.copy_(wanted)

    @torch.no_grad()
    def _move_knots(self) -> None:
        """Read the loaded map and its sums at this run's knots, if the range was another one."""
        if self.drawn is None:
            return
        loaded, wanted = self.knot_targets.clone(), self.drawn.knots
        self.knot_targets.copy_(torch.tensor(wanted))
        if torch.equal(loaded, self.knot_targets):
            return
        places = [place_between(tuple(loaded.tolist()), target) for target in wanted]
        for values in (self.knot_thresholds, self.knot_integrals):
            values.copy_(torch.stack([read(values, place) for place in places]))


def finished_iterations() -> int:
    """Read the number of finished iterations from Megatron's training loop."""
    from megatron.training import get_args

    return get_args().curr_iteration
