"""One micro-batch: fetch it, run the model and compute the language-model loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_dynmoe.backends.attention.documents import document_lengths, lengths_travel
from megatron_dynmoe.runs.metric_names import LOSS
from megatron_dynmoe.training.logits import check_logits

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
# If a loss is this many times larger than any before, upstream runs the step again.
SPIKY_LOSS_FACTOR = 10

straggler_detector = StragglerDetector()


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Megatron's ``forward_step_func``: the model's output and the function that gives its loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with straggler_detector(bdata=True):
        batch = _get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    with straggler_detector:
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    check_logits(model)
    return output, partial(loss_function, batch["loss_mask"])


def loss_function(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the token losses where the mask is 1.

    Args:
        loss_mask: [B, S], 1 for tokens that count.
        losses: [B, S], the model's token losses.

    Returns:
        The sum, the number of tokens (int32), and what Megatron reports.
    """
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().detach().to(torch.int)
    _validate(loss)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    if torch.is_grad_enabled() and not get_args().calculate_per_token_loss:
        loss = _weighed_in_sequence(loss, num_tokens)
    return loss, num_tokens, {LOSS: report}


def _weighed_in_sequence(loss: Tensor, num_tokens: Tensor) -> Tensor:
    """Weigh a rank's part of a sequence by its share of the sequence's tokens that count.

    Megatron divides each part by its own tokens and averages the gradients over the parts. If the
    mask leaves different numbers to them, a token in one part would count more than in another.
    """
    group = mpu.get_context_parallel_group()
    if group.size() == 1:
        return loss
    of_all = num_tokens.clone()
    torch.distributed.all_reduce(of_all, group=group)
    return loss * (group.size() * num_tokens / of_all.clamp(min=1))


def _get_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    """This rank's part of the next micro-batch; empty on stages in the middle of the pipeline.

    If attention gets the lengths of the documents, every stage reads the micro-batch.
    """
    args = get_args()
    has_lengths = lengths_travel(args)
    if not (has_lengths or is_first_or_last_pipeline_stage(vp_stage)):
        return dict.fromkeys(BATCH_KEYS)
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {
            key: sample[key].cuda(non_blocking=True) if key in sample else None
            for key in BATCH_KEYS
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=1 if has_lengths else args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    lengths = document_lengths(batch["position_ids"]) if has_lengths else None
    if has_lengths and not args.reset_position_ids:
        positions = torch.arange(args.seq_length, device=batch["position_ids"].device)
        batch["position_ids"] = positions.expand_as(batch["position_ids"])
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    if has_lengths:
        batch["attention_mask"] = lengths  # of whole rows, which no rank's attention splits
    return {key: batch.get(key) for key in BATCH_KEYS}


def _validate(loss: Tensor) -> None:
    """Pass the loss to upstream's rerun machine, as its own scripts do."""
    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, rejection in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            machine.validate_result(
                result=loss,
                rejection_func=rejection,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
