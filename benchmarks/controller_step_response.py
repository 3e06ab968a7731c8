"""Prints the tables of docs/controller.md and draws its step responses.

    python benchmarks/controller_step_response.py [--figure PATH]

The plant is the real selection rule on simulated normal logits, with fresh tokens at every step.
The script runs on a CPU in under a minute; seeds are fixed.
"""

import math
from collections.abc import Callable, Iterable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from megatron_dynmoe.control import (
    PIController,
    default_gains,
    gain_margin,
    initial_threshold,
    mean_experts_per_token,
    plant_slope,
)
from megatron_dynmoe.control.calibrate import INTEGRAL_LOOP_GAIN, PROPORTIONAL_LOOP_GAIN
from megatron_dynmoe.routing.select import select
from megatron_dynmoe.settings.messages.command_line import CommandParser

GRANULARITIES = ((16, 2), (64, 8), (128, 16))
SCALES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0)
LOOP_GAINS = (
    (0.0, INTEGRAL_LOOP_GAIN),
    (PROPORTIONAL_LOOP_GAIN, INTEGRAL_LOOP_GAIN),
    (0.15, INTEGRAL_LOOP_GAIN),
    (0.3, INTEGRAL_LOOP_GAIN),
    (0.05, 0.05),
    (0.05, 0.3),
    (0.3, 0.6),
    (0.05, 1.0),
)


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--figure", default="docs/images/controller_step_response.png")
    figure = parser.parse_args().figure
    print_operating_points()
    print_slopes()
    print_loop_gains()
    print_lag()
    print_noise()
    print_busiest_rank()
    draw_step_responses(figure)


def print_operating_points() -> None:
    rows = []
    for experts, target in GRANULARITIES:
        slope = plant_slope(experts, target)
        plant_gain = slope / experts
        gains = default_gains(experts, target)
        rows.append(
            (
                f"{experts}, {target}",
                f"{initial_threshold(experts, target):.3f}",
                f"{slope:.1f}",
                f"{plant_gain:.3f}",
                f"{gains[0]:.3f}",
                f"{gains[1]:.3f}",
                f"{1 / plant_gain:.2f}",
                f"{2 / plant_gain:.2f}",
                f"{gain_margin(*gains, slope, experts):.1f}",
            )
        )
    print_table(
        "Operating point, default gains and stable limits (DRN, theta 1)",
        (
            "experts, target",
            "threshold_0",
            "slope",
            "g",
            "K_p",
            "K_i",
            "K_p limit (K_i -> 0)",
            "K_i limit (K_p = 0)",
            "margin",
        ),
        rows,
    )


def print_slopes() -> None:
    """How the operating point moves as the logits sharpen, at a constant count."""
    for normalized in (True, False):
        rows = []
        for scale in SCALES:
            row = [f"{scale:g}"]
            for experts, target in GRANULARITIES:
                # Theta scales normalized logits only, the standard deviation the others only.
                plant = (experts, target, scale, normalized, None, scale)
                slope, threshold = plant_slope(*plant), initial_threshold(*plant)
                nominal = plant_slope(experts, target, normalized=normalized)
                row.append(f"{threshold:.3f}, {slope:.1f} ({slope / nominal:.2f}x)")
            rows.append(row)
        name = "theta (DRN)" if normalized else "standard deviation of the logits (no DRN)"
        columns = (name, *(f"{experts}, {target}" for experts, target in GRANULARITIES))
        print_table("Threshold, slope (relative to 1) at the target", columns, rows)


def print_loop_gains() -> None:
    rows = []
    for kappa_p, kappa_i in LOOP_GAINS:
        poles = sorted(np.roots((1, kappa_p + kappa_i - 1, -kappa_p)).real, key=abs, reverse=True)
        rows.append(
            (
                f"{kappa_p:g}, {kappa_i:g}",
                f"{poles[0]:.3f}, {poles[1]:.3f}",
                settling_steps(kappa_p, kappa_i),
                settling_steps(kappa_p / 3, kappa_i / 3),
                settling_steps(3 * kappa_p, 3 * kappa_i),
                f"{2 / (2 * kappa_p + kappa_i):.1f}",
                f"{noise_gain(kappa_p, kappa_i):.3f}",
                f"{simulated_noise_gain(kappa_p, kappa_i):.3f}",
            )
        )
    print_table(
        "Loop gains: settling to 2 % in steps, margin, variance of the count over the noise's",
        (
            "kappa_p, kappa_i",
            "poles",
            "settling",
            "at slope / 3",
            "at slope x 3",
            "margin",
            "noise (formula)",
            "noise (simulated)",
        ),
        rows,
    )


def print_lag() -> None:
    """Overshoot if part of the count responds late to the threshold, which the law cannot know."""
    rows = []
    for kappa_p in (0.0, PROPORTIONAL_LOOP_GAIN, 0.15, 0.3):
        row = [f"{kappa_p:g}, {INTEGRAL_LOOP_GAIN:g}"]
        for pole in (0.0, 0.5, 0.8, 0.9, 0.95):
            error = linear_response(kappa_p, INTEGRAL_LOOP_GAIN, steps=1000, pole=pole)
            row.append(f"{100 * max(0.0, -min(error)):.0f} %, {settled_from(error)}")
        rows.append(row)
    columns = ("kappa_p, kappa_i", *(f"lag pole {pole}" for pole in (0, 0.5, 0.8, 0.9, 0.95)))
    print_table("Overshoot and settling steps with a lagging plant", columns, rows)


def print_noise() -> None:
    """Standard deviation of the count over tokens, from which the noise of a batch follows."""
    rows = []
    batches = (2**12, 2**16, 2**22)
    for experts, target in GRANULARITIES:
        probs_TE = normal_probs(experts, 2**20 // experts, torch.Generator().manual_seed(1))
        sums_TE = probs_TE.sort(dim=-1, descending=True).values.cumsum(-1)[:, :-1]
        threshold = initial_threshold(experts, target)
        deviation = float((1 + (sums_TE <= threshold).sum(-1)).double().std())
        rows.append(
            (
                f"{experts}, {target}",
                f"{deviation:.2f}",
                *(f"{100 * deviation / target / math.sqrt(n):.3f} %" for n in batches),
            )
        )
    columns = ("experts, target", "std over tokens", "4,096 tokens", "65,536", "4,194,304")
    print_table("Measurement noise, relative to the target, tokens independent", columns, rows)


def print_busiest_rank() -> None:
    """The loop that holds the busiest rank at 8 of 64 experts, with experts of any popularity."""
    experts, target, step = 64, 8.0, 0.01
    start, gains = initial_threshold(experts, target), default_gains(experts, target)
    controller, nominal = PIController(experts, start, *gains), plant_slope(experts, target)
    rows = []
    for popularity in (0.0, 0.3, 1.0):
        for ranks in (2, 8, 64):
            plant = Ranks(experts, ranks, popularity)
            low, high = 0.0, 1.0
            while high - low > 1e-6:
                threshold = (low + high) / 2
                mean, imbalance = plant.measure(threshold)
                low, high = (low, threshold) if mean * imbalance > target else (threshold, high)
            mean, imbalance = plant.measure(threshold)
            around = [plant.measure(threshold + side * step) for side in (-1, 1)]
            slope = (around[1][0] * around[1][1] - around[0][0] * around[0][1]) / (2 * step)
            first, integral, deviations = torch.tensor([start]), torch.zeros(1), []
            for _ in range(200):
                count, ratio = plant.measure(float(first))
                deviations.append(count * ratio / target - 1)
                first, integral = controller.step(
                    first, integral, torch.tensor(count * ratio), target
                )
            rows.append(
                (popularity, ranks, f"{imbalance:.2f}", f"{mean:.2f}", f"{threshold:.3f}",
                 f"{slope / nominal:.2f}", settled_from(deviations))
            )  # fmt: skip
    print_table(
        "busiest rank at 8 of 64 experts: imbalance, mean experts, threshold, the loop gain over "
        "the default one, steps to 2 %",
        ("popularity", "ranks", "imbalance", "mean", "threshold", "loop gain", "steps"),
        rows,
    )


class Ranks:
    """Layers whose experts differ in popularity, on expert-parallel ranks, with the same tokens.

    Args:
        popularity: standard deviation over experts of what is added to their logits, whose
            deviation over tokens is 1 before they are normalized.
    """

    def __init__(self, experts: int, ranks: int, popularity: float, num_tokens: int = 8192) -> None:
        generator = torch.Generator().manual_seed(0)
        shift_E = popularity * torch.randn(experts, generator=generator)
        self.probs_TE = normal_probs(experts, num_tokens, generator, shift_E)
        self.ranks = ranks

    def measure(self, threshold: float) -> tuple[float, float]:
        """The mean number of experts per token, and the busiest rank over the mean rank."""
        rows_R = select(self.probs_TE, threshold).sum(dim=0).view(self.ranks, -1).sum(dim=1)
        mean = float(rows_R.sum() / len(self.probs_TE))
        return mean, float(rows_R.max() * self.ranks / rows_R.sum())


def draw_step_responses(path: str) -> None:
    """Count and threshold against step for 64 experts, target 8."""
    experts, target, steps = 64, 8.0, 150
    start = initial_threshold(experts, target)
    gains = default_gains(experts, target)

    def run(factor: float, first: float, num_tokens: int) -> tuple[list[float], list[float]]:
        controller = PIController(experts, start, factor * gains[0], factor * gains[1])
        generator = torch.Generator().manual_seed(0)

        def plant(threshold: torch.Tensor) -> torch.Tensor:
            probs_TE = normal_probs(experts, num_tokens, generator)
            return mean_experts_per_token(probs_TE, threshold)

        return close_loop(controller, plant, target, first, steps)

    panels = {
        "gains, from threshold 0.7": {
            "default": run(1, 0.7, 4096),
            "default / 4 (low)": run(0.25, 0.7, 4096),
            "default x 10 (unstable)": run(10, 0.7, 4096),
        },
        "default gains, start and noise": {
            "from threshold 0 (one expert)": run(1, 0.0, 4096),
            "from threshold 1 (every expert)": run(1, 1.0, 4096),
            "computed start, 64 tokens a batch": run(1, start, 64),
        },
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, sharey="row")
    for column, (title, curves) in enumerate(panels.items()):
        for label, (counts, thresholds) in curves.items():
            axes[0, column].plot(counts, label=label, linewidth=1.3)
            axes[1, column].plot(thresholds, linewidth=1.3)
        axes[0, column].axhline(target, color="black", linestyle=":", linewidth=1)
        axes[0, column].set(title=title, yscale="log")
        axes[0, column].set_yticks((1, 2, 4, 8, 16, 32, 64), labels=(1, 2, 4, 8, 16, 32, 64))
        axes[0, column].minorticks_off()
        axes[0, column].legend(fontsize=8, loc="upper right")
        axes[1, column].set_xlabel("step (global batch)")
    axes[0, 0].set_ylabel("mean experts per token")
    axes[1, 0].set_ylabel("threshold")
    figure.suptitle("64 experts, target 8, normal logits with DRN")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def close_loop(
    controller: PIController,
    plant: Callable[[torch.Tensor], torch.Tensor],
    target: float,
    first_threshold: float,
    steps: int,
) -> tuple[list[float], list[float]]:
    """Counts and thresholds of ``steps`` batches; the sum of errors is set to match the start."""
    threshold = torch.tensor([first_threshold])
    integral = (threshold - controller.initial_threshold) / controller.integral_gain
    counts, thresholds = [], []
    for _ in range(steps):
        measured = plant(threshold).reshape(1)
        counts.append(float(measured))
        thresholds.append(float(threshold))
        threshold, integral = controller.step(threshold, integral, measured, target)
    return counts, thresholds


def linear_response(
    kappa_p: float, kappa_i: float, steps: int = 2000, pole: float = 0.0
) -> list[float]:
    """Deviation of the count after a unit disturbance, for a plant with a lag of pole ``pole``."""
    integral = control = response = 0.0
    deviations = []
    for _ in range(steps):
        response = pole * response + (1 - pole) * control
        deviations.append(1 + response)
        integral -= deviations[-1]
        control = kappa_i * integral - kappa_p * deviations[-1]
    return deviations


def settled_from(deviations: list[float], band: float = 0.02) -> int | str:
    outside = [step for step, value in enumerate(deviations) if not abs(value) <= band]
    if not outside:
        return 0
    return "never" if outside[-1] == len(deviations) - 1 else outside[-1] + 1


def settling_steps(kappa_p: float, kappa_i: float) -> int | str:
    return settled_from(linear_response(kappa_p, kappa_i))


def noise_gain(kappa_p: float, kappa_i: float) -> float:
    """Variance of the count, divided by the variance of white noise in its measurement."""
    return (kappa_i * (1 + kappa_p) + 2 * kappa_p**2) / (
        (1 + kappa_p) * (2 - 2 * kappa_p - kappa_i)
    )


def simulated_noise_gain(kappa_p: float, kappa_i: float) -> float:
    loops, steps = 2000, 1000
    noise = np.random.RandomState(0).standard_normal((steps, loops))
    integral, count, counts = np.zeros(loops), np.zeros(loops), []
    for row in noise:
        measured = count + row
        integral -= measured
        count = kappa_i * integral - kappa_p * measured
        counts.append(count)
    return float(np.var(counts[200:]))


def normal_probs(
    num_experts: int,
    num_tokens: int,
    generator: torch.Generator,
    shift_E: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """[T, E]: softmax of logits of mean 0 and standard deviation 1 for every token, as with DRN."""
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator) + shift_E
    variance, mean = torch.var_mean(logits_TE, dim=-1, correction=0, keepdim=True)
    return ((logits_TE - mean) * torch.rsqrt(variance + 1e-6)).softmax(-1)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    columns = tuple(columns)
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


if __name__ == "__main__":
    main()
