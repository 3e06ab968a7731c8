"""Models of several routings and back ends in Megatron's own train_step."""

from __future__ import annotations

import copy
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.text import words_as_tokens
from megatron_dynmoe.settings.config import DynMoEConfig

_COMMON = (
    "--num-experts 16 --moe-token-dispatcher-type alltoall --normalization RMSNorm --swiglu "
    "--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --min-lr 2e-5 --lr-decay-style cosine "
    "--lr-warmup-iters 10 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --split 100,0,0 "
    "--train-iters 300 --eval-iters 0 --eval-interval 1000000 --num-workers 0 "
)
MODELS = {
    # The quickstart's.
    "small": _COMMON + "--num-layers 6 --hidden-size 128 --ffn-hidden-size 256 "
    "--num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 "
    "--micro-batch-size 4 --global-batch-size 8 --lr 2e-3 --min-lr 2e-4",
    # Dynamic MoE's: 3.5 B parameters, of which 581 M work on a token with two experts; as in its
    # recipes. Without the distributed optimizer Megatron asks the GPU for each parameter's norm.
    "paper": _COMMON + "--num-layers 24 --hidden-size 1024 --ffn-hidden-size 2816 "
    "--num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 "
    "--micro-batch-size 8 --global-batch-size 16 --lr 3e-4 --init-method-std 0.006 --bf16 "
    "--use-distributed-optimizer --cross-entropy-loss-fusion --cross-entropy-fusion-impl native",
}
VOCAB_SIZES = {"small": 4096, "paper": 32000}  # of words, unless --run gives a tokenizer
KINDS = ("book", "code", "reference", "dictionary")
MEAN_EXPERTS = 2.0  # unless a routing gives another number
BALANCE_LOSS = ("seq_aux_loss", 1e-2)
# Begins the names of Transformers' Mixtral; its own name for how experts are computed follows.
REFERENCE = "hf_"


class Routing(NamedTuple):
    """What replaces the MLP: ``top_k``, ``dense``, ``dtop_p@1.82``, ``dtop_p/4``."""

    kind: str
    experts: float  # top_k's k, dtop_p's target, and how many experts dense is as wide as
    cap: int | None = None  # dtop_p's, with room for as many rows

    @classmethod
    def parse(cls, text: str) -> Routing:
        """Parse a routing of the command line.

        Raises:
            ValueError: the text is none of these.
        """
        match = re.fullmatch(r"(top_k|dtop_p|dense)(?:@([\d.]+))?(?:/(\d+))?", text)
        kind, experts, cap = match.groups() if match else ("", "", None)
        routing = cls(kind, float(experts or MEAN_EXPERTS), cap and int(cap))
        if routing.experts < 1 or not match or (cap and kind != "dtop_p"):
            raise ValueError(
                f"{text} is no routing: use top_k, dtop_p or dense, with @EXPERTS if not 2; "
                "dtop_p@EXPERTS/CAP makes room for CAP experts of every token"
            )
        if kind == "top_k" and routing.experts != int(routing.experts):
            raise ValueError(f"{text}: top_k takes a whole number of experts")
        return routing

    def __str__(self) -> str:
        experts = "" if self.experts == MEAN_EXPERTS else f"@{self.experts:g}"
        return self.kind + experts + (f"/{self.cap}" if self.cap else "")


def settings(routing: Routing, backend: str) -> DynMoEConfig:
    """Our settings of a provider."""
    loss, coefficient = BALANCE_LOSS
    if routing.kind != "dtop_p":
        return DynMoEConfig(backend=backend)
    return DynMoEConfig(
        routing="dtop_p",
        target_experts_per_token=routing.experts,
        balance_loss=loss,
        balance_loss_coeff=coefficient,
        max_experts_per_token=routing.cap,
        row_buffer="worst_case" if routing.cap else None,
        backend=backend,
    )


def flags_of_training(model: str, routing: Routing, backend: str) -> list[str]:
    """The flags with which one process of Megatron's trains what :func:`build` builds.

    Raises:
        ValueError: it is a dense model, which leaves flags of the model out.
    """
    loss, coefficient = BALANCE_LOSS
    flags = [*MODELS[model].split(), "--tokenizer-type", "NullTokenizer"]
    flags += ["--vocab-size", str(VOCAB_SIZES[model]), "--moe-dynamic-backend", backend]
    if routing.kind == "top_k":
        flags += ["--moe-router-load-balancing-type", loss]
        flags += ["--moe-aux-loss-coeff", str(coefficient)]
        return [*flags, "--moe-router-topk", f"{routing.experts:g}"]
    if routing.kind != "dtop_p":
        raise ValueError(f"{routing} is not in the flags of {model}: use top_k or dtop_p.")
    flags += ["--moe-dynamic-routing", "dtop_p", "--moe-dynamic-balance-loss", loss]
    flags += ["--moe-dynamic-balance-loss-coeff", str(coefficient)]
    flags += ["--moe-dynamic-target-experts-per-token", f"{routing.experts:g}"]
    if routing.cap:
        flags += ["--moe-dynamic-max-experts-per-token", str(routing.cap)]
        flags += ["--moe-dynamic-row-buffer", "worst_case"]
    return flags


@dataclass
class Provider:
    """One model in training.

    Attributes:
        batches: those of the steps to come, each a list of micro-batches.
    """

    batches: Iterator[list[dict[str, Any]]]
    routing: Routing
    args: Any  # Megatron's, as they were when it was built
    model: list[Any]
    optimizer: Any
    scheduler: Any
    config: Any
    tracker: Any

    def step(self) -> tuple[Any, ...]:
        """One training step, on the next batch; returns what Megatron's ``train_step`` returns."""
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
        from megatron.training import get_args
        from megatron.training.training import train_step

        from megatron_dynmoe.training.forward import forward_step

        set_moe_metrics_tracker(self.tracker)
        get_args().curr_iteration = 0  # the target does not change with it
        result = train_step(
            forward_step,
            RerunDataIterator(iter(next(self.batches))),
            self.model,
            self.optimizer,
            self.scheduler,
            self.config,
            get_forward_backward_func(),
            iteration=0,
        )
        self.tracker.clear()
        return result

    def experts_per_token(self) -> float:
        """The mean over layers that the last step has measured, or else the routing's number."""
        from megatron_dynmoe.control.update import routers_of

        measured = [router.measured.item() for router in routers_of(self.model)]
        return statistics.fmean(measured) if measured else self.routing.experts


class Step(NamedTuple):
    """One measured training step."""

    seconds: float
    processor_seconds: float
    experts_per_token: float


def start_megatron(model: str, run: Path | None, extra: list[str]) -> Any:
    """Parse the model's flags and make Megatron's process groups.

    Args:
        model: a name in ``MODELS``.
        run: a quickstart's folder, for its text and tokenizer; None: the words of examples/data.
        extra: flags of Megatron that override the model's.
    """
    from megatron.training.initialize import initialize_megatron, set_jit_fusion_options

    from megatron_dynmoe.training import loop

    flags = MODELS[model].split()
    flags += ["--expert-model-parallel-size", os.environ["WORLD_SIZE"]]
    if run is None:
        prefix = words_as_tokens(VOCAB_SIZES[model])
        flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZES[model])]
        flags += ["--data-path", str(prefix), "--data-cache-path", str(prefix.parent / "cache")]
    else:
        data = run / "data"
        flags += ["--tokenizer-type", "SentencePieceTokenizer"]
        flags += ["--tokenizer-model", str(data / "tokenizer.model")]
        flags += ["--data-path", *(str(data / f"{kind}_text_document") for kind in KINDS)]
        flags += ["--data-cache-path", str(data / "cache")]
    sys.argv = [sys.argv[0], *flags, *extra]
    args, *_ = loop.parse_command_line()
    initialize_megatron()
    set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)
    return args


def build(
    args: Any, batches: Iterable[list[dict[str, Any]]], backend: str, routing_text: str
) -> Any:
    """A model with its optimizer, as Megatron's pretrain builds them, or a Reference.

    Args:
        args: Megatron's.
        batches: of the steps, in their order.
        backend: one of ours, or the name of a reference.
        routing_text: see :class:`Routing`.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.utils import get_model_config
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.training import setup_model_and_optimizer

    from megatron_dynmoe.model.prepare import prepare_training
    from megatron_dynmoe.model.settled import settle_run
    from megatron_dynmoe.model.spec import layer_spec

    routing = Routing.parse(routing_text)
    if backend.startswith(REFERENCE):
        from benchmarks.references import build_reference

        return build_reference(args, batches, backend, routing)
    args, dynmoe = copy.copy(args), settings(routing, backend)
    args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "none", 0.0
    if routing.kind == "top_k":
        args.moe_router_topk = int(routing.experts)
        args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = BALANCE_LOSS
    elif routing.kind == "dense":
        args.num_experts = args.moe_ffn_hidden_size = None
        args.ffn_hidden_size = round(routing.experts * args.ffn_hidden_size)
    torch.manual_seed(args.seed)
    model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
    model_config = gpt_config_from_args(args)
    settled = settle_run(dynmoe.resolve(args.num_experts), model_config.transformer)
    prepare_training(settled, model_config.transformer, args)
    model_config.transformer_layer_spec = partial(layer_spec, settled=settled)
    model, optimizer, scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, model_config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model:
        chunk.train()
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    if args.overlap_grad_reduce:  # gradients are reduced after the last micro-batch alone
        config.no_sync_func = model[0].no_sync
    if config.finalize_model_grads_func is None:
        config.finalize_model_grads_func = finalize_model_grads
    return Provider(
        iter(batches), routing, args, model, optimizer, scheduler, config, get_moe_metrics_tracker()
    )


def text_batches(args: Any, number: int) -> list[list[dict[str, Any]]]:
    """Lists of micro-batches of real text, one list for each step."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training.training import build_train_valid_test_data_iterators

    from megatron_dynmoe.training.datasets.provider import train_valid_test_datasets_provider

    args.iteration, args.consumed_train_samples, args.consumed_valid_samples = 0, 0, 0
    args.train_iters = max(args.train_iters, number)
    iterator, _, _ = build_train_valid_test_data_iterators(train_valid_test_datasets_provider)
    return [[next(iterator) for _ in range(get_num_microbatches())] for _ in range(number)]


def step(provider: Any) -> Any:
    """One training step of a Provider or a Reference."""
    return provider.step()


def timed_step(provider: Any) -> Step:
    """One training step, timed on the slowest rank."""
    torch.distributed.barrier()
    torch.cuda.synchronize()
    started, processor = time.perf_counter(), time.process_time()
    step(provider)
    torch.cuda.synchronize()
    seconds = torch.tensor(
        [time.perf_counter() - started, time.process_time() - processor], dtype=torch.float64
    ).to(torch.cuda.current_device())
    torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
    return Step(*seconds.tolist(), provider.experts_per_token())


def flops_of_a_step(provider: Any, experts_per_token: float) -> float:
    """By Megatron's formula for this model."""
    from megatron_dynmoe.runs.metrics import floating_point_operations

    batch_size = provider.args.global_batch_size
    return floating_point_operations(provider.args, batch_size, experts_per_token)
