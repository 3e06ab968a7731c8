"""The processes of a test session, which run many cases one after another.

    python tests/distributed/worker.py SESSION_DIRECTORY NUMBER_OF_PROCESSES

Importing torch and Megatron takes several seconds of a processor, so one process imports them,
once, and forks the workers; what torchrun would give them is set here. Until the last fork it has
one thread. A worker forks a child for each case: what a case leaves in modules, and gloo's threads,
end with it. Each case has its own world, made of some of the workers, its own log, and a result
file for each rank. See :mod:`tests.distributed.harness`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
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
_PR_SET_PDEATHSIG = 1  # of prctl(2)

# What a training imports late.
EVERY_CASE_IMPORTS = (
    "megatron.core.datasets.helpers",
    "megatron.core.dist_checkpointing.gpt_checkpoint_interop",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.models.mimo.optimizer",
    "megatron.core.tokenizers.text.libraries",
    "megatron.core.tokenizers.text.models",
    "megatron_dynmoe.huggingface.configuration_dynmoe",
    "megatron_dynmoe.kernels.routing_cpu",
    "megatron_dynmoe.training.loop",
    "torch.utils.serialization.config",
)


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

        from megatron_dynmoe.routing.counters import RoutingStatistics
        from megatron_dynmoe.runs.metrics import DynMoEMetricsTracker

        train_step, add = training.train_step, DynMoEMetricsTracker.add

        def recorded_step(forward_step, data_iterator, model, optimizer, *args, **kwargs):
            self.model, self.optimizer = model, optimizer
            outcome = train_step(forward_step, data_iterator, model, optimizer, *args, **kwargs)
            self._record_step(losses=outcome[0], skipped=outcome[1], grad_norm=outcome[5])
            return outcome

        def recorded_add(tracker, statistics):
            self._reduced.append(RoutingStatistics(statistics.packed.clone()))
            add(tracker, statistics)

        training.train_step, DynMoEMetricsTracker.add = recorded_step, recorded_add
        try:
            yield
        finally:
            training.train_step, DynMoEMetricsTracker.add = train_step, add
            self.result["finalized"] = [
                {
                    name: getattr(statistics, name).tolist()
                    for name in (*statistics.columns, "assignments")
                }
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
                "threshold": {layer: knob_of(r) for layer, r in routers.items()},
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


def knob_of(router: Any) -> float:
    """The number in a router's state that a controller may move; NaN if there is none."""
    name = router.rule.knob
    return float("nan") if name is None else router.get_buffer(name).item()


def main() -> None:
    directory, num_processes = Path(sys.argv[1]), int(sys.argv[2])
    cases = json.loads((directory / "cases.json").read_text())
    warm_up(cases)
    os.environ |= {"WORLD_SIZE": str(num_processes), "TORCHELASTIC_USE_AGENT_STORE": str(True)}
    workers = {
        _fork(lambda rank=rank: _work(cases, rank, directory)) for rank in range(num_processes)
    }
    # Torch's server is a thread, so it has to be of this process, and to wait for the forks.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = torch.distributed.TCPStore(address, port, is_master=True, wait_for_workers=False)
    failed = False
    while workers:
        worker, status = os.wait()
        workers.remove(worker)
        if status != 0 and not failed:
            failed = True
            for other in workers:
                os.kill(other, signal.SIGTERM)
    del server
    sys.exit(int(failed))


def _fork(function: Callable[[], None]) -> int:
    """Call the function in a process that ends with it, or with this one."""
    parent = os.getpid()
    child = os.fork()
    if child != 0:
        return child
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent:
            function()
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(cases: list[dict[str, Any]], process: int, directory: Path) -> None:
    """Be one process of the session: run its part of each case."""
    os.environ["RANK"] = str(process)
    store, _, _ = next(torch.distributed.rendezvous("env://"))
    store.set_timeout(PATIENCE)
    for case in cases:
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


def warm_up(cases: list[dict[str, Any]]) -> None:
    """Import and compute here, once, what every case would by itself."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
    from megatron.training.arguments import add_megatron_arguments

    from megatron_dynmoe.control.calibrate import default_gains
    from tests.helpers.megatron_arguments import keep_help_texts

    for name in EVERY_CASE_IMPORTS:
        with contextlib.suppress(ModuleNotFoundError):  # of another Megatron, which is tried
            importlib.import_module(name)
    for name in dict.fromkeys(name for case in cases for name in (case["entry"], *case["hooks"])):
        # A case of what no environment has, say, is the case's error and not the session's.
        with contextlib.suppress(Exception):
            _find(name)

    keep_help_texts()
    add_megatron_arguments(ArgumentParser())
    default_gains(num_experts=8, target=2)  # of the harness's DTOP_P; it is kept
    # Mock documents: shuffling the samples of 100,000 takes half a second.
    MockGPTLowLevelDataset.size = 1000
    # A child's garbage collector leaves alone, and so does not copy, what is there already.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    if os.environ.get("DYNMOE_TEST_DOUBLES"):
        from tests.doubles.on_cpu import prepare
    else:
        from megatron_dynmoe.run import prepare
    prepare()  # before the cases replace environment and output
    main()
