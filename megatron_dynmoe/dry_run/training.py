"""The training itself: Megatron's ``pretrain``, from its initialization to its second step.

Everything is Megatron's or ours, and real, except for the other ranks (Megatron's fake process
group), the batches, and what the host reads from the device. The log is not written.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import megatron.training.training as upstream
import torch
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import get_args
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dynmoe.dry_run.recording.recorder import Recorder
from megatron_dynmoe.dry_run.recording.schedule import MicroBatches, Watch
from megatron_dynmoe.dry_run.request import Request
from megatron_dynmoe.dry_run.stand_ins.rows import BalancedRows
from megatron_dynmoe.model.hybrid import model_config_from_args
from megatron_dynmoe.model.settled import settle_run
from megatron_dynmoe.settings.arguments import naming_flags
from megatron_dynmoe.training import loop
from megatron_dynmoe.training.forward import forward_step
from megatron_dynmoe.upstream import patches

_WITHOUT_A_GPU = ("torch_native", "local")


def train(recorder: Recorder, request: Request) -> MicroBatches:
    """Train as the command line says.

    Returns:
        The micro-batches of the second step.

    Raises:
        ValueError: a setting makes no sense, or a dry run cannot take it.
    """
    with loop.refusing_in_flags():
        args, resolved, chosen = loop.parse_command_line()
        model_config = model_config_from_args(args)
        with naming_flags(args):
            settled = settle_run(resolved, model_config.transformer, chosen, args)
        if settled.backend.backend not in _WITHOUT_A_GPU:
            raise ValueError(
                f"the training would take the back end {settled.backend.backend} "
                f"({settled.backend.why}), whose code cannot run without a GPU: give "
                "--moe-dynamic-backend torch_native."
            )
        loop.use_our_layers(args, model_config, settled)
    # Megatron's own flag for this refuses DeepEP, and turns off checks that every step has.
    args.fake_process_group, args.use_gloo_process_groups = True, False
    micro_batches = _micro_batches(args, request.stage)
    _set_number(args, micro_batches.group)
    if args.num_experts:
        share = request.experts_per_token / args.num_experts
        recorder.share_of_experts = share * request.imbalance
    rows = BalancedRows(request.experts_per_token, request.imbalance)
    _watch(recorder, args, micro_batches, rows)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder:
        upstream.pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            _batches,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    return micro_batches


def _micro_batches(args: Namespace, stage: int) -> MicroBatches:
    """Those of a step as the command line has them, and those that run."""
    return MicroBatches.of(
        args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
        args.pipeline_model_parallel_size,
        stage,
        args.virtual_pipeline_model_parallel_size or 1,
    )


def _set_number(args: Namespace, micro_batches: int) -> None:
    """Set the number of micro-batches of the steps that follow."""
    reconfigure_num_microbatches_calculator(
        rank=args.rank,
        global_batch_size=micro_batches * args.micro_batch_size * args.data_parallel_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
    )


def _watch(
    recorder: Recorder, args: Namespace, micro_batches: MicroBatches, rows: BalancedRows
) -> None:
    watch = Watch(recorder)

    def stepping(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            model, optimizer, _, config = given[2:6]
            if not watch.steps:
                layers = (part for chunk in model for part in chunk.modules())
                recorder.places.watch(part for part in layers if isinstance(part, TransformerLayer))
                optimizer.step = watch.during(optimizer.step, "optimizer")
                finalize = config.finalize_model_grads_func
                config.finalize_model_grads_func = watch.after_passes(finalize)
            watch.begin_step()
            result = train_step(*given, **named)
            watch.end_step()
            _set_number(args, micro_batches.run)
            return result

        return step

    patches.watching(stepping, watch.forward, watch.backward, rows.telling, rows.means).apply()


def _batches(_: object, vp_stage: int | None = None) -> tuple[Iterator[Any], None, None]:
    """A provider of batches: the same for ever, and none for validation and test."""
    args = get_args()
    shape = args.micro_batch_size, args.seq_length

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            batch = {key: torch.zeros(shape, dtype=torch.int64) for key in _TOKENS}
            yield {**batch, "loss_mask": torch.ones(shape)}

    return batches(), None, None


_TOKENS = ("tokens", "labels", "position_ids")
# Otherwise only the first rank of a tensor-parallel group would ask for batches.
_batches.is_distributed = True  # type: ignore[attr-defined]
