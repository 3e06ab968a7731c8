"""A real Slurm of two nodes on this machine, in a folder of its own, beside any system's Slurm.

Both nodes are this machine under different names, which nothing resolves, and different ports. Key,
sockets, state and logs lie in one folder; the commands find them through ``SLURM_CONF``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
SYSTEM = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
START_TIMEOUT, STOP_TIMEOUT = 120, 60  # seconds, on a busy machine

SETTINGS = """\
ClusterName=two_nodes
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
# Jobs of two such Slurms at once have ranks that meet at ports of their own.
FirstJobId={first_job}
AuthType=auth/munge
# A requeued job waits until its old credentials have expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=2
SlurmdParameters=config_overrides # also if the machine has a single CPU
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Say why Slurm cannot run here, and what to do; None if it can."""
    absent = [name for name in DAEMONS + COMMANDS if not shutil.which(name, path=SYSTEM["PATH"])]
    if absent:
        return f"there is no {absent[0]}: apt-get install slurm-wlm munge, or run .ci/run as root"
    if os.geteuid() != 0:
        return "slurmd runs jobs as root only: run the tests as root, in a container for instance"
    return None


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """Start both nodes; yields the environment that Slurm's commands need, and stops all."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged wants its socket to be within everybody's reach
    environment = os.environ | SYSTEM | {"SLURM_CONF": str(folder / "slurm.conf")}
    for name in [name for name in environment if name.startswith(("SLURM_JOB", "SBATCH_"))]:
        del environment[name]
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with open(folder / "daemons.log", "ab") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    try:
        _write_settings(folder)
        start("munged", "--foreground", *_munge_paths(folder))
        _wait_for(lambda: (folder / "munge.socket").exists(), folder)
        start("slurmctld", "-D")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node)
        _wait_for(lambda: _idle_nodes(environment) == 2, folder)
        yield environment
    finally:
        _end_jobs(environment)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(STOP_TIMEOUT)
        shutil.rmtree(folder)


def _write_settings(folder: Path) -> None:
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(0o400)
    key.write_bytes(secrets.token_bytes(1024))
    host = socket.gethostname().partition(".")[0]
    ports, first_job = _free_ports(3), 1 + os.getpid() % 1900
    settings = SETTINGS.format(folder=folder, host=host, ports=ports, first_job=first_job)
    (folder / "slurm.conf").write_text(settings)


def _munge_paths(folder: Path) -> list[str]:
    names = {"key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    paths = [f"--{option}={folder}/munge.{name}" for option, name in names.items()]
    return [*paths, f"--socket={folder}/munge.socket"]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _idle_nodes(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    return len(answer.stdout.split())


def _end_jobs(environment: dict[str, str]) -> None:
    """End what a failed test left: the processes of a job would outlive Slurm's daemons."""
    subprocess.run(["scancel", "--user=root"], env=environment)
    end = time.monotonic() + STOP_TIMEOUT
    while time.monotonic() < end:
        if not subprocess.run(["squeue", "-h"], env=environment, capture_output=True).stdout:
            break
        time.sleep(0.2)


def _wait_for(condition, folder: Path) -> None:
    end = time.monotonic() + START_TIMEOUT
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
            raise TimeoutError(f"Slurm did not start within {START_TIMEOUT} s:\n{logs}")
        time.sleep(0.1)
