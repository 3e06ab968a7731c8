"""Counts how often a row buffer would overflow in a real training, by its margin.

    python benchmarks/row_buffer.py --name NAME [--margins 0.01 0.1] [--output DIR] -- FLAGS

Trains in this process as `python -m megatron_dynmoe.pretrain FLAGS` does, with counted rows, and
notes how many rows every sequence has in every layer. No result of a training depends on the room,
so one training gives the rate of every margin. Sequences put together give that of larger
micro-batches: those in which the global batch can be split.

A step overflows if any layer has more rows in any micro-batch than 1 + margin times the mean that
it had in the step before (`--moe-dynamic-row-buffer target`). The first step is left out, because
it counts rows. Rows are appended to OUTPUT/row_buffer.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure, routed
from megatron_dynmoe.settings.messages.command_line import CommandParser


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--name", required=True, help="of the training, for the rows")
    add("--margins", nargs="+", type=float, default=[0, 0.01, 0.02, 0.05, 0.1, 0.25])
    add("--output", type=Path, default=measure.RESULTS, help="folder (default: %(default)s)")
    add("flags", nargs="+", help="of the training, after --")
    args = parser.parse_args()
    rows = measure.Rows(args.output / "row_buffer.csv", "torch", "megatron-core")
    steps_SLQ = torch.stack(routed.train(args.flags)).sum(dim=-1)
    from megatron.training import get_args  # not before the CPU layer stands under it

    tokens = get_args().seq_length
    num_sequences = steps_SLQ.shape[-1]
    for size in (n for n in range(1, num_sequences + 1) if num_sequences % n == 0):
        needed_S = room_needed(steps_SLQ, size)
        for margin in args.margins:
            overflows_S = needed_S > 1 + margin
            half = len(overflows_S) // 2
            written = rows.put(
                {
                    "training": args.name,
                    "layers": steps_SLQ.shape[1],
                    "tokens_of_micro_batch": size * tokens,
                    "micro_batches": num_sequences // size,
                    "margin": margin,
                    "steps": len(overflows_S),
                    "overflowed": f"{overflows_S.double().mean().item():.4f}",
                    "overflowed_second_half": f"{overflows_S[half:].double().mean().item():.4f}",
                    "margin_needed_99": f"{needed_S.quantile(0.99).item() - 1:.4f}",
                    "margin_needed_most": f"{needed_S.max().item() - 1:.4f}",
                }
            )
            print(*[f"{name} {written[name]}" for name in list(written)[4:]], sep=", ")


def room_needed(rows_SLQ: torch.Tensor, size: int) -> torch.Tensor:
    """How many times the mean of the step before a step needs, in its worst layer, [S - 1].

    Args:
        rows_SLQ: rows by step, layer and sequence.
        size: sequences of a micro-batch.
    """
    means_SLM = rows_SLQ.double().unflatten(-1, (-1, size)).mean(dim=-1)
    before_SL = means_SLM.mean(dim=-1)[:-1]
    return (means_SLM[1:].amax(dim=-1) / before_SL).amax(dim=-1)


if __name__ == "__main__":
    main()
