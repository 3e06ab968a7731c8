"""``--live-plot``: a separate process redraws the curves of a run that is under way.

    python -m megatron_dynmoe.runs.drawing.live_plot RUN     # once

The training waits only until its events are on disk. Nothing here imports torch.
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

from megatron_dynmoe.runs.drawing.curves import plot_curves
from megatron_dynmoe.runs.events import NothingLogged, read_run
from megatron_dynmoe.runs.folder import CURVES

PAUSE = 30.0  # least number of seconds between two pictures
MAX_SHARE = 0.05  # of one core: a long run's events take longer to read, so it draws less often


@contextmanager
def redrawing(
    run_dir: Path, get_writer: Callable[[], Any | None], pause: float = PAUSE
) -> Iterator[None]:
    """Redraw ``curves.png`` again and again until the block ends; report only the first failure.

    Args:
        run_dir: the folder given as ``--run-dir``.
        get_writer: returns the run's SummaryWriter, or None if there is none yet.
        pause: seconds between two pictures, at least.
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
        except Exception as failure:  # a failed picture must not end a training
            error = str(failure)
        if error and not has_complained:
            print(f"warning: --live-plot: {error}; the training goes on", flush=True)
            has_complained = True
        next_pause = max(pause, (time.monotonic() - started) / MAX_SHARE)


def _draw_in_a_process(run_dir: Path, stop: threading.Event) -> str:
    """Draw in a child process, and kill it if the run ends.

    Returns:
        The last line of the child's stderr if it failed, else an empty string.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "megatron_dynmoe.runs.drawing.live_plot", str(run_dir)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C reaches only the training, which draws at its end
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
    """Draw once; draw nothing if no step has been logged yet."""
    run_dir = Path(sys.argv[1])
    os.nice(10)
    with suppress(NothingLogged):
        plot_curves(run_dir / CURVES, *read_run(run_dir))


if __name__ == "__main__":
    main()
