"""Compares the time of top-p selection, forward and backward, with Megatron's top-k.

    python benchmarks/select_experts.py [--experts 16,64,128,256] [--tokens 16384] [--logits FILE]

Each provider goes from float32 logits to weights and map, and back to the gradient of the logits.
Ours is the whole of DTop-p (normalize, softmax, select, weigh, counts, entropy and the sums of the
balance loss, with all their gradients). Stock is ``topk_routing_with_score_function`` with a
softmax after it, at the same mean number of experts. On CUDA the providers are the kernel, plain
PyTorch and stock, each also in a CUDA graph, and a copy of the bytes that the kernel must move.
They take turns in one process; the ratio of a round compares with stock in that round. Logits are
normal, and at 16 experts also those of a trained router (benchmarks/data/README.md). --logits takes
those of another router: a .pt file with a tensor [T, E], which benchmarks/collect_logits.py writes.
Rows are appended to OUTPUT/select.csv.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from benchmarks import measure
from benchmarks.logits import normal_logits, read_logits, trained_logits
from megatron_dynmoe import kernels
from megatron_dynmoe.control.calibrate import threshold_for_target
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.route import Routing, route
from megatron_dynmoe.settings.command_line import CommandParser

TARGETS = {16: 2, 64: 8, 128: 16, 256: 16}  # mean experts per token; stock's k
STOCK, OURS = "stock top-k", "ours"
PACKAGES = ("torch", "numpy", "megatron-core")
# For each element the kernel reads the logits twice, the map and the weights' gradient, and writes
# weights, map and the logits' gradient. A copy of half that sum reads and writes as much.
KERNEL_BYTES = (4 + 4 + 1) + (4 + 1 + 4 + 4)
GPU_TURN_SECONDS = 2e-3  # calls are repeated to fill it: a clock cannot see a few microseconds


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--experts", default="16,64,128,256", help="default: %(default)s")
    add("--tokens", type=int, default=16384)
    add("--rounds", type=int, default=40)
    add("--logits", type=Path, help="a .pt file with a trained router's, [T, E]; no others then")
    add("--seconds-budget", type=float, default=math.inf, help="of all cases together")
    add("--output", type=Path, default=measure.RESULTS, help="folder (default: %(default)s)")
    args = parser.parse_args()
    if args.logits:
        try:
            cases = [("trained", read_logits(args.logits))]
        except ValueError as error:
            parser.error(str(error))
    else:
        numbers = [int(number) for number in args.experts.split(",")]
        cases = [("normal", normal_logits(args.tokens, number)) for number in numbers]
        if 16 in numbers:
            cases.append(("trained", trained_logits(args.tokens)))
    device = torch.device("cuda" if measure.on_gpu() else "cpu")
    ceilings = measure.ceilings(torch.float32)
    for kind, logits in cases:
        seconds = args.seconds_budget / len(cases)
        leaf = logits.to(device).requires_grad_()
        measure.append(
            args.output / "select.csv", compare(kind, leaf, args.rounds, seconds, ceilings)
        )


def compare(
    kind: str, logits_TE: torch.Tensor, rounds: int, seconds: float, ceilings: measure.Ceilings
) -> list[dict[str, str]]:
    """The rows of all providers on these logits, which are a leaf that requires a gradient."""
    num_tokens, num_experts = logits_TE.shape
    target = TARGETS.get(num_experts, max(1, num_experts // 8))
    probs_TE = normalize(logits_TE.detach(), 1.0).softmax(-1)
    threshold = torch.tensor([threshold_for_target(probs_TE, target)], device=logits_TE.device)
    routed = route(logits_TE.detach(), threshold, theta=threshold.new_ones(1))
    mean = routed.experts_T.double().mean().item()
    running, failures = measure.without_failing(make_providers(logits_TE, threshold, target))
    turns = {name: partial(one_turn, call, repeats(call)) for name, call in running.items()}
    if STOCK not in running:
        raise SystemExit(f"{STOCK} does not run, and everything is compared with it")
    taken = measure.take_turns(turns, rounds, seconds=seconds)
    workload = f"{num_tokens} tokens, {num_experts} experts, {kind} logits"
    workload += "" if measure.on_gpu() else f", {torch.get_num_threads()} threads"
    roofline = ceilings.seconds(num_bytes=logits_TE.numel() * KERNEL_BYTES)
    rows = []
    for name, values in taken.items():
        experts = target if name.startswith(STOCK) else mean
        rows.append(row(workload, name, values, taken[STOCK], experts, roofline))
        print(
            f"{workload}: {name}: {rows[-1]['median_ms']} ms, "
            f"{rows[-1]['median_ratio_to_stock']} of stock "
            f"({rows[-1]['p20_ratio']} to {rows[-1]['p80_ratio']}), "
            f"{rows[-1]['times_roofline']} times the roofline, load {rows[-1]['load_1min']}",
            flush=True,
        )
    failed = measure.identity(*PACKAGES) | {"workload": workload}
    return rows + [failed | {"provider": n, "failed": why} for n, why in failures.items()]


def make_providers(
    logits_TE: torch.Tensor, threshold: torch.Tensor, k: int
) -> dict[str, Callable[[], object]]:
    """By name, functions that do one forward and backward pass."""
    theta = torch.ones(1, device=logits_TE.device, requires_grad=True)
    d_weights_TE = torch.randn_like(logits_TE)
    d_sums_BE, one = torch.randn_like(logits_TE[:1]), torch.ones((), device=logits_TE.device)

    def ours(implementation: Callable[..., Routing]) -> None:
        logits_TE.grad = theta.grad = None
        routed = implementation(logits_TE, threshold, theta=theta, renormalize=True)
        torch.autograd.backward(
            (routed.weights_TE, routed.prob_sums_BE, routed.entropy), (d_weights_TE, d_sums_BE, one)
        )

    def stock() -> None:
        logits_TE.grad = None
        weights_TE, _ = topk_routing_with_score_function(logits_TE, k)
        weights_TE.backward(d_weights_TE)

    providers: dict[str, Callable[[], object]] = {
        STOCK: stock,
        "ours, readable": partial(ours, route),
    }
    fastest = kernels.choose_route(logits_TE.detach())
    if fastest is not route:
        providers[OURS] = partial(ours, fastest)
    if measure.on_gpu():
        providers |= {f"{name}, CUDA graph": Graphed(f) for name, f in providers.items()}
        source = torch.empty(
            logits_TE.numel() * KERNEL_BYTES // 2, dtype=torch.int8, device=logits_TE.device
        )
        target = torch.empty_like(source)
        providers["copy of the bytes"] = lambda: target.copy_(source)
    return providers


class Graphed:
    """A function as a CUDA graph, captured when it is first called."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is None:
            self.graph = self._captured()
        self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.function()
        return graph


def repeats(function: Callable[[], object]) -> int:
    """How many calls a turn consists of."""
    if not measure.on_gpu():
        return 1
    one = min(measure.timed(function)[0] for _ in range(3))
    return max(1, round(GPU_TURN_SECONDS / one))


def one_turn(function: Callable[[], object], repeats: int) -> float:
    return measure.timed(function, repeats=repeats)[0]


def row(
    workload: str,
    name: str,
    seconds: list[float],
    stock: list[float],
    experts: float,
    roofline: float,
) -> dict[str, str]:
    spread = measure.spread(seconds)
    ratios = measure.spread([one / base for one, base in zip(seconds, stock, strict=True)])
    interval = measure.ratio(seconds, stock)
    return measure.identity(*PACKAGES) | {
        "workload": workload,
        "provider": name,
        "rounds": str(len(seconds)),
        "median_ms": f"{1e3 * spread.median:.4g}",
        "p20_ms": f"{1e3 * spread.p20:.4g}",
        "p80_ms": f"{1e3 * spread.p80:.4g}",
        "median_ratio_to_stock": f"{ratios.median:.3f}",
        "p20_ratio": f"{ratios.p20:.3f}",
        "p80_ratio": f"{ratios.p80:.3f}",
        "mean_experts": f"{experts:.3f}",
        "load_1min": measure.load(),
        "ratio_low": f"{interval.low:.3f}",
        "ratio_high": f"{interval.high:.3f}",
        "roofline_ms": f"{1e3 * roofline:.4g}",
        "times_roofline": f"{spread.median / roofline:.2f}",
    }


if __name__ == "__main__":
    main()
