"""Measures the plant of each rule in short trainings: slope, noise, drift, and what the law does.

    python benchmarks/controller_in_training.py [--only dtop_p-64-8-1024 ...] [--output DIR]

Trains one small model after another (4 layers of width 64, on the words of examples/data), each in
a process of its own, with default gains. After a batch it routes the same logits again with the
knob a little up and down, which gives the slope; relu's knob acts through training alone. From
count, knob and slope follows the knob that each batch needed: what it does by chance from batch to
batch is noise, its trend is drift. Rows are appended to OUTPUT/controller_in_training.csv.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.text import words_as_tokens
from megatron_dynmoe.settings.messages.command_line import CommandParser

STEPS = 200
VOCABULARY, SEQUENCE = 4096, 128
SETTLED = 40  # the step from which the count should be at its target
WINDOW = 20  # steps of a mean, because a single small batch is off by chance
NUDGE = 0.03  # of the knob, to either side
FLAGS = (
    f"--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length {SEQUENCE} "
    f"--max-position-embeddings {SEQUENCE} --micro-batch-size 8 --ffn-hidden-size 64 "
    "--moe-token-dispatcher-type alltoall --normalization RMSNorm --swiglu --disable-bias-linear "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 "
    "--hidden-dropout 0 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 10 "
    "--adam-beta2 0.95 --clip-grad 1.0 --split 100,0,0 --eval-iters 0 --eval-interval 1000000 "
    f"--num-workers 0 --train-iters {STEPS} --tokenizer-type NullTokenizer "
    f"--vocab-size {VOCABULARY} --log-interval 50"
)


class Case(NamedTuple):
    """One training."""

    rule: str
    experts: int
    target: float
    tokens: int  # of a global batch

    @property
    def name(self) -> str:
        return f"{self.rule}-{self.experts}-{self.target:g}-{self.tokens}"

    @property
    def flags(self) -> list[str]:
        of_case = (
            f"--num-experts {self.experts} --global-batch-size {self.tokens // SEQUENCE} "
            f"--moe-dynamic-routing {self.rule} "
            f"--moe-dynamic-target-experts-per-token {self.target:g}"
        )
        if self.rule == "dtop_p":
            of_case += " --moe-dynamic-balance-loss-coeff 1e-2"
        prefix = words_as_tokens(VOCABULARY)
        data = f"--data-path {prefix} --data-cache-path {prefix.parent / 'cache'}"
        return f"{FLAGS} {of_case} {data}".split()


CASES = [
    *(Case("dtop_p", *point) for point in (
        (8, 1.5, 1024), (8, 4, 1024), (16, 2, 1024), (64, 8, 1024), (64, 8, 4096), (64, 32, 1024),
        (512, 64, 1024),
    )),
    *(Case("expert_threshold", *point) for point in (
        (16, 2, 1024), (64, 8, 1024), (64, 8, 4096), (512, 64, 1024),
    )),
    *(Case("null_experts", *point) for point in (
        (8, 1.5, 1024), (16, 2, 1024), (64, 8, 1024), (64, 8, 4096),
    )),
    *(Case("relu", *point) for point in ((16, 2, 1024), (64, 8, 1024), (64, 8, 4096))),
]  # fmt: skip


class Step(NamedTuple):
    """What was seen of a global batch."""

    knob: float  # the mean of all layers; with scope global each has this one
    count: float
    slope: float | None  # experts per token per unit of the knob


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = [case.name for case in CASES]
    add("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    add("--output", type=Path, default=measure.RESULTS, help="folder (default: %(default)s)")
    args = parser.parse_args()
    if len(args.only) > 1:
        for name in args.only:
            words = [sys.executable, __file__, "--only", name, "--output", str(args.output)]
            subprocess.run(words, check=True)
        return
    case = CASES[names.index(args.only[0])]
    rows = measure.Rows(args.output / "controller_in_training.csv", "torch", "megatron-core")
    steps, computed = train(case)
    row = {**case._asdict(), "steps": len(steps), **summary(case, steps, computed)}
    print(*[f"{name} {value}" for name, value in list(rows.put(row).items())[4:]], sep=", ")


def train(case: Case) -> tuple[list[Step], float | None]:
    """Train in this process; returns all steps, and the slope for which the gains are made."""
    from megatron_dynmoe.run import prepare

    sys.argv = ["pretrain", *case.flags]
    prepare()
    from megatron_dynmoe.control.update import GlobalBatchUpdate
    from megatron_dynmoe.moe.rules import RULES, Rule
    from megatron_dynmoe.training import loop

    rule_type = RULES[case.rule]
    routed: list[tuple[torch.Tensor, dict[str, Any]]] = []  # logits, and how they were routed
    before: list[tuple[Any, ...]] = []  # of the last batch: state and sums, row by router
    steps: list[Step] = []
    route, next_state, update = rule_type.route, rule_type.next_state, GlobalBatchUpdate.__call__

    def noting_route(self: Any, logits_TE: torch.Tensor, state: Any, **how: Any) -> Any:
        if how["training"] and torch.is_grad_enabled():
            routed.append((logits_TE.detach(), {"state": state, **how}))
        return route(self, logits_TE, state, **how)

    def noting_state(self: Any, state: Any, sums_RW: torch.Tensor, next_R1: Any) -> Any:
        before[:] = [state, sums_RW]
        return next_state(self, state, sums_RW, next_R1)

    @torch.no_grad()
    def count(self: Any, factor: float) -> float:
        """Experts per token of the noted logits with every layer's knob times a factor."""
        knobs_R1 = factor * torch.stack([router.knob for router in self._routers])
        moved = next_state(self.rule, *before, knobs_R1) if before else {}
        moved = {**moved, self.rule.knob: knobs_R1}
        places = {router.knob.data_ptr(): row for row, router in enumerate(self._routers)}
        experts = tokens = 0.0
        for logits_TE, how in routed:
            how, state = dict(how), how["state"]
            row = places[state[self.rule.knob].data_ptr()]
            how["state"] = {**state, **{name: values[row] for name, values in moved.items()}}
            experts_T = route(self.rule, logits_TE, how.pop("state"), **how).experts_T
            experts, tokens = experts + float(experts_T.sum()), tokens + len(experts_T)
        return experts / tokens

    def noting_update(self: Any, model: Any, *given: Any, **named: Any) -> None:
        held = list(before)
        update(self, model, *given, **named)
        after, before[:] = list(before), held
        knob = statistics.fmean(float(router.knob) for router in self._routers)
        slope = None
        if case.rule != "relu" and (before or next_state is Rule.next_state):
            up, down = (count(self, 1 + way * NUDGE) for way in (1, -1))
            slope = (up - down) / (2 * NUDGE * knob)
        steps.append(Step(knob, float(self.statistics.pooled().mean_experts), slope))
        before[:] = after
        routed.clear()

    rule_type.route, rule_type.next_state = noting_route, noting_state  # type: ignore[method-assign]
    GlobalBatchUpdate.__call__ = noting_update  # type: ignore[method-assign]
    loop.train(time.time())
    return steps, computed_slope(case)


def computed_slope(case: Case) -> float | None:
    """The slope of the first step's logits, for which the default gains are made."""
    from megatron.training import get_args

    from megatron_dynmoe.control import plant_slope
    from megatron_dynmoe.settings.config import DynMoEConfig

    if case.rule == "relu":
        return None
    given = DynMoEConfig(routing=case.rule, target_experts_per_token=case.target)
    resolved, args = given.resolve(case.experts), get_args()
    return plant_slope(
        case.experts,
        case.target,
        logits_std=args.init_method_std * args.hidden_size**0.5,
        normalized=resolved.normalization == "drn",
        max_experts=resolved.max_experts_per_token,
        routing=case.rule,
    )


def summary(case: Case, steps: list[Step], computed: float | None) -> dict[str, str]:
    """The measures of a training; noise, drift and counts as shares of the target."""
    counts = [step.count / case.target for step in steps]
    means = [statistics.fmean(counts[end - WINDOW : end]) for end in range(WINDOW, len(steps) + 1)]
    away = [place for place, mean in enumerate(means) if abs(mean - 1) > 0.05]
    late = counts[SETTLED:]
    measures = {
        "settled": f"{away[-1] + 2 if away else 1}",
        "mean": f"{statistics.fmean(late):.4f}",
        "worst_mean": f"{max((mean for mean in means[SETTLED:]), key=lambda m: abs(m - 1)):.4f}",
        "deviation": f"{statistics.stdev(late):.4f}",
    }
    slopes = [step.slope for step in steps if step.slope is not None]
    if computed is None or not slopes:
        return measures
    needed = [
        step.knob + (case.target - step.count) / step.slope
        for step in steps[SETTLED:]
        if step.slope
    ]
    middle = statistics.median(slopes[SETTLED:])
    trend = statistics.linear_regression(range(len(needed)), needed).slope
    jumps = [after - one for one, after in itertools.pairwise(needed)]
    return measures | {
        "slope_computed": f"{computed:.4g}",
        "slope_first": f"{slopes[0]:.4g}",
        "slope_least": f"{min(slopes):.4g}",
        "slope_most": f"{max(slopes):.4g}",
        "slope_late": f"{middle:.4g}",
        "noise": f"{statistics.stdev(jumps) / 2**0.5 * middle / case.target:.4f}",
        "drift": f"{trend * middle / case.target:.5f}",
    }


if __name__ == "__main__":
    main()
