"""One process of the test session: runs many cases one after another.

    torchrun --nproc-per-node N tests/distributed/worker.py SESSION_DIRECTORY

Importing torch and Megatron takes several seconds a process, so a process imports them once and
forks a child for each case: what a case leaves in modules, and gloo's threads, end with it. Each
case has its own world, made of some of these processes, its own log, and a result file for each
rank. See :mod:`tests.distributed.harness`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore

from megatron_dynmoe.backends import cpu
from megatron_dynmoe.settings.messages.command_line import UsageError

# For other processes, while they work on other cases: the first one of a case to be free waits
# until the last one is. A rank that dies is noticed at once.
PATIENCE = timedelta(minutes=30)


class Recorder:
    """Collects what a case did; hooks add their own under :attr:`result`.

    Attributes:
        result: what becomes the rank's JSON: ``steps``, one entry per call of Megatron's
            ``train_step``; ``finalized``, one per reduction of the counts.
        model: this rank's model chunks, from the first step on.
        optimizer: Megatron's optimizer, from the first step on.
        folder: where hooks leave files of this case; not made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result: dict[str, Any] = {"steps": [], "finalized": []}
        self.model: list[torch.nn.Module] = []
        self.optimizer: Any = None
        self._reduced: list[Any] = []  # tensors, so that following a step does not disturb it

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the training steps and the reduced counts."""
        from megatron.training import training

        from megatron_dynmoe.runs.metrics import DynMoEMetricsTracker

        train_step, add = training.train_step, DynMoEMetricsTracker.add

        def recorded_step(forward_step, data_iterator, model, optimizer, *args, **kwargs):
            self.model, self.optimizer = model, optimizer
            outcome = train_step(forward_step, data_iterator, model, optimizer, *args, **kwargs)
            self._record_step(losses=outcome[0], skipped=outcome[1], grad_norm=outcome[5])
            return outcome

        def recorded_add(tracker, statistics):
            self._reduced.append(statistics._make(value.clone() for value in statistics))
            add(tracker, statistics)

        training.train_step, DynMoEMetricsTracker.add = recorded_step, recorded_add
        try:
            yield
        finally:
            training.train_step, DynMoEMetricsTracker.add = train_step, add
            self.result["finalized"] = [
                {name: value.tolist() for name, value in statistics._asdict().items()}
                for statistics in self._reduced
            ]

    def _record_step(self, losses: dict[str, Any], skipped: int, grad_norm: float) -> None:
        from megatron_dynmoe.control.update import routers_of

        routers = {router.layer_number: router for router in routers_of(self.model)}
        loss = losses.get("lm loss")
        self.result["steps"].append(
            {
                "loss": None if loss is None else float(loss),  # only on the last stage
                "skipped": bool(skipped),
                "grad_norm": grad_norm,
                # By global layer number, after the step:
                "threshold": {layer: r.threshold.item() for layer, r in routers.items()},
                "integral": {layer: r.integral.item() for layer, r in routers.items()},
                "measured": {layer: r.measured.item() for layer, r in routers.items()},
                "theta": {layer: r.theta.item() for layer, r in routers.items()},
                "map": {
                    layer: r.knot_thresholds.tolist()
                    for layer, r in routers.items()
                    if r.drawn is not None
                },
                "counted": {layer: r.counters.sums.tokens.item() for layer, r in routers.items()},
            }
        )


def main() -> None:
    directory = Path(sys.argv[1])
    process = int(os.environ["RANK"])
    store, _, _ = next(torch.distributed.rendezvous("env://"))
    store.set_timeout(PATIENCE)
    for case in json.loads((directory / "cases.json").read_text()):
        rank = process - case["first_process"]
        if not 0 <= rank < case["num_ranks"]:
            continue
        store.wait([f"done/{name}" for name in case["after"]])
        _in_a_child(case, rank, directory)
        if store.add(f"finished/{case['name']}", 1) == case["num_ranks"]:
            store.set(f"done/{case['name']}", "")


def _in_a_child(case: dict[str, Any], rank: int, directory: Path) -> None:
    """Run one case in a forked process and leave its result beside its log."""
    path = directory / f"{case['name']}.rank{rank}.json"
    child = os.fork()
    if child == 0:
        with _output_to(path.with_suffix(".log")):
            result = _run(case, rank, directory / f"{case['name']}.files")
        path.write_text(json.dumps(result, allow_nan=True))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status != 0 and not path.exists():
        path.write_text(json.dumps({"error": f"the process ended with wait status {status}"}))


def _run(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Run one case in a world of its own; what it raises becomes ``error`` in the result."""
    from megatron.training.global_vars import get_tensorboard_writer

    recorder = Recorder(folder)
    store, _, _ = next(torch.distributed.rendezvous("env://"))  # the parent's cannot be shared
    os.environ.update(
        case["env"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["num_ranks"])
    )
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    sys.argv = [case["entry"], *case["flags"]]
    torch.distributed.init_process_group(
        "gloo" if cpu.is_installed() else "nccl",
        store=PrefixStore(case["name"], store),
        rank=rank,
        world_size=case["num_ranks"],
        timeout=PATIENCE,
    )
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(recorder.watching())
            for hook in case["hooks"]:
                stack.enter_context(_find(hook)(recorder))
            _find(case["entry"])()
    except SystemExit as exit:  # how Megatron's loop ends at --exit-interval
        if isinstance(exit.__context__, UsageError):
            recorder.result["error"] = f"UsageError: {exit.__context__}"
        elif exit.code:
            recorder.result["error"] = traceback.format_exc()
    except Exception:
        recorder.result["error"] = traceback.format_exc()
        traceback.print_exc()
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.close()
    return recorder.result


def _find(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send standard output and error, also those of C++, to a file."""
    kept = os.dup(1), os.dup(2)
    with open(path, "w") as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for old, standard in zip(kept, (1, 2), strict=True):
                os.dup2(old, standard)
                os.close(old)


def warm_up() -> None:
    """Import and read here, once, what every case would by itself."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer  # noqa: F401
    from megatron.training.arguments import add_megatron_arguments

    import megatron_dynmoe.huggingface.configuration_dynmoe
    import megatron_dynmoe.training.loop  # noqa: F401

    # Megatron reads its help texts from its own source, each time that it parses arguments.
    inspect.getsource = functools.cache(inspect.getsource)
    add_megatron_arguments(ArgumentParser())
    # Mock documents: shuffling the samples of 100,000 takes half a second.
    MockGPTLowLevelDataset.size = 1000


if __name__ == "__main__":
    if os.environ.get("DYNMOE_TEST_DOUBLES"):
        from tests.doubles.on_cpu import prepare
    else:
        from megatron_dynmoe.run import prepare
    prepare()  # before the cases replace environment and output
    warm_up()
    main()
