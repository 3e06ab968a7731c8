"""Measures time, peak memory and disk of a conversion, on random weights of the paper's full shape.

    python benchmarks/convert_checkpoint.py [--folder DIR] [--layers 24] [--max-shard-size 4GB]

The script writes a Megatron checkpoint of Dynamic MoE's 3.5 B parameters in bf16 (7 GB). It
converts it to every format that can hold it, and back, each time in a process of its own, and
appends a row for each conversion to results/convert_checkpoint.csv. Peak memory is the largest
resident set of the process, including the pages of files that it has mapped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from megatron_dynmoe.conversion.megatron import settings as megatron_settings
from megatron_dynmoe.conversion.megatron.writer import MegatronWriter
from megatron_dynmoe.conversion.names import MEGATRON, Row, router_entry
from megatron_dynmoe.conversion.routing_settings import state_entries
from megatron_dynmoe.conversion.shapes import Block, Shapes
from megatron_dynmoe.settings.messages.command_line import CommandParser

RESULTS = measure.RESULTS / "convert_checkpoint.csv"
PAPER = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "hidden_act": "silu",
    "intermediate_size": 2816,
    "moe_intermediate_size": 2816,
    "shared_expert_intermediate_size": None,
    "shared_expert_gate": False,
    "max_position_embeddings": 2048,
    "initializer_range": 0.006,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "qk_norm": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "num_experts": 16,
    "num_experts_per_tok": None,
    "router_dtype": "float32",
    "routing": "top_p",
    "threshold": 0.4,
    "theta": None,
    "normalization": "none",
    "weights": "raw",
    "controller": None,
    "max_experts_per_token": None,
    "inference_threshold": None,
    "inference_max_experts_per_token": None,
    "dynamic_loss_coeff": 1e-4,
    "balance_loss": "seq_aux_loss",
    "balance_loss_coeff": 1e-2,
}


def main() -> None:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/convert_checkpoint"))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--max-shard-size", default="4GB")
    args = parser.parse_args()
    if args.folder.exists():
        raise SystemExit(f"{args.folder} exists: remove it, or name another by --folder")
    rows = measure.Rows(RESULTS, "torch")
    num_parameters = random_checkpoint(args.folder / "megatron", args.layers)
    print(f"{num_parameters / 1e9:.2f} B parameters in {size(args.folder / 'megatron')} GB")
    for format in ("dynmoe", "dynamic-moe"):
        there, back = args.folder / format, args.folder / f"from-{format}"
        shards = ["--max-shard-size", args.max_shard_size]
        to_hf = ["to-hf", "--load", args.folder / "megatron", "--output", there, *shards]
        from_hf = ["from-hf", "--model", there, "--save", back]
        for step, command, written in (
            ("to-hf", [*to_hf, "--format", format], there),
            ("from-hf", from_hf, back),
        ):
            seconds, peak = measured(command)
            row = {
                "parameters": num_parameters,
                "step": step,
                "format": format,
                "max_shard_size": args.max_shard_size,
                "seconds": round(seconds, 1),
                "peak_gb": round(peak / 1e9, 2),
                "disk_gb": size(written),
                "load_1min": measure.load(),
            }
            print(rows.put(row))
        shutil.rmtree(there)
        shutil.rmtree(back)
    shutil.rmtree(args.folder)


def random_checkpoint(save: Path, num_layers: int) -> int:
    """Write a Megatron checkpoint of random weights; returns the number of parameters."""
    config = PAPER | {
        "num_hidden_layers": num_layers,
        "mlp_layer_types": ["sparse"] * num_layers,
    }
    shapes = Shapes(config)
    writer = MegatronWriter(num_layers, shapes.num_experts, layers_alike=True)
    total = 0
    for row in MEGATRON:
        for block in shapes.blocks(row):
            shape = shapes.of_row(row)
            total += torch.Size(shape).numel()
            writer.add(block, shape, torch.bfloat16, lambda shape=shape: torch.randn(shape))
    for name in state_entries(config["routing"]):
        for layer in range(num_layers):
            row = Row(router_entry(name), ("theta_offset",))
            writer.add(
                Block(row, layer), (1,), torch.float32, lambda: torch.tensor([PAPER["threshold"]])
            )
    writer.write(save, megatron_settings.args_from_config(config, "bfloat16"))
    return total


def measured(command: list[object]) -> tuple[float, int]:
    """Seconds and peak resident bytes of one conversion."""
    start = time.perf_counter()
    tool = measure.ROOT / "tools" / "convert_checkpoint.py"
    process = subprocess.Popen([sys.executable, tool, *map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def size(folder: Path) -> float:
    """Gigabytes on disk."""
    return round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e9, 2)


if __name__ == "__main__":
    main()
