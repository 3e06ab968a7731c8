"""``--live-plot``: the curves of a run that is under way, redrawn by a process of its own.

    python -m megatron_dynmoe.runs.live_plot RUN     # once

The training only waits for its events to reach the disk. Nothing here imports torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_dynmoe.runs.folder import CURVES
from megatron_dynmoe.runs.report import NothingLogged, plot_curves, read_run

PAUSE = 30.0  # seconds between two pictures, at least
MAX_SHARE = 0.05  # of one core: a long run's events take longer to read, and are read less often


@contextmanager
def redrawing(
    run_dir: Path, get_writer: Callable[[], Any | None], pause: float = PAUSE
) -> Iterator[None]:
    """Redraw ``curves.png`` again and again until the block ends; a failure is said once.

    Args:
        run_dir: the folder given as ``--run-dir``.
        get_writer: gives the run's SummaryWriter, or None while there is none.
        pause: seconds.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_redraw, args=(run_dir, get_writer, pause, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _redraw(
    run_dir: Path, get_writer: Callable[[], Any | None], pause: float, stop: threading.Event
) -> None:
    next_pause, has_complained = pause, False
    while not stop.wait(next_pause):
        started = time.monotonic()
        try:
            if (writer := get_writer()) is not None:
                writer.flush()
            error = _draw_in_a_process(run_dir, stop)
        except Exception as failure:  # a picture is not worth a training
            error = str(failure)
        if error and not has_complained:
            print(f"warning: --live-plot: {error}; the training goes on", flush=True)
            has_complained = True
        next_pause = max(pause, (time.monotonic() - started) / MAX_SHARE)


def _draw_in_a_process(run_dir: Path, stop: threading.Event) -> str:
    """The last line of what it says where it fails; it is ended where the run ends."""
    child = subprocess.Popen(
        [sys.executable, "-m", "megatron_dynmoe.runs.live_plot", str(run_dir)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C is for the training, which draws once more at its end
    )
    with child:
        while True:
            try:
                _, said = child.communicate(timeout=0.5)
            except subprocess.TimeoutExpired:
                if stop.is_set():
                    child.kill()
                    return ""
            else:
                return said.strip().rpartition("\n")[2] if child.returncode else ""


def main() -> None:
    """Draw once; nothing where no step has been logged yet."""
    run_dir = Path(sys.argv[1])
    os.nice(10)
    with suppress(NothingLogged):
        plot_curves(run_dir / CURVES, *read_run(run_dir))


if __name__ == "__main__":
    main()
