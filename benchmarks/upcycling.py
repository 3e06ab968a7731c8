"""Compares models whose experts were grown from a dense one with it, at first and after training.

    python benchmarks/upcycling.py [--dense-steps 300] [--steps 50] [--output DIR]

Trains a dense Llama of the quickstart's shape on the words of examples/data, exports it, makes
experts of it in three ways (`dynmoe convert from-hf --upcycle-experts`), and trains all of them and
the dense model on, with the same batches and learning rate. A row for each goes to
OUTPUT/upcycling.csv: by how much its logits differ before it is trained, its losses, and its
experts. It takes some minutes on one core.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.text import words_as_tokens
from megatron_dynmoe.conversion.convert import FLAGS, Target, from_hf, to_hf
from megatron_dynmoe.conversion.upcycle import Upcycling
from megatron_dynmoe.data.indexed import token_dtype
from megatron_dynmoe.runs import metric_names as names
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.command_line import CommandParser, number
from megatron_dynmoe.storage.megatron_names import CHECKPOINTS

VOCAB_SIZE = 4096
EXPERTS = 16
SEQUENCES, LENGTH = 16, 256  # whose logits are compared
# The MLP is as wide as two of the quickstart's experts.
DENSE = (
    "--num-layers 6 --hidden-size 128 --ffn-hidden-size 512 --num-attention-heads 4 "
    "--seq-length 256 --max-position-embeddings 256 --normalization RMSNorm --swiglu "
    "--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0"
)
TRAINING = (
    "--micro-batch-size 4 --global-batch-size 8 --adam-beta2 0.95 --weight-decay 0.1 "
    "--clip-grad 1.0 --split 95,5,0 --log-interval 1 --eval-iters 8 --num-workers 0"
)
FROM_SCRATCH = "--lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1"
FURTHER = "--lr 5e-4 --lr-decay-style constant --lr-warmup-iters 0 --exit-on-missing-checkpoint"
# How experts are made, and how they are routed; None: top-k.
MODELS: dict[str, tuple[Upcycling | None, DynMoEConfig | None]] = {
    "dense": (None, None),
    "copies, top-2": (Upcycling(EXPERTS), None),
    "copies, DTop-p": (
        Upcycling(EXPERTS),
        DynMoEConfig("dtop_p", target_experts_per_token=2.0),
    ),
    "quarters, top-4": (Upcycling(EXPERTS, granularity=4), None),
}


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense-steps", type=number(int, 1), default=300)
    parser.add_argument("--steps", type=number(int, 10), default=50)
    parser.add_argument("--output", type=Path, default=measure.RESULTS)
    args = parser.parse_args()
    rows = measure.Rows(args.output / "upcycling.csv", "torch", "megatron-core", "transformers")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train(folder / "dense", f"{DENSE} {FROM_SCRATCH}".split(), args.dense_steps)
        to_hf(folder / "dense" / CHECKPOINTS, Target(folder / "llama", format="llama"))
        expected = logits(folder / "llama")
        for name, (upcycling, routing) in MODELS.items():
            place = folder / name
            made = place / "made"
            from_hf(folder / "llama", made, routing=routing, upcycling=upcycling, progress=False)
            to_hf(made, Target(place / "exported"))
            found = logits(place / "exported")
            flags = [f"@{made / FLAGS}", "--load", str(made), *FURTHER.split()]
            row = {
                "model": name,
                "dense_steps": args.dense_steps,
                "steps": args.steps,
                "logits_differ_by": f"{(found - expected).abs().max():.1e}",
                "logits_deviation": f"{expected.std():.3f}",
                "next_tokens_differ": int((found.argmax(-1) != expected.argmax(-1)).sum()),
                **train(place / "run", flags, args.steps),
            }
            rows.put(row)
            print(*(f"{name} {value}" for name, value in row.items()), sep=", ", flush=True)


def train(run: Path, flags: list[str], steps: int) -> dict[str, str]:
    """Train in a process of its own; returns losses, and experts per token at the end."""
    from megatron_dynmoe.runs.events import read_scalars

    prefix = words_as_tokens(VOCAB_SIZE)
    subprocess.run(
        [
            *(sys.executable, "-m", "megatron_dynmoe.pretrain", "--run-dir", str(run)),
            *(*TRAINING.split(), *flags),
            # As the last id ends a document in the text, it does for this tokenizer.
            *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE - 1)),
            *("--data-path", str(prefix), "--data-cache-path", str(prefix.parent / "cache")),
            *("--train-iters", str(steps), "--eval-interval", str(steps)),
            *("--save-interval", str(steps)),
        ],
        cwd=measure.ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    scalars = read_scalars(run)
    losses = scalars[names.LOSS].values
    experts = scalars[names.EXPERTS].values if names.EXPERTS in scalars else None
    return {
        "first_loss": f"{losses[0]:.5f}",
        "loss_of_last_10": f"{statistics.fmean(losses[-10:]):.4f}",
        "held_out_loss": f"{scalars[names.VALIDATION_LOSS].values[-1]:.4f}",
        "experts_of_last_10": "" if experts is None else f"{statistics.fmean(experts[-10:]):.3f}",
    }


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """What an exported model computes for the first tokens of the text, in float32."""
    from transformers import AutoModelForCausalLM

    import megatron_dynmoe.huggingface  # noqa: F401

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    file = words_as_tokens(VOCAB_SIZE).with_suffix(".bin")
    tokens = np.fromfile(file, token_dtype(VOCAB_SIZE), SEQUENCES * LENGTH)
    return model(torch.from_numpy(tokens.astype(np.int64)).view(SEQUENCES, LENGTH)).logits


if __name__ == "__main__":
    main()
