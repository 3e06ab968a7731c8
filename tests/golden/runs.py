"""Golden runs: 100 deterministic steps of every routing, kept as files and compared bit for bit.

Floats depend on a processor's instructions, since wider vectors add up in another order, and on its
maker: with the same instructions and all of :data:`PINS`, a Xeon and an EPYC differ in the last bit
from step 4 on. So there is a folder of files for each kind of processor that made them, and only on
that kind, with the same PyTorch and Megatron, a run has to be the same to the bit. Elsewhere it is
compared over all steps with a tolerance.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.distributed.harness import DTOP_P, SEQ_TOP_K, TINY, Case, CaseResult, run_session

FOLDER = Path(__file__).parent
STEPS = 100

# One thread, and the instructions that PyTorch and MKL may use. Tried on a Xeon with AVX-512: MKL
# kept to SSE4.2, NumPy without AVX-512 and the C library without FMA change no bit of 100 steps of
# dtop_p under either back end.
PINS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "DYNMOE_DEVICE": "cpu",
}

SMALL = (
    f"{TINY} --num-layers 2 --global-batch-size 4 --train-iters {STEPS} "
    "--moe-token-dispatcher-type alltoall"
)
NATIVE = "--moe-dynamic-backend torch_native"
FLAGS = {
    "top_k": f"{SMALL} --moe-router-topk 2 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2",
    "top_p": f"{SMALL} --moe-dynamic-routing top_p --moe-dynamic-threshold 0.3",
    "dtop_p": f"{SMALL} {DTOP_P}",
    "dtop_p_layer": f"{SMALL} {DTOP_P} --moe-dynamic-scope layer",
    "dtop_p_native": f"{SMALL} {DTOP_P} {NATIVE}",
    "dtop_p_readable": f"{SMALL} {DTOP_P}",
    "expert_threshold": f"{SMALL} --moe-dynamic-routing expert_threshold "
    "--moe-dynamic-target-experts-per-token 2",
    "seq_top_k": f"{SMALL} {SEQ_TOP_K} --moe-dynamic-weights raw",
    "null_experts": f"{SMALL} --moe-dynamic-routing null_experts "
    "--moe-dynamic-target-experts-per-token 2 --moe-dynamic-null-kind identity",
    "relu": f"{SMALL} --moe-dynamic-routing relu --moe-dynamic-target-experts-per-token 2 "
    "--moe-dynamic-initial-threshold -4",
}
# Without kernels, the CPU's included, a run routes by the lines of routing/route.py.
ENVIRONMENT = {"dtop_p_readable": {"DYNMOE_KERNELS": "0"}}

HOOKS = (f"{__name__}:platform_noted",)
# What of that note decides; the C library is noted because it may come to be suspected.
DECIDES = ("torch", "megatron-core", "machine", "processor", "instructions", "adamw")

# On another platform: how far apart any of the steps may be, relatively. Between a Xeon and an EPYC
# losses differ by up to 8.4e-7, counts and thresholds by nothing. A single token whose
# probabilities all but equal the threshold, or each other, may take another expert, though. That is
# 2e-3 of the experts of a step here, and moves losses by up to 2.2e-4 (top_p, from step 84 on).
TOLERANCES = {"loss": 1e-3, "experts_per_token": 1e-2, "threshold": 1e-2}
# Where a token that changes its mind moves what decides for others, too: the thresholds of its
# experts, or the number of null slots. Without vector instructions a token does so in step 39 of
# expert_threshold; until then losses differ by 8e-7, from then on by up to 4e-3, counts by 1.4e-2
# and the share by 4e-3. With another AdamW one does so in step 17 of null_experts; from then on
# losses differ by up to 5.9e-3, counts by 1.8e-2 and the knob by 3.4e-3.
LOOSER = {"loss": 2e-2, "experts_per_token": 5e-2, "threshold": 2e-2}
TOLERANCES_OF = {"expert_threshold": LOOSER, "null_experts": LOOSER}
# Whose files are compared with if there are none of the same kind of processor.
REFERENCE = "AuthenticAMD-avx512"


@contextmanager
def platform_noted(recorder: Any) -> Iterator[None]:
    """Hook of a case: note what decides whether floats can be the same bits."""
    import platform
    from importlib.metadata import version

    import torch

    recorder.result["platform"] = {
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "machine": platform.machine(),
        "processor": kind_of_processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "adamw": "loop" if os.environ.get("DYNMOE_KERNELS") == "0" else "fused",
        "libc": " ".join(platform.libc_ver()),
    }
    yield


def train(directory: Path, names: Iterable[str] = FLAGS) -> dict[str, dict[str, Any]]:
    """Run these modes in one process; their records by name, as they are kept in the files."""
    cases = [
        Case(name, 1, FLAGS[name], hooks=HOOKS, env=ENVIRONMENT.get(name, {})) for name in names
    ]
    pins = dict(PINS)
    if not _has_avx2():  # PyTorch would take the word for it, and die
        del pins["ATEN_CPU_CAPABILITY"]
    results = run_session(cases, directory, environment=pins)
    return {name: record(result.check()) for name, result in results.items()}


def kind_of_processor() -> str:
    """Maker and widest vector instructions: the name of the folder of the files.

    Not the family: EPYCs of families 25 and 26 give the same bits.
    """
    vendor = _of_processor("vendor_id")
    flags = _of_processor("flags").split()
    vectors = next((name for name in ("avx512", "avx2") if {name, f"{name}f"} & {*flags}), "older")
    return f"{vendor}-{vectors}"


def _has_avx2() -> bool:
    return "avx2" in _of_processor("flags").split()


def _of_processor(name: str) -> str:
    """A field of the first processor in ``/proc/cpuinfo``; empty if it has none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == name), "")


def record(result: CaseResult) -> dict[str, Any]:
    """What is kept of a run."""
    steps: list[dict[str, Any]] = [{"loss": loss} for loss in result.losses]
    if result.finalized:  # stock top-k has neither
        rows = zip(steps, result.experts_per_token, result.by_layer("threshold"), strict=True)
        for step, experts, thresholds in rows:
            by_layer = list(thresholds.values())
            same = len(set(by_layer)) == 1
            step |= {"experts_per_token": experts, "threshold": by_layer[0] if same else by_layer}
    return {"made_with": result.ranks[0]["platform"], "flags": result.case.flags, "steps": steps}


def path_of(name: str, processor: str) -> Path:
    return FOLDER / processor / f"{name}.json"


def write(name: str, found: dict[str, Any]) -> None:
    """Keep a record, one line a step, for the kind of processor that made it."""
    head = json.dumps({key: found[key] for key in ("made_with", "flags")}, indent=1)
    lines = ",\n".join("  " + json.dumps(step) for step in found["steps"])
    path = path_of(name, found["made_with"]["processor"])
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{head[:-2]},\n "steps": [\n{lines}\n ]\n}}\n')


def read(name: str, processor: str = REFERENCE) -> dict[str, Any]:
    """The record of this kind of processor, or else the reference's or another's."""
    others = sorted(folder.name for folder in FOLDER.iterdir())
    paths = (path_of(name, kind) for kind in (processor, REFERENCE, *others))
    return json.loads(next(path for path in paths if path.exists()).read_text())


def differing_platform(golden: dict[str, Any], found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What decides about bits and is not as it was: the file's value, and the one here."""
    then, now = golden["made_with"], found["made_with"]
    return {key: (then[key], now[key]) for key in DECIDES if then[key] != now[key]}


def first_difference(golden: dict[str, Any], found: dict[str, Any], exact: bool) -> str | None:
    """The first step and field that differ, with both values; None if none does."""
    if golden["flags"] != found["flags"]:
        return "the flags of the run are others than the file's"
    if len(golden["steps"]) != len(found["steps"]):
        return f"{len(found['steps'])} steps, {len(golden['steps'])} in the file"
    steps = list(zip(golden["steps"], found["steps"], strict=True))
    tolerances = tolerances_of(golden)
    different = [a != b for a, b in steps]
    for number, (then, now) in enumerate(steps, 1):
        for field in then.keys() | now.keys():
            pair = then.get(field), now.get(field)
            if pair[0] != pair[1] and (exact or not _close(*pair, tolerances[field])):
                return (
                    f"step {number}, {field}: {pair[1]} here, {pair[0]} in the file "
                    f"({sum(different)} of {len(steps)} steps differ)"
                )
    return None


def tolerances_of(golden: dict[str, Any]) -> dict[str, float]:
    """How far apart a run on another platform may be."""
    routing = golden["flags"].partition("--moe-dynamic-routing ")[2].partition(" ")[0]
    return TOLERANCES_OF.get(routing, TOLERANCES)


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if not isinstance(a, list):
        a, b = [a], [b]
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=tolerance) for x, y in zip(a, b, strict=True)
    )
