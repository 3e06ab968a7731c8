"""Measures time, memory and utilization of one MoE layer, forward and backward.

    python benchmarks/layer.py [--workloads a b] [--threads 2]

Workload a is a layer of Dynamic MoE (hidden 1024, FFN 2816, 16 experts, mean 2, 16384 tokens),
workload b is SonicMoE's (hidden 1536, FFN 256, 128 experts, mean 8, 24576 tokens). A GPU runs them
at this size in bf16, a CPU at a quarter of each size in float32. The routing is real, never
balanced by force. The first of the hidden states are the router's logits, and the gate passes them
on, so every provider routes by the same logits: those of a trained router for 16 experts, normal
ones for 128, or those of --logits. DTop-p's threshold is calibrated on them, and the mean is
measured. The providers are:

    ours                   DTop-p on torch_native, with kernels on a GPU
    ours, no kernels       the same in PyTorch alone
    ours, worst-case rows  memory for twice the mean, so that the host need not wait for the count
    plain reference        DTop-p on Megatron's local experts, without kernels
    stock top-k, BACKEND   Megatron's own
    dense                  an MLP as wide as the experts that a token uses

They take turns in one process. Rows are appended to OUTPUT/layer.csv, the costliest operations of
ours and of stock to OUTPUT/layer_profile.txt.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.layer_providers import (
    DENSE,
    OURS,
    STOCK,
    WORKLOADS,
    Provider,
    Workload,
    make_providers,
    start_megatron,
)
from benchmarks.logits import normal_logits, read_logits, trained_logits
from megatron_dynmoe.settings.command_line import CommandParser

PACKAGES = ("torch", "megatron-core")


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    add("--rounds", type=int, default=20)
    add("--seconds-budget", type=float, default=math.inf, help="of all rounds together")
    add("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    add("--logits", type=Path, help="a .pt file with a trained router's, [T, E]; one workload then")
    add("--sequence", type=int, help="tokens of a sequence, for a quick look")
    add("--output", type=Path, default=measure.RESULTS, help="folder (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start_megatron()
    for name in args.workloads:
        workload = WORKLOADS[name] if measure.on_gpu() else WORKLOADS[name].scaled_down()
        if args.sequence:
            workload = workload._replace(sequence=args.sequence)
        kind, logits_TE = logits_for(workload, args.logits)
        rows, profiles = compare(
            f"layer {name}", workload, kind, logits_TE, args.rounds,
            args.seconds_budget / len(args.workloads),
        )  # fmt: skip
        measure.append(args.output / "layer.csv", rows)
        with (args.output / "layer_profile.txt").open("a") as file:
            file.write(profiles)


def logits_for(workload: Workload, path: Path | None) -> tuple[str, torch.Tensor]:
    """The kind of the logits, and the logits [T, E]."""
    if path is not None:
        try:
            logits_TE = read_logits(path)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        if logits_TE.shape[1] != workload.experts:
            raise SystemExit(
                f"--logits {path} is for {logits_TE.shape[1]} experts, the workload has "
                f"{workload.experts}: name one that fits by --workloads"
            )
        repeated = logits_TE.repeat(-(-workload.tokens // len(logits_TE)), 1)
        return "trained", repeated[: workload.tokens]
    if workload.experts == 16:
        return "trained", trained_logits(workload.tokens)
    return "normal", normal_logits(workload.tokens, workload.experts)


def compare(
    name: str,
    workload: Workload,
    kind: str,
    logits_TE: torch.Tensor,
    rounds: int,
    seconds: float,
) -> tuple[list[dict[str, str]], str]:
    """The rows of all providers of a workload, and their profiles."""
    dtype = torch.bfloat16 if measure.on_gpu() else torch.float32
    ceilings = measure.ceilings(dtype)
    providers = make_providers(workload, logits_TE, dtype)
    running, failures = measure.without_failing({n: p.timed for n, p in providers.items()})
    taken = measure.take_turns(running, rounds, seconds=seconds)
    label = (
        f"{name}: hidden {workload.hidden}, ffn {workload.ffn}, {workload.experts} experts, "
        f"{workload.tokens} tokens, {str(dtype).removeprefix('torch.')}, {kind} logits"
    )
    label += "" if measure.on_gpu() else f", {torch.get_num_threads()} threads"
    stock = [sum(both) for both in taken.get(STOCK, [])]
    rows, profiles = [], ""
    for provider_name, times in taken.items():
        provider = providers[provider_name]
        speed = str(measure.ratio(stock, [sum(both) for both in times])) if stock else ""
        rows.append(row(label, provider_name, workload, provider, times, ceilings, speed))
        print(
            f"{label}: {provider_name}: {rows[-1]['forward_ms']} + {rows[-1]['backward_ms']} ms, "
            f"{speed} times as fast as stock, {rows[-1]['of_ceiling']} of the ceiling, "
            f"{rows[-1]['peak_mb']} MB, load {rows[-1]['load_1min']}",
            flush=True,
        )
        if provider_name in (OURS, STOCK):
            profiles += f"{measure.COMMIT}, {label}, {provider_name}\n{provider.operations()}\n"
        provider.clear()
    failed = measure.identity(*PACKAGES) | {"workload": label}
    rows += [failed | {"provider": n, "failed": why} for n, why in failures.items()]
    return rows, profiles


def row(
    label: str,
    name: str,
    workload: Workload,
    provider: Provider,
    times: list[tuple[float, ...]],
    ceilings: measure.Ceilings,
    speed: str,
) -> dict[str, str]:
    forward, backward, both = (
        measure.spread(seconds) for seconds in (*zip(*times, strict=True), [sum(t) for t in times])
    )
    flops = workload.flops(provider.experts_per_token, dense=name == DENSE)
    itemsize = provider.hidden_SBD.element_size()
    roofline = ceilings.seconds(flops, workload.least_bytes(itemsize, dense=name == DENSE))
    data_sheet, memory = measure.data_sheet_flops(), provider.memory()
    return measure.identity(*PACKAGES) | {
        "workload": label,
        "provider": name,
        "rounds": str(len(times)),
        "forward_ms": f"{1e3 * forward.median:.4g}",
        "forward_p20_ms": f"{1e3 * forward.p20:.4g}",
        "forward_p80_ms": f"{1e3 * forward.p80:.4g}",
        "backward_ms": f"{1e3 * backward.median:.4g}",
        "backward_p20_ms": f"{1e3 * backward.p20:.4g}",
        "backward_p80_ms": f"{1e3 * backward.p80:.4g}",
        "both_ms": f"{1e3 * both.median:.4g}",
        "tokens_per_s": f"{workload.tokens / both.median:.0f}",
        "experts_per_token": f"{provider.experts_per_token:.3f}",
        "speed_ratio": speed,
        "held_mb": f"{memory.held / 1e6:.4g}",
        "peak_mb": f"{memory.peak / 1e6:.4g}",
        "tflops_per_s": f"{flops / both.median / 1e12:.4g}",
        "ceiling_tflops_per_s": f"{ceilings.flops_per_s / 1e12:.4g}",
        "ceiling_gb_per_s": f"{ceilings.bytes_per_s / 1e9:.4g}",
        "of_ceiling": f"{flops / both.median / ceilings.flops_per_s:.3f}",
        "of_data_sheet": f"{flops / both.median / data_sheet:.3f}" if data_sheet else "",
        "roofline_ms": f"{1e3 * roofline:.4g}",
        "times_roofline": f"{both.median / roofline:.2f}",
        "load_1min": measure.load(),
    }


if __name__ == "__main__":
    main()
