"""The door of stock scripts: ``--spec megatron_dynmoe.specs dynmoe_layer_spec``.

With it Megatron's own ``pretrain_gpt.py`` trains with dynamic routing, its settings read from the
YAML file that ``DYNMOE_CONFIG`` names.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from megatron.training import get_args, print_rank_0

from megatron_dynmoe.backends import choice
from megatron_dynmoe.model.prepare import SettledUpdate, describe, prepare_training
from megatron_dynmoe.model.settled import Settled, settle_run
from megatron_dynmoe.model.spec import layer_spec
from megatron_dynmoe.settings.arguments import adopt_upstream_balance_loss, config_from_environment

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig


def dynmoe_layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Upstream's layer spec with dynamic routing; the first model chunk prepares the training.

    Raises:
        ValueError: ``DYNMOE_CONFIG`` is not set, or a setting makes no sense.
    """
    update = config.transformer.finalize_model_grads_func
    if isinstance(update, SettledUpdate):  # of the chunk before
        return layer_spec(config, vp_stage, settled=update.settled)
    args = None
    with suppress(AssertionError):  # a training loop of one's own has none
        args = get_args()
    settled = _settle_from_environment(config.transformer, args)
    prepare_training(settled, config.transformer, args)
    if not vp_stage:
        for line in describe(settled, config.transformer, args):
            print_rank_0(line)
    return layer_spec(config, vp_stage, settled=settled)


def _settle_from_environment(transformer: TransformerConfig, args: Namespace | None) -> Settled:
    dynmoe = config_from_environment()
    if dynmoe is None:
        raise ValueError(
            "DYNMOE_CONFIG is not set: with --spec megatron_dynmoe.specs dynmoe_layer_spec it must "
            "name a YAML file of settings, such as 'routing: dtop_p'."
        )
    # Upstream's defaults here are values, so only others can be told to be a user's choice.
    kinds, coefficients = transformer.moe_router_load_balancing_type, transformer.moe_aux_loss_coeff
    dynmoe = adopt_upstream_balance_loss(
        dynmoe,
        kinds if dynmoe.is_dynamic and kinds != "aux_loss" else None,
        coefficients if dynmoe.is_dynamic and coefficients != 0 else None,
    )
    impl: str | None = transformer.transformer_impl
    if impl == "transformer_engine":
        impl = None  # upstream's default
    chosen = choice.choose_backend(dynmoe.backend, impl)
    resolved = dynmoe.resolve(transformer.num_moe_experts)
    return settle_run(resolved, transformer, chosen, args)
