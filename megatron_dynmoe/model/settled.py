"""The settled settings of a run: computed in one place, and passed to all code that needs them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_dynmoe.backends import choice, transformer_engine
from megatron_dynmoe.control.pi_map import MapController
from megatron_dynmoe.control.settle import ControlLaw, settle, started_rule
from megatron_dynmoe.moe.flex import check_flex
from megatron_dynmoe.moe.rules import Rule
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import SettingError
from megatron_dynmoe.settings.upstream_flags import check_upstream_settings

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Settled:
    """One run's settings, with every default filled in and every ``auto`` computed.

    Attributes:
        dynmoe: the settings of dynamic routing.
        backend: the code that runs attention, norms and experts.
        controller: the law that moves the rule's knob, or the map from which it is read if the
            target is drawn; None if the knob is fixed.
        rule: how logits become a routing map; None for stock top-k.
    """

    dynmoe: DynMoEConfig
    backend: choice.BackEnd
    controller: ControlLaw | None = None
    rule: Rule | None = None

    @property
    def rows_per_token(self) -> int | None:
        """The number of rows per token for which there is room; None if rows are counted."""
        if self.dynmoe.row_buffer != "worst_case":
            return None
        return max(cap or 0 for cap in self._caps)

    @property
    def initial_map(self) -> tuple[float, ...] | None:
        """The first threshold of each knot if the target is drawn; else None."""
        return self.controller.initial_map if isinstance(self.controller, MapController) else None

    @property
    def most_experts(self) -> int | None:
        """The most experts that a token can use, in training or inference; None: all."""
        return None if None in self._caps else max(cap or 0 for cap in self._caps)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``resolved.yaml`` holds; the controller's numbers are among the settings."""
        return {
            "dynamic_routing": self.dynmoe.to_dict(),
            "back_end": dataclasses.asdict(self.backend),
            "rows_per_token": self.rows_per_token,
        }

    @property
    def _caps(self) -> tuple[int | None, int | None]:
        return self.dynmoe.max_experts_per_token, self.dynmoe.inference_max_experts_per_token


def settle_run(
    resolved: DynMoEConfig,
    transformer: TransformerConfig,
    chosen: choice.BackEnd | None = None,
    args: Namespace | None = None,
    here: bool = True,
) -> Settled:
    """Settle the settings of a run with its model, before anything is built.

    Args:
        resolved: the result of :meth:`DynMoEConfig.resolve`.
        transformer: upstream's config of the model. It is not changed.
        chosen: the result of :func:`choice.choose_backend`; None chooses here, as without
            ``--transformer-impl``.
        args: Megatron's arguments, for the optimizer and the seed; None for a training loop of
            one's own, which has none.
        here: whether the run is on this machine, which then needs its packages.

    Raises:
        ValueError: one of our or of upstream's settings contradicts the model.
    """
    optimizer = "adam"
    if args is not None:
        optimizer, resolved = args.optimizer, resolved.seeded(args.seed)
    if chosen is None:
        chosen = choice.choose_backend(resolved.backend, transformer_impl=None)
    backend = choice.choose_parts(chosen, transformer, optimizer)
    if not resolved.is_dynamic:
        return Settled(resolved, backend)
    check_upstream_settings(transformer, resolved.routing)
    if backend.backend == "transformer_engine":
        transformer_engine.check_experts(transformer)
    transformer_engine.check_permutation(transformer)
    dynmoe, controller = settle(resolved, transformer)
    rule = started_rule(dynmoe, controller, transformer)
    settled = Settled(dynmoe, backend, controller, rule)
    if dynmoe.row_buffer != "measured":
        _check_uncounted_rows(settled, transformer)
    _check_controlled_quantity(dynmoe, transformer)
    if transformer.moe_token_dispatcher_type == "flex":
        check_flex(transformer, settled.most_experts, here)
    return settled


def _check_controlled_quantity(dynmoe: DynMoEConfig, transformer: TransformerConfig) -> None:
    """Refuse to hold the rows of the busiest rank with a dispatcher that does not count them."""
    dispatcher = transformer.moe_token_dispatcher_type
    if (
        dynmoe.controlled_quantity == "busiest_rank"
        and transformer.expert_model_parallel_size > 1
        and dispatcher != "alltoall"
    ):
        raise SettingError(
            "controlled_quantity",
            dynmoe.controlled_quantity,
            f", and --moe-token-dispatcher-type is {dispatcher}, which does not count the rows of "
            "each rank",
            "use alltoall, or leave {controlled_quantity} out (experts)",
        )


def _check_uncounted_rows(settled: Settled, transformer: TransformerConfig) -> None:
    """Refuse any ``row_buffer`` but measured if the host needs the number of rows."""
    remedy, backend = "leave {row_buffer} out (measured)", settled.backend
    if backend.backend != "torch_native" or "experts" in backend.kept:
        reason = f"the experts are upstream's ({backend.kept.get('experts', backend.backend)})"
        remedy += ", or use torch_native"
    elif choice.gemm_of(transformer) == "a loop":
        reason = "the experts' GEMMs run in a loop on this device, in this dtype and these sizes"
        remedy += ", or use bf16 on Hopper or later and sizes in multiples of 16 bytes"
    elif transformer.moe_token_dispatcher_type != "alltoall":
        reason = f"--moe-token-dispatcher-type is {transformer.moe_token_dispatcher_type}"
        remedy += ", or use alltoall"
    elif transformer.expert_model_parallel_size * transformer.tensor_model_parallel_size > 1:
        reason = (
            f"rows travel between ranks (--expert-model-parallel-size "
            f"{transformer.expert_model_parallel_size}, --tensor-model-parallel-size "
            f"{transformer.tensor_model_parallel_size})"
        )
    elif transformer.moe_permute_fusion:
        reason = "--moe-permute-fusion is given"
        remedy += ", or leave that out"
    else:
        return
    raise SettingError(
        "row_buffer",
        settled.dynmoe.row_buffer,
        f", but the host has to know the number of rows, because {reason}",
        remedy,
    )
