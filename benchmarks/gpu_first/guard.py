"""Waits beside a call of the driver, and ends its stages if it is killed.

python -m benchmarks.gpu_first.guard MARK FOLDER <PIPE

The other end of the pipe is the driver's. It closes when the driver ends, whatever ends it; if the
driver has written nothing before, it was killed, and its processes are ended and its temporary
folder is removed here. This process holds the driver's lock, too, so that no second call begins
before that.
"""

import shutil
import signal
import sys

from benchmarks.gpu_first import processes

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
mark, folder = sys.argv[1:]
if not sys.stdin.buffer.read():
    processes.end_all(mark)
    shutil.rmtree(folder, ignore_errors=True)
