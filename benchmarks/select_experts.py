"""Compares the time of top-p selection, forward and backward, with Megatron's top-k.

    python benchmarks/select_experts.py [--experts 16,64,128,256] [--tokens 16384] [--logits FILE]

From float32 logits to weights and map and back to the logits' gradient. Ours is the whole of DTop-p
(normalize, softmax, select, weigh, counts, entropy and the sums of the balance loss, all their
gradients); stock is ``topk_routing_with_score_function`` with a softmax after it, at the same mean
number of experts. On CUDA: the kernel, plain PyTorch and stock, all also in a CUDA graph, and a
copy of the bytes that the kernel must move. The providers take turns, on CUDA each in a process of
its own; a round's ratio is against stock in that round. Logits are normal, and at 16 experts also
those of a trained router (benchmarks/data/README.md). --logits takes another's: a .pt file with a
tensor [T, E], which benchmarks/collect_logits.py writes. Rows are appended to OUTPUT/select.csv; a
provider that fails has one that says why.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from benchmarks import ceilings, measure
from benchmarks.logits import normal_logits, read_logits, trained_logits
from benchmarks.places import Failed, Turns, new_place
from megatron_dynmoe import kernels
from megatron_dynmoe.control.calibrate import threshold_for_target
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.route import Routing, route
from megatron_dynmoe.settings.messages.command_line import CommandParser

TARGETS = {16: 2, 64: 8, 128: 16, 256: 16}  # mean experts per token; stock's k
STOCK, OURS, READABLE = "stock top-k", "ours", "ours, readable"
COPY, GRAPH = "copy of the bytes", ", CUDA graph"
RATIOS = ("median_ratio_to_stock", "p20_ratio", "p80_ratio", "ratio_low", "ratio_high")
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
    rows = measure.Rows(args.output / "select.csv", *PACKAGES)
    numbers = [int(number) for number in args.experts.split(",")]
    cases = [Case("normal", args.tokens, number) for number in numbers]
    cases += [Case("trained", args.tokens, 16)] if 16 in numbers else []
    if args.logits:
        try:
            cases = [Case("trained", *read_logits(args.logits).shape, args.logits)]
        except ValueError as error:
            parser.error(str(error))
    with closing(new_place()) as place:
        limits = place.run(ceilings.of_this_machine, torch.float32)
    with Turns() as turns:
        for case in cases:
            compare(turns, case, args.rounds, args.seconds_budget / len(cases), limits, rows)


class Case(NamedTuple):
    """Logits, and from where they are."""

    kind: str
    tokens: int
    experts: int
    file: Path | None = None

    @property
    def target(self) -> int:
        """Mean experts per token."""
        return TARGETS.get(self.experts, max(1, self.experts // 8))

    def logits(self) -> torch.Tensor:
        """[T, E] float32, on the CPU."""
        if self.file:
            return read_logits(self.file)
        if self.kind == "trained":
            return trained_logits(self.tokens)
        return normal_logits(self.tokens, self.experts)


def compare(
    turns: Turns,
    case: Case,
    rounds: int,
    seconds: float,
    limits: ceilings.Ceilings,
    rows: measure.Rows,
) -> None:
    """Measure and write down all providers on these logits."""
    workload = f"{case.tokens} tokens, {case.experts} experts, {case.kind} logits"
    workload += "" if measure.on_gpu() else f", {torch.get_num_threads()} threads"
    roofline = limits.seconds(num_bytes=case.tokens * case.experts * KERNEL_BYTES)

    def failed(name: str, failure: Failed) -> None:
        rows.put({"workload": workload, "provider": name, "failed": str(failure)})

    turns.make({name: (Selection, name, case) for name in names()}, failed)
    means = turns.ask_all(Selection.mean)
    taken = turns.take(Selection.turn, rounds, seconds=seconds)
    stock = taken.get(STOCK)
    for name, values in taken.items():
        experts = case.target if name.startswith(STOCK) else means[name]
        written = rows.put(row(workload, name, values, stock, experts, roofline))
        print(
            f"{workload}: {name}: {written['median_ms']} ms, "
            f"{written['median_ratio_to_stock']} of stock "
            f"({written['p20_ratio']} to {written['p80_ratio']}), "
            f"{written['times_roofline']} times the roofline, load {written['load_1min']}",
            flush=True,
        )


def names() -> list[str]:
    """The providers of this machine."""
    found = [STOCK, READABLE]
    found += [OURS] if kernels.choose_route(torch.ones(1, 2, device=device())) is not route else []
    if measure.on_gpu():
        found += [f"{name}{GRAPH}" for name in found]
        found += [COPY]
    return found


def device() -> torch.device:
    return torch.device("cuda" if measure.on_gpu() else "cpu")


class Selection:
    """A provider: one forward and backward pass, as often as makes a turn."""

    def __init__(self, name: str, case: Case) -> None:
        self._logits_TE = case.logits().to(device()).requires_grad_()
        probs_TE = normalize(self._logits_TE.detach(), 1.0).softmax(-1)
        threshold = threshold_for_target(probs_TE, case.target)
        self._threshold = torch.tensor([threshold], device=device())
        function = self._pass(name.removesuffix(GRAPH), case.target)
        self._function = Graphed(function) if name.endswith(GRAPH) else function
        self._function()  # compiles and captures
        self._repeats = repeats(self._function)

    def turn(self) -> float:
        """Seconds of a pass."""
        return measure.timed(self._function, repeats=self._repeats)[0]

    def mean(self) -> float:
        """Experts per token."""
        theta = self._threshold.new_ones(1)
        routed = route(self._logits_TE.detach(), self._threshold, theta=theta)
        return routed.experts_T.double().mean().item()

    def _pass(self, name: str, k: int) -> Callable[[], object]:
        logits_TE, threshold = self._logits_TE, self._threshold
        theta = torch.ones(1, device=device(), requires_grad=True)
        d_weights_TE = torch.randn_like(logits_TE)
        d_sums_BE, one = torch.randn_like(logits_TE[:1]), torch.ones((), device=device())

        def ours(implementation: Callable[..., Routing]) -> None:
            logits_TE.grad = theta.grad = None
            routed = implementation(logits_TE, threshold, theta=theta, renormalize=True)
            torch.autograd.backward(
                (routed.weights_TE, routed.prob_sums_BE, routed.entropy),
                (d_weights_TE, d_sums_BE, one),
            )

        def stock() -> None:
            logits_TE.grad = None
            weights_TE, _ = topk_routing_with_score_function(logits_TE, k)
            weights_TE.backward(d_weights_TE)

        if name == COPY:
            num_bytes = logits_TE.numel() * KERNEL_BYTES // 2
            source = torch.empty(num_bytes, dtype=torch.int8, device=device())
            target = torch.empty_like(source)
            return lambda: target.copy_(source)
        if name == STOCK:
            return stock
        return partial(
            ours, route if name == READABLE else kernels.choose_route(logits_TE.detach())
        )


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


def row(
    workload: str,
    name: str,
    seconds: list[float],
    stock: list[float] | None,
    experts: float,
    roofline: float,
) -> dict[str, str]:
    """The columns; those of ratios are empty if stock has failed."""
    spread = measure.spread(seconds)
    columns = {
        "workload": workload,
        "provider": name,
        "rounds": str(len(seconds)),
        "median_ms": f"{1e3 * spread.median:.4g}",
        "p20_ms": f"{1e3 * spread.p20:.4g}",
        "p80_ms": f"{1e3 * spread.p80:.4g}",
        "mean_experts": f"{experts:.3f}",
        "load_1min": measure.load(),
        "roofline_ms": f"{1e3 * roofline:.4g}",
        "times_roofline": f"{spread.median / roofline:.2f}",
    }
    columns |= dict.fromkeys(RATIOS, "")
    if stock:
        ratios = measure.spread([one / base for one, base in zip(seconds, stock, strict=True)])
        interval = measure.ratio(seconds, stock)
        values = (*ratios, interval.low, interval.high)
        columns |= {name: f"{value:.3f}" for name, value in zip(RATIOS, values, strict=True)}
    return columns


if __name__ == "__main__":
    main()
