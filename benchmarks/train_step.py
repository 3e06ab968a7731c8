"""Measures the time of a whole training step, for back ends and routings that take turns.

    python benchmarks/train_step.py                      # a small model, one process
    torchrun --standalone --nproc-per-node 2 benchmarks/train_step.py   # expert parallel
    python benchmarks/train_step.py --model paper --apart --backends torch_native \
        --routings top_k dtop_p dtop_p@1.82 dense        # the paper's 3.5 B, on one GPU

Every provider is a model of its own in Megatron's train_step, with the same seed, batches of real
text (the words of examples/data, or a quickstart's tokens with --run) and optimizer. They first
train until DTop-p's controller holds its target. Then each round runs one step of each, in an order
that rotates, and a ratio is taken within a round, because the speed of a machine drifts. If the
models do not fit into memory together, --apart runs each of them in a process of its own, several
times, in turns; ratios are then between medians. Confidence intervals (95 %) are of medians, by
bootstrap. At the end one step of each runs under the profiler. Rows are appended to
OUTPUT/train_step.csv, profiles to OUTPUT/train_step_profile.txt. A routing's number of experts is
2, or follows an @. dense is an MLP as wide as that many experts. dtop_p/4 allocates rows for 4
experts of every token, so that the host need not wait for their number. Further flags are
Megatron's, and override the model's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import measure
from benchmarks.training import (
    MODELS,
    Routing,
    Step,
    build,
    start_megatron,
    text_batches,
    timed_step,
)
from benchmarks.training import step as train_one_step
from megatron_dynmoe.settings.command_line import CommandParser
from megatron_dynmoe.settings.exits import ending_at_misuse

BACKENDS = ("local", "torch_native")
ROUTINGS = ("top_k", "dtop_p")
PACKAGES = ("torch", "megatron-core")


@dataclass
class Measured:
    """The steps of one provider, and what else its row says."""

    workload: str
    tokens: int  # of a step
    ceiling_flops: float  # per second, of this machine
    flops: float  # of a step, from the measured number of experts
    steps: list[Step]
    routing_share: float | None
    control_share: float | None
    profile: str
    peak_memory_gb: float | None


def main() -> None:
    options, extra = parser().parse_known_args()
    try:
        routings = [str(Routing.parse(text)) for text in options.routings]
    except ValueError as error:
        raise SystemExit(f"--routings: {error}") from error
    names = [f"{backend} {routing}" for routing in routings for backend in options.backends]
    if options.apart:
        measured = visit_apart(names, options, extra)
    else:
        with ending_at_misuse():  # of what is left for the training
            measured = in_turns(names, options, extra)
    if options.raw:  # for the process that asked
        options.raw.write_text(json.dumps({name: asdict(m) for name, m in measured.items()}))
    elif measured:
        report(measured, options)


def parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=MODELS, default="small")
    add("--run", type=Path, help="a quickstart's folder, for its text (default: plain words)")
    add("--rounds", type=int, default=30, help="with --apart: of each visit")
    add("--settle", type=int, default=60, help="steps before the first round")
    add("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    add("--routings", nargs="+", default=ROUTINGS, help="top_k, dtop_p, dense; dtop_p@1.82 ...")
    add("--threads", type=int, default=1, help="of each process")
    add("--apart", action="store_true", help="one model at a time, in processes of their own")
    add("--visits", type=int, default=2, help="with --apart: of each provider")
    add("--seconds-budget", type=float, default=math.inf, help="no further visit would pass this")
    add("--output", type=Path, default=measure.RESULTS, help="folder (default: %(default)s)")
    add("--no-append", action="store_true", help="write no rows")
    add("--no-profile", action="store_true", help="measure no shares")
    add("--raw", type=Path, help=argparse.SUPPRESS)
    return parser


def in_turns(
    names: list[str], options: argparse.Namespace, extra: list[str]
) -> dict[str, Measured]:
    """Run all providers in this process, one step of each per round; {} on ranks other than 0."""
    from megatron_dynmoe.run import prepare

    if options.run and not (options.run / "data").is_dir():
        raise SystemExit(f"{options.run}/data is missing: run make quickstart, or leave out --run")
    torch.set_num_threads(options.threads)
    prepare()  # before anything of Megatron's is imported
    from benchmarks.step_profile import profiled_step
    from megatron_dynmoe.runs.metrics import floating_point_operations

    args = start_megatron(options.model, options.run, extra)
    world = int(os.environ["WORLD_SIZE"])
    torch.distributed.barrier()
    ceiling = world * measure.ceilings(args.params_dtype).flops_per_s
    providers = {
        name: build(args, backend, Routing.parse(routing))
        for name, (backend, routing) in ((name, name.split()) for name in names)
    }
    batches = text_batches(args, options.settle + options.rounds + 1)
    for batch in batches[: options.settle]:
        for provider in providers.values():
            train_one_step(provider, batch)
    if measure.on_gpu():
        torch.cuda.reset_peak_memory_stats()

    def next_step(provider: Any, remaining: Any) -> Step:
        return timed_step(provider, next(remaining))

    steps = measure.take_turns(
        {
            name: partial(next_step, provider, iter(batches[options.settle :]))
            for name, provider in providers.items()
        },
        options.rounds,
        warm_up=0,
    )
    peak = peak_memory_gb() if len(names) == 1 else None
    profiles = dict.fromkeys(providers, (None, None, ""))
    if not options.no_profile:
        profiles = {name: profiled_step(p, batches[-1]) for name, p in providers.items()}
    torch.distributed.barrier()
    if torch.distributed.get_rank():
        return {}
    workload = (
        f"train: {args.num_layers} layers, hidden {args.hidden_size}, ffn {args.ffn_hidden_size}, "
        f"{args.num_experts} experts, {args.global_batch_size * args.seq_length} tokens, "
        f"{args.params_dtype}".replace("torch.", "")
        + f", {world} process{'es' * (world > 1)}"
        + ("" if measure.on_gpu() else f", {options.threads} thread each")
        + (f", text of {options.run.name}" if options.run else ", words")
        + (", one model at a time" if options.raw else "")
    )
    return {
        name: Measured(
            workload,
            args.global_batch_size * args.seq_length,
            ceiling,
            floating_point_operations(
                provider.args,
                args.global_batch_size,
                statistics.fmean(step.experts_per_token for step in steps[name]),
            ),
            steps[name],
            *profiles[name],
            peak,
        )
        for name, provider in providers.items()
    }


def visit_apart(
    names: list[str], options: argparse.Namespace, extra: list[str]
) -> dict[str, Measured]:
    """Run each provider in a process of its own, ``--visits`` times, in turns."""
    if "RANK" in os.environ:
        raise SystemExit("--apart starts its processes itself: leave torchrun out")
    measured: dict[str, Measured] = {}
    stop, longest = time.monotonic() + options.seconds_budget, 0.0
    for visit, name in itertools.product(range(options.visits), names):
        begun = time.monotonic()
        if begun + longest > stop:
            print(f"the time is used up: {name} gets no visit {visit + 1}")
            continue
        result = one_visit(name, options, extra, stop - begun, no_profile=name in measured)
        longest = max(longest, time.monotonic() - begun)
        if result is None:
            continue
        print(f"{name}, visit {visit + 1}: {time.monotonic() - begun:.0f} s", flush=True)
        measured.setdefault(name, replace(result, steps=[])).steps += result.steps
    return measured


def one_visit(
    name: str, options: argparse.Namespace, extra: list[str], seconds: float, no_profile: bool
) -> Measured | None:
    """Measure one provider in another process that runs this script; None if that fails."""
    backend, routing = name.split()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "measured.json"
        command = [sys.executable, __file__, "--model", options.model, "--raw", str(raw)]
        command += ["--backends", backend, "--routings", routing]
        command += ["--rounds", str(options.rounds), "--settle", str(options.settle)]
        command += ["--threads", str(options.threads)]
        command += ["--run", str(options.run)] if options.run else []
        command += ["--no-profile"] if no_profile or options.no_profile else []
        try:
            subprocess.run(
                [*command, *extra],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=None if seconds == math.inf else seconds,
            )
        except subprocess.CalledProcessError as error:
            print(f"{name} failed:\n{error.stdout[-3000:]}", flush=True)
            return None
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped, the time is used up", flush=True)
            return None
        fields = json.loads(raw.read_text())[name]
    return Measured(**fields | {"steps": [Step(*values) for values in fields["steps"]]})


def peak_memory_gb() -> float:
    """The most bytes that this process has held, of the GPU's memory or resident."""
    if measure.on_gpu():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report(measured: dict[str, Measured], options: argparse.Namespace) -> None:
    """Print the medians and ratios; append the rows and profiles."""
    rows = [row(name, provider) for name, provider in measured.items()]
    for line in rows:
        print(" | ".join(f"{name} {value}" for name, value in list(line.items())[5:]))
    # What the project promises: the speed of the second, compared with the first.
    pairs = [(n, n.replace("local", "torch_native")) for n in measured if n.startswith("local")]
    pairs += [(n, o) for n in measured if n.endswith("top_k") for o in measured if o != n]
    for base, other in dict.fromkeys(pairs):
        same_backend = base.split()[0] == other.split()[0]
        if other in measured and (same_backend or base.split()[1] == other.split()[1]):
            rows.append(ratio_row(base, other, measured, paired=not options.apart))
            ratios = f"{rows[-1]['speed_ratio']} times as fast as {base}"
            print(f"{other} is {ratios}; by processor time {rows[-1]['processor_ratio']}")
    if not options.no_append:
        measure.append(options.output / "train_step.csv", rows)
        with (options.output / "train_step_profile.txt").open("a") as file:
            for name, provider in measured.items():
                print(f"{measure.COMMIT}, {provider.workload}, {name}", file=file)
                print(provider.profile, file=file)


def row(name: str, provider: Measured) -> dict[str, str]:
    seconds, processor_seconds, experts = zip(*provider.steps, strict=True)
    spread, data_sheet = measure.spread(seconds), measure.data_sheet_flops()
    flops_per_s = provider.flops / spread.median
    return measure.identity(*PACKAGES) | {
        "workload": provider.workload,
        "provider": name,
        "rounds": str(len(provider.steps)),
        "median_s": f"{spread.median:.4f}",
        "p20_s": f"{spread.p20:.4f}",
        "p80_s": f"{spread.p80:.4f}",
        "median_processor_s": f"{statistics.median(processor_seconds):.4f}",
        "tokens_per_s": f"{provider.tokens / spread.median:.0f}",
        "experts_per_token": f"{statistics.fmean(experts):.3f}",
        "load_1min": measure.load(),
        "tflops_per_s": f"{flops_per_s / 1e12:.4g}",
        "ceiling_tflops_per_s": f"{provider.ceiling_flops / 1e12:.4g}",
        "of_ceiling": f"{flops_per_s / provider.ceiling_flops:.3f}",
        "of_data_sheet": decimals(data_sheet and flops_per_s / data_sheet, 3),
        "roofline_s": f"{provider.flops / provider.ceiling_flops:.4f}",
        "routing_share": decimals(provider.routing_share, 4),
        "control_share": decimals(provider.control_share, 4),
        "peak_memory_gb": decimals(provider.peak_memory_gb, 2),
    }


def decimals(value: float | None, number: int) -> str:
    return "" if value is None else f"{value:.{number}f}"


def ratio_row(base: str, other: str, measured: dict[str, Measured], paired: bool) -> dict[str, str]:
    first, second = measured[base].steps, measured[other].steps
    ratios = [
        measure.ratio([s[field] for s in first], [s[field] for s in second], paired)
        for field in (Step._fields.index("seconds"), Step._fields.index("processor_seconds"))
    ]
    return measure.identity(*PACKAGES) | {
        "workload": measured[base].workload,
        "provider": f"{other} / {base}",
        "speed_ratio": str(ratios[0]),
        "processor_ratio": str(ratios[1]),
        "load_1min": measure.load(),
    }


if __name__ == "__main__":
    main()
