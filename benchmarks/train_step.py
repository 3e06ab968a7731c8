"""Time of a whole training step: back ends and routings, taking turns in one process.

    make quickstart                                      # the text and its tokenizer
    python benchmarks/train_step.py                      # one process
    torchrun --standalone --nproc-per-node 2 benchmarks/train_step.py   # expert parallel

Every provider is a model of its own in Megatron's train_step, with the same seed, batches of real
text and optimizer. They first train until DTop-p's controller holds its target; then each round
runs one step of each, in an order that rotates, and a ratio is taken within a round, because
machines drift. Its confidence interval (95 %) is of the median, by bootstrap. Rows are appended to
benchmarks/results/train_step.csv. Further flags are Megatron's and override the model's.
"""

import argparse
import csv
import importlib.metadata
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "train_step.csv"
PACKAGES = ("torch", "megatron-core")
# Of the code that is about to be imported; "+" where files differ from the commit.
GIT = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
COMMIT = subprocess.run(GIT, capture_output=True, text=True).stdout.strip()

# The quickstart's model.
MODEL = (
    "--num-layers 6 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 "
    "--num-experts 16 --moe-token-dispatcher-type alltoall --normalization RMSNorm --swiglu "
    "--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --seq-length 256 --max-position-embeddings 256 "
    "--micro-batch-size 4 --global-batch-size 8 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine "
    "--lr-warmup-iters 10 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --split 100,0,0 "
    "--train-iters 300 --eval-iters 0 --eval-interval 1000000 --num-workers 0"
)
KINDS = ("book", "code", "reference", "dictionary")
BACKENDS = ("local", "torch_native")
ROUTINGS = ("top_k", "dtop_p")
MEAN_EXPERTS = 2  # top_k's k and dtop_p's target
BALANCE_LOSS = ("seq_aux_loss", 1e-2)


@dataclass
class Provider:
    """One model in training, and the seconds of its steps."""

    name: str
    model: list[Any]
    optimizer: Any
    scheduler: Any
    config: Any
    tracker: Any
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    experts_per_token: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs/quickstart", help="of the text")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--settle", type=int, default=60, help="steps before the first round")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--routings", nargs="+", default=ROUTINGS, choices=ROUTINGS)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--no-append", action="store_true", help="write no rows")
    options, extra = parser.parse_known_args()
    if not (options.run / "data").is_dir():
        parser.error(f"{options.run}/data is missing: run make quickstart, or give --run")

    import torch

    from megatron_dynmoe.run import prepare

    torch.set_num_threads(options.threads)
    prepare()
    args = start_megatron(options.run / "data", extra)
    names = [f"{backend} {routing}" for routing in options.routings for backend in options.backends]
    providers = {name: build(args, *name.split()) for name in names}
    batches = text_batches(args, options.settle + options.rounds)

    for batch in batches[: options.settle]:
        for provider in providers.values():
            step(provider, batch, args)
    for number, batch in enumerate(batches[options.settle :]):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            timed_step(providers[name], batch, args)
    if torch.distributed.get_rank() == 0:
        report(providers, args, options)
    torch.distributed.barrier()


def start_megatron(data: Path, extra: list[str]) -> Any:
    """Parse the model's flags and make Megatron's process groups."""
    from megatron.training.initialize import initialize_megatron, set_jit_fusion_options

    from megatron_dynmoe.training import loop

    flags = [*MODEL.split(), "--tokenizer-type", "SentencePieceTokenizer"]
    flags += ["--expert-model-parallel-size", os.environ["WORLD_SIZE"]]
    flags += ["--tokenizer-model", str(data / "tokenizer.model")]
    flags += ["--data-path", *(str(data / f"{kind}_text_document") for kind in KINDS)]
    flags += ["--data-cache-path", str(data / "cache"), *extra]
    sys.argv = [sys.argv[0], *flags]
    args, _ = loop.parse_command_line()
    initialize_megatron()
    set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)
    return args


def build(args: Any, backend: str, routing: str) -> Provider:
    """A model with its optimizer, as Megatron's pretrain builds them."""
    import torch
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

    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.specs import layer_spec

    loss, coefficient = BALANCE_LOSS
    args.moe_router_topk = MEAN_EXPERTS
    if routing == "top_k":
        dynmoe = DynMoEConfig(backend=backend)
        args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = loss, coefficient
    else:
        args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "none", 0.0
        dynmoe = DynMoEConfig(
            routing=routing,
            target_experts_per_token=MEAN_EXPERTS,
            balance_loss=loss,
            balance_loss_coeff=coefficient,
            backend=backend,
        )
    torch.manual_seed(args.seed)
    model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
    model_config = gpt_config_from_args(args)
    model_config.transformer_layer_spec = partial(layer_spec, dynmoe=dynmoe)
    model, optimizer, scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, model_config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model:
        chunk.train()
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    if config.finalize_model_grads_func is None:
        config.finalize_model_grads_func = finalize_model_grads
    tracker = get_moe_metrics_tracker()
    return Provider(f"{backend} {routing}", model, optimizer, scheduler, config, tracker)


def text_batches(args: Any, number: int) -> list[list[dict[str, Any]]]:
    """Micro-batches of real text, those of a step together."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training.training import build_train_valid_test_data_iterators

    from megatron_dynmoe.training.datasets import train_valid_test_datasets_provider

    args.iteration, args.consumed_train_samples, args.consumed_valid_samples = 0, 0, 0
    args.train_iters = max(args.train_iters, number)
    iterator, _, _ = build_train_valid_test_data_iterators(train_valid_test_datasets_provider)
    return [[next(iterator) for _ in range(get_num_microbatches())] for _ in range(number)]


def step(provider: Provider, batch: list[dict[str, Any]], args: Any) -> None:
    """One training step."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
    from megatron.training.training import train_step

    from megatron_dynmoe.training.forward import forward_step

    set_moe_metrics_tracker(provider.tracker)
    args.curr_iteration = 0  # the target does not change with it
    train_step(
        forward_step,
        RerunDataIterator(iter(batch)),
        provider.model,
        provider.optimizer,
        provider.scheduler,
        provider.config,
        get_forward_backward_func(),
        iteration=0,
    )
    provider.tracker.clear()


def timed_step(provider: Provider, batch: list[dict[str, Any]], args: Any) -> None:
    """One training step, timed on the slowest rank."""
    import torch

    from megatron_dynmoe.control.update import routers_of

    torch.distributed.barrier()
    torch.cuda.synchronize()
    started, processor = time.perf_counter(), time.process_time()
    step(provider, batch, args)
    torch.cuda.synchronize()
    seconds = torch.tensor(
        [time.perf_counter() - started, time.process_time() - processor], dtype=torch.float64
    ).to(torch.cuda.current_device())
    torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
    provider.seconds.append(seconds[0].item())
    provider.processor_seconds.append(seconds[1].item())
    measured = [router.measured.item() for router in routers_of(provider.model)]
    provider.experts_per_token.append(statistics.fmean(measured) if measured else MEAN_EXPERTS)


def report(providers: dict[str, Provider], args: Any, options: argparse.Namespace) -> None:
    """Print the medians and ratios; append the rows."""
    tokens = args.global_batch_size * args.seq_length
    world = int(os.environ["WORLD_SIZE"])
    workload = (
        f"train: {args.num_layers} layers, hidden {args.hidden_size}, ffn {args.ffn_hidden_size}, "
        f"{args.num_experts} experts, {tokens} tokens, {args.params_dtype}".replace("torch.", "")
        + f", {world} process{'es' * (world > 1)}, {options.threads} thread each"
    )
    rows = []
    for provider in providers.values():
        rows.append(row(workload, provider, tokens))
        print(" | ".join(f"{name} {rows[-1][name]}" for name in list(rows[-1])[5:]))
    # What the project promises: the speed of the second against the first.
    pairs = [(f"local {routing}", f"torch_native {routing}") for routing in ROUTINGS]
    pairs += [(f"{backend} top_k", f"{backend} dtop_p") for backend in BACKENDS]
    for base, other in pairs:
        if base in providers and other in providers:
            first, second = providers[base], providers[other]
            wall = ratio(first.seconds, second.seconds)
            processor = ratio(first.processor_seconds, second.processor_seconds)
            print(f"{other} is {wall} times as fast as {base}; by processor time {processor}")
            rows.append(
                {name: rows[0][name] for name in ("date", "commit", "hardware", "versions")}
                | {"workload": workload, "provider": f"{other} / {base}", "speed_ratio": wall}
                | {"processor_ratio": processor, "load_1min": f"{os.getloadavg()[0]:.1f}"}
            )
    if not options.no_append:
        append(rows)


def row(workload: str, provider: Provider, tokens: int) -> dict[str, str]:
    p20, *_, p80 = statistics.quantiles(provider.seconds, n=5, method="inclusive")
    median = statistics.median(provider.seconds)
    return {
        "date": date.today().isoformat(),
        "commit": COMMIT,
        "hardware": hardware(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        "workload": workload,
        "provider": provider.name,
        "rounds": str(len(provider.seconds)),
        "median_s": f"{median:.4f}",
        "p20_s": f"{p20:.4f}",
        "p80_s": f"{p80:.4f}",
        "median_processor_s": f"{statistics.median(provider.processor_seconds):.4f}",
        "tokens_per_s": f"{tokens / median:.0f}",
        "experts_per_token": f"{statistics.fmean(provider.experts_per_token):.3f}",
        "speed_ratio": "",
        "processor_ratio": "",
        "load_1min": f"{os.getloadavg()[0]:.1f}",
    }


def hardware() -> str:
    """What ran the steps."""
    from megatron_dynmoe.backends import cpu

    if not cpu.is_installed():
        import torch

        return torch.cuda.get_device_name()
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {models[0] if models else 'unknown'}"


def ratio(base: list[float], other: list[float]) -> str:
    """The median of base / other within rounds, with its confidence interval."""
    ratios = [first / second for first, second in zip(base, other, strict=True)]
    generator = random.Random(0)
    medians = sorted(
        statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000)
    )
    return f"{statistics.median(ratios):.3f} [{medians[50]:.3f}, {medians[1949]:.3f}]"


def append(rows: list[dict[str, str]]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
