"""Time of top-p selection, forward and backward, against Megatron's top-k.

    python benchmarks/select_experts.py [--experts 16,64,128,256] [--tokens 16384] [--logits FILE]

From float32 logits to weights and map and back to the logits' gradient. Ours is the whole of DTop-p
(normalize, softmax, select, weigh, counts, entropy and the sums of the balance loss, all their
gradients); stock is ``topk_routing_with_score_function`` with a softmax after it, at the same mean
number of experts. On CUDA: the kernel and plain PyTorch, both also in a CUDA graph, and a copy of
the bytes that the kernel must move. The providers take turns in one process; a round's ratio is
against stock in that round. Logits are normal unless a file holds a tensor [T, E] of a trained
router's. Rows are appended to benchmarks/results/select.csv.
"""

import argparse
import csv
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from megatron_dynmoe import kernels
from megatron_dynmoe.control.calibrate import threshold_for_target
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.route import route

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "select.csv"
PACKAGES = ("torch", "numpy", "megatron-core")
TARGETS = {16: 2, 64: 8, 128: 16, 256: 16}  # mean experts per token; stock's k
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# Of an element, the kernel reads logits twice, map and the weights' gradient, and writes weights,
# map and the logits' gradient: a copy of half the sum reads and writes as much.
KERNEL_BYTES = (4 + 4 + 1) + (4 + 1 + 4 + 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default="16,64,128,256", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--logits", type=Path, help="a .pt file with a trained router's, [T, E]")
    args = parser.parse_args()
    if args.logits:
        cases = [("trained", torch.load(args.logits, weights_only=True).float())]
    else:
        torch.manual_seed(0)
        cases = [
            ("normal", torch.randn(args.tokens, num_experts))
            for num_experts in map(int, args.experts.split(","))
        ]
    for kind, logits in cases:
        measure(kind, logits.to(DEVICE).requires_grad_(), args.rounds)


def measure(kind: str, logits_TE: torch.Tensor, rounds: int) -> None:
    num_tokens, num_experts = logits_TE.shape
    target = TARGETS.get(num_experts, max(1, num_experts // 8))
    probs_TE = normalize(logits_TE.detach(), 1.0).softmax(-1)
    threshold = torch.tensor([threshold_for_target(probs_TE, target)], device=DEVICE)
    mean = route(logits_TE.detach(), threshold, theta=threshold.new_ones(1)).experts_T
    providers = make_providers(logits_TE, threshold, target)
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(rounds + 3):  # the first three warm up
        for name, function in providers.items():
            elapsed = timed(function)
            if turn >= 3:
                seconds[name].append(elapsed)
    workload = f"{num_tokens} tokens, {num_experts} experts, {kind} logits, {device_threads()}"
    experts = {name: mean.double().mean().item() for name in providers}
    experts["stock top-k"] = target
    rows = [
        row(workload, name, values, seconds["stock top-k"], experts[name])
        for name, values in seconds.items()
    ]
    for line in rows:
        print(
            f"{workload}: {line['provider']}: {line['median_ms']} ms, "
            f"{line['median_ratio_to_stock']} of stock "
            f"({line['p20_ratio']} to {line['p80_ratio']}), load {line['load_1min']}"
        )
    append(rows)


def make_providers(
    logits_TE: torch.Tensor, threshold: torch.Tensor, k: int
) -> dict[str, Callable[[], None]]:
    """Name to a function that does one forward and backward pass."""
    theta = torch.ones(1, device=DEVICE, requires_grad=True)
    d_weights_TE = torch.randn_like(logits_TE)
    d_sums_BE, one = torch.randn_like(logits_TE[:1]), torch.ones((), device=DEVICE)

    def ours(use_kernel: bool) -> None:
        logits_TE.grad = theta.grad = None
        routed = route(logits_TE, threshold, theta=theta, renormalize=True, use_kernel=use_kernel)
        torch.autograd.backward(
            (routed.weights_TE, routed.prob_sums_BE, routed.entropy), (d_weights_TE, d_sums_BE, one)
        )

    def stock() -> None:
        logits_TE.grad = None
        weights_TE, _ = topk_routing_with_score_function(logits_TE, k)
        weights_TE.backward(d_weights_TE)

    providers = {"stock top-k": stock, "ours, plain": lambda: ours(False)}
    if kernels.available(DEVICE):
        providers["ours, kernel"] = lambda: ours(True)
        source = torch.empty(logits_TE.numel() * KERNEL_BYTES // 2, dtype=torch.int8, device=DEVICE)
        target = torch.empty_like(source)
        providers["copy of the bytes"] = lambda: target.copy_(source)
    if CUDA:
        for name in [name for name in providers if name.startswith("ours")]:
            providers[f"{name}, CUDA graph"] = graphed(providers[name])
    return providers


def graphed(function: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def timed(function: Callable[[], None]) -> float:
    """Seconds of one call."""
    if CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def device_threads() -> str:
    return torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads"


def row(
    workload: str, name: str, seconds: list[float], stock: list[float], experts: float
) -> dict[str, str]:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    ratios = [one / base for one, base in zip(seconds, stock, strict=True)]
    ratio_20, *_, ratio_80 = statistics.quantiles(ratios, n=5, method="inclusive")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    return {
        "date": date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPUs, {cpu_model()}",
        "versions": ", ".join([f"python {platform.python_version()}", *versions]),
        "workload": workload,
        "provider": name,
        "rounds": str(len(seconds)),
        "median_ms": f"{1e3 * statistics.median(seconds):.3f}",
        "p20_ms": f"{1e3 * p20:.3f}",
        "p80_ms": f"{1e3 * p80:.3f}",
        "median_ratio_to_stock": f"{statistics.median(ratios):.3f}",
        "p20_ratio": f"{ratio_20:.3f}",
        "p80_ratio": f"{ratio_80:.3f}",
        "mean_experts": f"{experts:.3f}",
        "load_1min": f"{os.getloadavg()[0]:.1f}",
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def append(rows: list[dict[str, str]]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
