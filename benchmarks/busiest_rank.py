"""What an equal mean number of experts costs in time, under expert parallelism.

    python benchmarks/busiest_rank.py train [--ranks 2 4] [--steps 300]
    python benchmarks/busiest_rank.py draw --routing top_k|dtop_p|dtop_p_cap [--steps 300]

`train` trains the quickstart's model on expert-parallel ranks, first with the mean at the target,
then with the busiest rank at what it had to do on average in the first training. Equal work of the
busiest rank then shows in the losses, and equal means in the work. Rows go to
OUTPUT/busiest_rank.csv.

`draw` trains a small model of 64 experts on one process, and notes how many tokens of each sequence
of its last quarter chose each expert. It then draws sequences for the micro-batches of 8 to 64
expert-parallel ranks, and says by how much the busiest rank exceeds the mean. The share of a step
that this loses is that of DTop-p's 6.9 B model (recipe dtop_p_64e8a), with its experts' share of
the floating-point operations. Rows go to OUTPUT/busiest_rank_drawn.csv.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure, routed
from benchmarks.text import words_as_tokens
from benchmarks.training import MODELS
from megatron_dynmoe.runs import metric_names as names
from megatron_dynmoe.settings.messages.command_line import CommandParser

VOCAB_SIZE = 4096
TARGET = 2.0
DTOP_P = (
    "--moe-dynamic-routing dtop_p --moe-dynamic-balance-loss-coeff 1e-2 "
    "--moe-dynamic-target-experts-per-token "
)
# A model of many small experts, as large as the quickstart's.
GRANULAR = "--num-experts 64 --moe-ffn-hidden-size 64 --ffn-hidden-size 64 --num-layers 4"
ROUTINGS = {
    # Megatron divides the balance loss of top-k by k, so 8e-2 is as much as 1e-2 of DTop-p's.
    "top_k": "--moe-router-topk 8 --moe-router-load-balancing-type seq_aux_loss "
    "--moe-aux-loss-coeff 8e-2 --moe-router-dtype fp32",
    "dtop_p": f"{DTOP_P} 8",
    "dtop_p_cap": f"{DTOP_P} 8 --moe-dynamic-max-experts-per-token 16",
}
RECIPE = "dtop_p_64e8a"
RANKS = (8, 16, 32, 64)
TOKENS = (4096, 16384)  # of a rank's micro-batch
DRAWS = 400


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name, run in (("train", compare), ("draw", draw)):
        part = parts.add_parser(name)
        part.set_defaults(run=run)
        part.add_argument("--steps", type=int, default=300)
        part.add_argument("--output", type=Path, default=measure.RESULTS)
        if name == "train":
            part.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
        else:
            part.add_argument("--routing", choices=ROUTINGS, required=True)
    args = parser.parse_args()
    args.run(args)


def common_flags(steps: int) -> list[str]:
    """The quickstart's model, on words."""
    prefix = words_as_tokens(VOCAB_SIZE)
    return [
        *MODELS["small"].split(),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE)),
        *("--data-path", str(prefix), "--data-cache-path", str(prefix.parent / "cache")),
        *("--split", "95,5,0", "--train-iters", str(steps), "--log-interval", "10"),
    ]


# --- two controlled quantities, on real ranks -----------------------------------------------------


def compare(args: Namespace) -> None:
    rows = measure.Rows(args.output / "busiest_rank.csv", "torch", "megatron-core")
    for ranks in args.ranks:
        target = TARGET
        for quantity in ("experts", "busiest_rank"):
            found = train(ranks, quantity, target, args.steps)
            row = {"ranks": ranks, "controlled": quantity, "target": f"{target:.4f}"}
            row |= {"steps": args.steps} | {name: f"{value:.5g}" for name, value in found.items()}
            row["load_1min"] = measure.load()
            rows.put(row)
            print(*(f"{name} {value}" for name, value in row.items()), sep=", ", flush=True)
            target = found["busiest_rank_experts"]


def train(ranks: int, quantity: str, target: float, steps: int) -> dict[str, float]:
    """Train; returns means over the second half of the steps, and what it took."""
    from megatron_dynmoe.runs.events import read_scalars

    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)),
                *("-m", "megatron_dynmoe.pretrain", *common_flags(steps)),
                *("--micro-batch-size", str(8 // ranks), "--run-dir", folder),
                *("--expert-model-parallel-size", str(ranks), *DTOP_P.split(), str(target)),
                *("--moe-dynamic-controlled-quantity", quantity),
                *("--eval-interval", str(steps), "--eval-iters", "8"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        scalars = read_scalars(Path(folder))

    def second_half(name: str) -> list[float]:
        steps_and_values = zip(scalars[name].iterations, scalars[name].values, strict=True)
        return [value for step, value in steps_and_values if step > steps / 2]

    busiest = second_half(names.BUSIEST_RANK)
    return {
        "loss": statistics.fmean(second_half(names.LOSS)),
        "validation_loss": scalars[names.VALIDATION_LOSS].values[-1],
        "experts_per_token": statistics.fmean(second_half(names.EXPERTS)),
        "busiest_rank_experts": statistics.fmean(busiest),
        "busiest_rank_deviation": statistics.stdev(busiest),
        "busiest_rank_rows": statistics.fmean(second_half(names.BUSIEST_RANK_ROWS)),
        "share_waiting": statistics.fmean(second_half(names.SHARE_WAITING)),
        "max_violation": statistics.fmean(second_half(names.MAX_VIOLATION)),
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


# --- more ranks than there are, from counts of real text ------------------------------------------


def draw(args: Namespace) -> None:
    rows = measure.Rows(args.output / "busiest_rank_drawn.csv", "torch", "megatron-core")
    flags = [*common_flags(args.steps), *GRANULAR.split(), *ROUTINGS[args.routing].split()]
    steps = routed.train(flags)
    counts_LQE = torch.cat(steps[-len(steps) // 4 :], dim=1).double()
    tokens_of_sequence = 256
    experts_L = counts_LQE.sum(dim=(1, 2)) / counts_LQE.shape[1] / tokens_of_sequence
    share = share_of_experts(float(experts_L.mean()))
    for ranks in RANKS:
        for tokens in TOKENS:
            imbalance_DL = drawn(counts_LQE, ranks, tokens // tokens_of_sequence)
            # A step waits in each layer, and in each for the busiest rank.
            imbalance_D = (imbalance_DL * experts_L).sum(dim=1) / experts_L.sum()
            lost_D = share * (imbalance_D - 1) / (1 + share * (imbalance_D - 1))
            row = {
                "routing": args.routing,
                "steps": args.steps,
                "experts_per_token": f"{experts_L.mean():.3f}",
                "ranks": ranks,
                "tokens_of_a_rank": tokens,
                "imbalance": f"{imbalance_D.mean():.4f}",
                "imbalance_worst_layer": f"{imbalance_DL.mean(dim=0).max():.4f}",
                "share_of_experts": f"{share:.4f}",
                "share_lost": f"{lost_D.mean():.4f}",
                "share_lost_95th": f"{lost_D.quantile(0.95):.4f}",
            }
            rows.put(row)
            print(*(f"{name} {value}" for name, value in row.items()), sep=", ", flush=True)


def drawn(counts_LQE: torch.Tensor, ranks: int, sequences: int) -> torch.Tensor:
    """Rows of the busiest rank over the mean rank's, of dispatches of drawn sequences, [D, L].

    Experts lie on the ranks in order, as in Megatron, and sequences are drawn with replacement.
    """
    generator = torch.Generator().manual_seed(0)
    num_sequences, found = counts_LQE.shape[1], []
    for _ in range(DRAWS):
        chosen = torch.randint(num_sequences, (ranks * sequences,), generator=generator)
        times_Q = torch.bincount(chosen, minlength=num_sequences).double()
        rows_LE = torch.einsum("lqe,q->le", counts_LQE, times_Q)
        rows_LR = rows_LE.unflatten(1, (ranks, -1)).sum(dim=-1)
        found.append(rows_LR.amax(dim=1) / rows_LR.mean(dim=1))
    return torch.stack(found)


def share_of_experts(experts_per_token: float) -> float:
    """The routed experts' share of the recipe's floating-point operations, with equal ranks."""
    from megatron_dynmoe.jobs.parse import read_args
    from megatron_dynmoe.jobs.recipes import recipe_flags
    from megatron_dynmoe.runs.metrics import floating_point_operations

    args = read_args(recipe_flags(RECIPE))
    fixed, whole = (
        floating_point_operations(args, 1, experts) for experts in (0.0, experts_per_token)
    )
    return 1 - fixed / whole


if __name__ == "__main__":
    main()
