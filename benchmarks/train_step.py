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
experts of every token, so that the host need not wait for their number. --references adds
Transformers' Mixtral of the same shape, with the same batches and PyTorch's AdamW; its experts are
computed as in hf_grouped_mm or hf_eager. Further flags are Megatron's, and override the model's.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import ceilings, measure
from benchmarks.places import Apart, Failed, Here, Turns
from benchmarks.training import (
    MODELS,
    REFERENCE,
    Routing,
    Step,
    build,
    flops_of_a_step,
    start_megatron,
    text_batches,
    timed_step,
)
from benchmarks.training import step as train_one_step
from megatron_dynmoe.settings.messages.command_line import CommandParser
from megatron_dynmoe.settings.messages.exits import exiting_on_misuse

BACKENDS = ("local", "torch_native")
ROUTINGS = ("top_k", "dtop_p")
REFERENCES = ("hf_grouped_mm", "hf_eager")
PACKAGES = ("torch", "megatron-core", "transformers")


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
    names += [f"{reference} top_k" for reference in options.references]
    path = None if options.no_append else options.output / "train_step.csv"
    rows = measure.Rows(path, *PACKAGES)
    options.apart |= measure.on_gpu() and "RANK" not in os.environ
    if options.apart:
        visit_apart(names, options, extra, rows)
        return
    with exiting_on_misuse():  # of what is left for the training
        measured, failures = in_turns(names, options, extra)
    for name, why in failures.items():
        rows.put(failed_row(name, why, options))
    if measured:
        write(measured, rows, options, profiled=measured)
        tell(rows)


def parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=MODELS, default="small")
    add("--run", type=Path, help="a quickstart's folder, for its text (default: plain words)")
    add("--rounds", type=int, default=30, help="with --apart: of each visit")
    add("--settle", type=int, default=60, help="steps before the first round")
    add("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    add("--routings", nargs="+", default=ROUTINGS, help="top_k, dtop_p, dense; dtop_p@1.82 ...")
    add("--references", nargs="+", default=(), choices=REFERENCES, help="Transformers' Mixtral")
    add("--threads", type=int, default=1, help="of each process")
    add("--apart", action="store_true", help="one model at a time, in processes of their own")
    add("--visits", type=int, default=2, help="with --apart: of each provider")
    add("--seconds-budget", type=float, default=math.inf, help="no further visit would pass this")
    add("--output", type=Path, default=measure.RESULTS, help="folder (default: %(default)s)")
    add("--no-append", action="store_true", help="write no rows")
    add("--no-profile", action="store_true", help="measure no shares")
    return parser


def in_turns(
    names: list[str], options: argparse.Namespace, extra: list[str]
) -> tuple[dict[str, Measured], dict[str, str]]:
    """All providers in this process, one step of each a round.

    Returns:
        Those that run, and why others do not. Both are empty but on the first rank.
    """
    from megatron_dynmoe.run import prepare

    if options.run and not (options.run / "data").is_dir():
        raise SystemExit(f"{options.run}/data is missing: run make quickstart, or leave out --run")
    torch.set_num_threads(options.threads)
    prepare()  # before anything of Megatron's is imported
    from benchmarks.step_profile import profiled_step

    args = start_megatron(options.model, options.run, extra)
    world = int(os.environ["WORLD_SIZE"])
    torch.distributed.barrier()
    ceiling = world * ceilings.of_this_machine(args.params_dtype).flops_per_s
    batches = text_batches(args, options.settle + options.rounds + 1)
    failures: dict[str, str] = {}
    turns = Turns(Here)
    turns.make(
        {name: (build, args, batches, *name.split()) for name in names},
        lambda name, failure: failures.update({name: str(failure)}),
    )
    for _ in range(options.settle):
        turns.ask_all(train_one_step)
    if measure.on_gpu():
        torch.cuda.reset_peak_memory_stats()
    steps = turns.take(timed_step, options.rounds, warm_up=0)
    peak = peak_memory_gb() if len(names) == 1 else None
    flops = {
        name: turns.ask(name, flops_of_a_step, statistics.fmean(s.experts_per_token for s in taken))
        for name, taken in steps.items()
    }
    profiles = {} if options.no_profile else turns.ask_all(profiled_step)
    torch.distributed.barrier()
    if torch.distributed.get_rank():
        return {}, {}
    workload = (
        f"train: {args.num_layers} layers, hidden {args.hidden_size}, ffn {args.ffn_hidden_size}, "
        f"{args.num_experts} experts, {args.global_batch_size * args.seq_length} tokens, "
        f"{args.params_dtype}".replace("torch.", "")
        + f", {world} process{'es' * (world > 1)}"
        + ("" if measure.on_gpu() else f", {options.threads} thread each")
        + (f", text of {options.run.name}" if options.run else ", words")
        + (", one model at a time" if options.apart else "")
    )
    measured = {
        name: Measured(
            workload,
            args.global_batch_size * args.seq_length,
            ceiling,
            flops[name],
            taken,
            *profiles.get(name, (None, None, failures.get(name, ""))),
            peak,
        )
        for name, taken in steps.items()
    }
    return measured, failures


def visit_apart(
    names: list[str], options: argparse.Namespace, extra: list[str], rows: measure.Rows
) -> None:
    """Each provider in a process of its own, ``--visits`` times, in turns, with rows after each."""
    if "RANK" in os.environ:
        raise SystemExit("--apart starts its processes itself: leave torchrun out")
    measured: dict[str, Measured] = {}
    failed: set[str] = set()
    stop, longest = time.monotonic() + options.seconds_budget, 0.0
    for visit, name in itertools.product(range(options.visits), names):
        begun = time.monotonic()
        if begun + longest > stop:
            print(f"the time is used up: {name} gets no visit {visit + 1}", flush=True)
        if begun + longest > stop or name in failed:
            continue
        try:
            result = one_visit(name, options, extra, stop - begun, no_profile=name in measured)
        except Failed as failure:
            failed.add(name)
            print(f"{name} is left out: {failure}", flush=True)
            rows.put(failed_row(name, str(failure), options))
            continue
        longest = max(longest, time.monotonic() - begun)
        print(f"{name}, visit {visit + 1}: {time.monotonic() - begun:.0f} s", flush=True)
        first = [name] if name not in measured else []
        measured.setdefault(name, replace(result, steps=[])).steps += result.steps
        write(measured, rows, options, profiled=first)
    tell(rows)


def one_visit(
    name: str, options: argparse.Namespace, extra: list[str], seconds: float, no_profile: bool
) -> Measured:
    """What another process measures of one provider.

    Raises:
        Failed: it does not run, or not in this time.
    """
    options = argparse.Namespace(**vars(options))
    options.no_profile |= no_profile
    with closing(Apart()) as place:
        return place.run(alone, name, options, extra, seconds=seconds)


def alone(name: str, options: argparse.Namespace, extra: list[str]) -> Measured:
    """One provider in this process.

    Raises:
        Failed: it does not run.
    """
    measured, failures = in_turns([name], options, extra)
    if name not in measured:
        raise Failed(failures[name])
    return measured[name]


def peak_memory_gb() -> float:
    """The most bytes that this process has held, of the GPU's memory or resident."""
    if measure.on_gpu():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write(
    measured: dict[str, Measured],
    rows: measure.Rows,
    options: argparse.Namespace,
    profiled: Iterable[str],
) -> None:
    """Put down what is known by now, in place of what was known before.

    Args:
        profiled: whose profiles are new.
    """
    for name, provider in measured.items():
        rows.put(row(name, provider), name=name)
    # What the project promises: the speed of the second against the first.
    pairs = [(n, n.replace("local", "torch_native")) for n in measured if n.startswith("local")]
    pairs += [(n, o) for n in measured if n.endswith("top_k") for o in measured if o != n]
    for base, other in dict.fromkeys(pairs):
        if other not in measured or other.startswith(REFERENCE):
            continue
        (of, by), (other_of, other_by) = base.split(), other.split()
        if of == other_of or by == other_by or of.startswith(REFERENCE):
            rows.put(ratio_row(base, other, measured, paired=not options.apart), name=(base, other))
    if not options.no_append:
        with (options.output / "train_step_profile.txt").open("a") as file:
            for name in profiled:
                print(f"{measure.COMMIT}, {measured[name].workload}, {name}", file=file)
                print(measured[name].profile, file=file)


def tell(rows: measure.Rows) -> None:
    """Print the rows."""
    for line in rows.new:
        if "speed_ratio" in line:
            other, base = line["provider"].split(" / ")
            print(
                f"{other} is {line['speed_ratio']} times as fast as {base}; "
                f"by processor time {line['processor_ratio']}"
            )
        else:
            print(" | ".join(f"{name} {value}" for name, value in list(line.items())[5:]))


def row(name: str, provider: Measured) -> dict[str, str]:
    seconds, processor_seconds, experts = zip(*provider.steps, strict=True)
    spread, data_sheet = measure.spread(seconds), ceilings.data_sheet_flops()
    flops_per_s = provider.flops / spread.median
    return {
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


def failed_row(name: str, why: str, options: argparse.Namespace) -> dict[str, str]:
    return {"workload": f"train: {options.model}", "provider": name, "failed": why}


def decimals(value: float | None, number: int) -> str:
    return "" if value is None else f"{value:.{number}f}"


def ratio_row(base: str, other: str, measured: dict[str, Measured], paired: bool) -> dict[str, str]:
    first, second = measured[base].steps, measured[other].steps
    ratios = [
        measure.ratio([s[field] for s in first], [s[field] for s in second], paired)
        for field in (Step._fields.index("seconds"), Step._fields.index("processor_seconds"))
    ]
    return {
        "workload": measured[base].workload,
        "provider": f"{other} / {base}",
        "speed_ratio": str(ratios[0]),
        "processor_ratio": str(ratios[1]),
        "load_1min": measure.load(),
    }


if __name__ == "__main__":
    main()
