"""Dry runs of every recipe, and of some layouts, with the settings of the kernels.

    python benchmarks/dry_runs.py [--only NAME ...] [--kernels 0 1] [--json DIR] [--output DIR]

Each is a `dynmoe plan --dry-run`, which takes about half a minute of a processor, 1 GB and no GPU.
Its JSON is kept in --json, and a run whose file is there is not made again: empty the folder after
a change of the code. All files together become dry_runs.csv in --output, of which
`python tools/generate_docs.py` makes the table in docs/planning.md. Exit code: 1 if one failed.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dynmoe.cli.plan import dry_run_to_json
from megatron_dynmoe.dry_run.launch import dry_run
from megatron_dynmoe.dry_run.reporting.result import controllers
from megatron_dynmoe.jobs.recipes import recipe_names
from megatron_dynmoe.kernels import SETTINGS
from megatron_dynmoe.planning.gpus import GPUS
from megatron_dynmoe.settings.messages.command_line import CommandParser
from megatron_dynmoe.storage.atomic import replace_file

GPU = "h200-141g"
ROOT = Path(__file__).resolve().parent.parent
PHASES = ("forward", "backward", "optimizer")
ONE_GPU = "--pipeline-model-parallel-size 1 --micro-batch-size 8"
ACTIVATIONS = "--recompute-granularity selective --recompute-modules moe_act"
# As many tokens in a step as the recipe's.
LONG = (
    "--seq-length 32768 --max-position-embeddings 32768 --micro-batch-size 1 "
    "--global-batch-size 128 --cp-comm-type a2a"
)


class Run(NamedTuple):
    """A dry run; without a number of GPUs as few as the layout takes."""

    recipe: str
    flags: str = ""
    gpus: int | None = None
    kernels: tuple[str, ...] = ("0", "1")


RUNS = {
    **{name: Run(name) for name in recipe_names()},
    "dtop_p_16e": Run("dtop_p_16e", gpus=128),
    # The whole of Dynamic MoE's 3.5 B model, for docs/backends.md.
    "dtop_p_16e, one GPU": Run("dtop_p_16e", ONE_GPU, kernels=SETTINGS),
    "dtop_p_16e, one GPU, moe_act": Run("dtop_p_16e", f"{ONE_GPU} {ACTIVATIONS}", kernels=SETTINGS),
    "dtop_p_64e8a, DeepEP": Run(
        "dtop_p_64e8a",
        "--moe-token-dispatcher-type flex --moe-dynamic-max-experts-per-token 32",
    ),
    "dtop_p_64e8a, 32 k over 4": Run("dtop_p_64e8a", f"{LONG} --context-parallel-size 4"),
    "dtop_p_64e8a, 32 k over 8": Run("dtop_p_64e8a", f"{LONG} --context-parallel-size 8"),
}


def main() -> None:
    parser = CommandParser(prog="dry_runs", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=RUNS, metavar="NAME", default=[*RUNS], help=", ".join(RUNS))
    add("--kernels", nargs="+", choices=SETTINGS, default=SETTINGS, help="default: all")
    add("--json", type=Path, default=ROOT / "build/dry_runs", metavar="DIR", help="%(default)s")
    add("--output", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    args = parser.parse_args()
    args.json.mkdir(parents=True, exist_ok=True)
    failed = 0
    for kernels in args.kernels:
        for name in args.only:
            if kernels not in RUNS[name].kernels:
                continue
            file = args.json / f"{name}, {kernels}.json"
            if not file.exists():
                failed += not make(RUNS[name], kernels, file)
                print(f"{file.stem}: {'done' if file.exists() else 'failed'}", flush=True)
            write_rows(args.output / "dry_runs.csv", args.json)
    sys.exit(failed > 0)


def make(run: Run, kernels: str, file: Path) -> bool:
    """Make a dry run; returns whether it was counted. Else its error is on stderr."""
    try:
        found = dry_run(run.recipe, run.flags.split(), run.gpus, GPUS[GPU], kernels=kernels)
    except (ValueError, OSError) as error:
        print(f"dry_runs: error: {error}", file=sys.stderr)
        return False
    text = json.dumps([dry_run_to_json(found)], indent=2)
    replace_file(file, lambda partial: partial.write_text(text))
    return True


def write_rows(path: Path, folder: Path) -> None:
    """Make the CSV file of the files that are there."""
    rows = []
    for name, run in RUNS.items():
        for kernels in run.kernels:
            file = folder / f"{name}, {kernels}.json"
            if file.exists():
                (found,) = json.loads(file.read_text())
                rows.append({"run": name, "flags": run.flags, **row_of(found)})
    if not rows:
        return

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as out:
            writer = csv.DictWriter(out, [*rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    replace_file(path, write)


def row_of(found: dict[str, Any]) -> dict[str, Any]:
    """What the table takes from a dry run's JSON."""
    result = found["result"]
    peaks, waits = result["peak_bytes"], result["waits"]
    in_layers = [wait["count"] for wait in waits if wait["per"].startswith("layer")]
    moved, least = result["expert_traffic"], found["least_expert_traffic"]
    layer = [sum(row[phase] for row in result["kernels"]) for phase in PHASES[:2]]
    return {
        "gpus": found["layout"]["world_size"],
        "rank": found["rank"],
        "kernels": found["kernels"],
        "experts_per_token": found["experts_per_token"],
        **{f"{phase}_gb": gigabytes(peaks[phase]) for phase in PHASES},
        "planner_gb": gigabytes(found["formula_total"]),
        "planner_over": round(found["formula_total"] / found["peak"] - 1, 3),
        "waits_of_a_layer": sum(in_layers),
        "waits_of_a_step": sum(wait["per_step"] for wait in waits),
        "kernels_forward_of_a_layer": layer[0],
        "kernels_of_a_layer": sum(layer),
        "kernels_of_a_step": sum(result["kernels_per_step"].values()),
        "kernels_of_the_controller": controllers(result["kernels_between"]),
        "mb_moved_by_experts": f"{moved / 1e6:.4g}",
        "of_the_least": f"{moved / least:.3f}" if least else "",
        "mb_kept_by_experts": f"{result['expert_kept'] / 1e6:.4g}",
        "tflop_of_a_step": f"{sum(result['flops'].values()) / 1e12:.4g}",
        "collectives_of_a_step": sum(sent["calls"] for sent in result["sent"]),
        "sent_gb": gigabytes(sum(sent["num_bytes"] for sent in result["sent"])),
        "off_device_by_mistake": sum(not made["why"] for made in result["off_device"]),
    }


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.4g}"


if __name__ == "__main__":
    main()
