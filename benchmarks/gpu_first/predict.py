"""What the dry run and the planner say of the training steps' peak memory, before a GPU does.

    python -m benchmarks.gpu_first.predict --output FILE [--known FILE] [--rehearse] [--only STAGE]

For each training among the stages, `dynmoe plan --dry-run` trains the same model for two steps on
a GPU that does not exist, up to a minute of a processor each. `make gpu-pack` runs this, and
--known takes its rows if they are of the same flags and code: then it costs no minute with a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks import measure, train_step
from benchmarks.gpu_first import outcome, stages, state
from benchmarks.training import Routing, flags_of_training
from megatron_dynmoe.settings.messages.command_line import CommandParser

GPU = "h200-141g"
PACKAGES = ("torch", "megatron-core")


def main() -> None:
    parser = CommandParser(prog="gpu_first.predict", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="a CSV file")
    add("--known", type=Path, metavar="FILE", help="another one, whose rows are taken if they fit")
    add("--rehearse", action="store_true", help="of the sizes that a CPU rehearses")
    add("--only", nargs="*", default=[], metavar="STAGE")
    args = parser.parse_args()
    rows, known = measure.Rows(args.output, *PACKAGES), known_rows(args.known)
    wanted = {}
    for stage in stages.read():
        if stage.kind == "train" and (stage.name in args.only or not args.only):
            row = {"predicts": stage.name, **what_runs(stage, args.rehearse)}
            if found := known.get(identity(row)):
                rows.put(row | {name: found[name] for name in ("predicted_gb", "formula_gb")})
            else:
                wanted[stage.name] = row
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as threads:
        futures = {threads.submit(dry_run, row): row for row in wanted.values()}
        for future in as_completed(futures):
            row = rows.put(futures[future] | future.result())
            said = row.get("failed") or f"{row['predicted_gb']} GB"
            print(f"{row['predicts']}: {said}", flush=True)


def what_runs(stage: stages.Stage, rehearses: bool) -> dict[str, str]:
    """The flags of a stage's training, the kernels' setting, and the code."""
    words = stage.words(rehearses, stage.seconds)
    script = words.index("benchmarks/train_step.py")
    options, extra = train_step.parser().parse_known_args(words[script + 1 :])
    (routing,), (backend,) = options.routings, options.backends
    flags = flags_of_training(options.model, Routing.parse(routing), backend)
    return {
        "flags": " ".join([*flags, *extra]),
        "kernels": str(stage.kernels),
        "code": state.code(parts=("megatron_dynmoe",)),
    }


def known_rows(path: Path | None) -> dict[tuple[str, ...], dict[str, str]]:
    """Those of a file that tell something, by what they are of."""
    if path is None or not path.exists():
        return {}
    rows = outcome.read_rows(path)
    return {identity(row): row for row in rows if row.get("predicted_gb")}


def identity(row: Mapping[str, str]) -> tuple[str, ...]:
    return row["flags"], row["kernels"], row["code"]


def dry_run(row: Mapping[str, str]) -> dict[str, str]:
    """The predictions, or why there are none."""
    with tempfile.NamedTemporaryFile("w", suffix=".flags") as file:
        file.write(row["flags"])
        file.flush()
        command = [sys.executable, "-m", "megatron_dynmoe", "plan", file.name, "--dry-run"]
        command += ["--json", "--gpus", "1", "--gpu", GPU, "--kernels", row["kernels"]]
        done = subprocess.run(command, cwd=state.ROOT, capture_output=True, text=True)
    try:
        (run,) = json.loads(done.stdout)
    except ValueError:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        return {"failed": said[-1]}
    formula = run["formula_total"]
    return {
        "predicted_gb": f"{run['peak'] / 1e9:.2f}",
        "formula_gb": f"{formula / 1e9:.2f}" if formula else "",
    }


if __name__ == "__main__":
    main()
