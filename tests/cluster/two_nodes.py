"""A real Slurm of two nodes on this machine, with ports, a key and folders of its own."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.distributed_harness import free_port
from tests.waiting import HANG, wait_until

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel")

_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2,requeue_setup_env_fail
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=10
OverTimeLimit=60
MinJobAge=3600
JobRequeue=1
SlurmctldTimeout=300
SlurmdTimeout=300
MessageTimeout=60
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""

_PARTITIONS = """
PartitionName=low Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=3600
PartitionName=high Nodes=n[0-1] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
"""A job of the second takes the place of one of the first, which is told an hour before it would be killed."""

_CPUS = 4


def missing() -> list[str]:
    """Return the programs that are not here."""
    return [name for name in NEEDED if _program(name) is None]


def install() -> None:
    """Install Debian's packages."""
    for command in (
        ["apt-get", "update"],
        ["apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"],
    ):
        subprocess.run(command, check=True, timeout=HANG, stdout=subprocess.DEVNULL)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class TwoNodes:
    """The cluster; `stop` ends what `start` has started.

    Args:
        folder: Where it keeps everything. Its name must be short: it holds a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "MASTER"))
            },
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # the nodes' names are known to Slurm only
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        """Start it, and wait until both nodes are idle."""
        for name in ("run", "log", "state", "spool-n0", "spool-n1"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        run = self.folder / "run"
        munge = {"key-file": key, "socket": run / "munge.sock", "pid-file": run / "munged.pid"}
        munge |= {"log-file": self.folder / "log" / "munged.log", "seed-file": run / "munged.seed"}
        self.call("munged", "--force", *(f"--{name}={path}" for name, path in munge.items()))
        self._configure()
        self.call("slurmctld", "-c")
        for node in ("n0", "n1"):
            self.call("slurmd", "-N", node)
        wait_until(lambda: self.call("sinfo", "-h", "-N", "-p", "low", "-t", "idle").count("\n") == 2)

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        lines = [_CONFIGURATION.format(host=host, port=free_port(), user=getpass.getuser(), folder=self.folder)]
        for node in ("n0", "n1"):
            place = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}"
            lines.append(f"NodeName={node} {place} CPUs={_CPUS} RealMemory=8000 State=UNKNOWN\n")
        (self.folder / "slurm.conf").write_text("".join([*lines, _PARTITIONS]))

    def stop(self) -> None:
        """End the jobs and the daemons, these by the ids in their own files."""
        self.call("scancel", f"--user={getpass.getuser()}")
        wait_until(lambda: not self.call("squeue", "-h"))
        for name in ("slurmd-n0", "slurmd-n1", "slurmctld", "munged"):
            file = self.folder / "run" / f"{name}.pid"
            if not file.exists():
                continue
            pid = int(file.read_text())
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists())

    def call(self, program: str, *arguments: str | Path, **variables: str) -> str:
        """Run a program of Slurm's and return what it prints."""
        path = _program(program)
        assert path is not None, program
        done = subprocess.run(
            [path, *map(str, arguments)],
            env=self.environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG,
        )
        assert done.returncode == 0, f"{program} {arguments}: {done.stderr}"
        return done.stdout

    def submit(self, script: Path, *arguments: str, options: Sequence[str] = (), **variables: str) -> Job:
        """Submit a batch script."""
        place = ["--parsable", f"--output={self.folder}/log/%x-%j.txt", *options]
        number = self.call("sbatch", *place, script, *arguments, **variables).strip()
        return Job(self, number)

    def nodes_of(self, state: str) -> set[str]:
        """Return the nodes in a state."""
        return set(self.call("sinfo", "-h", "-N", "-t", state, "-o", "%N").split())


class Job:
    """A job, or a task of an array (`12_1`)."""

    def __init__(self, cluster: TwoNodes, number: str) -> None:
        self.number = number
        self._cluster = cluster

    def facts(self) -> Mapping[str, str]:
        """Return what Slurm knows of it."""
        text = self._cluster.call("scontrol", "-o", "show", "job", self.number).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self) -> str:
        """Return RUNNING, PENDING, COMPLETED ..."""
        return self.facts()["JobState"]

    def restarts(self) -> int:
        """Return how often it was queued again."""
        return int(self.facts()["Restarts"])

    def log(self) -> str:
        """Return what it has printed so far."""
        facts = self.facts()
        file = Path(facts["StdOut"])
        return file.read_text() if file.exists() else ""

    def wait_for(self, *states: str) -> str:
        """Wait until it is in one of some states, and return which; fail if it has ended in another."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        wait_until(lambda: self.state() in (*states, *ended))
        state = self.state()
        assert state in states, f"{state}\n{self.log()}"
        return state

    def wait_for_line(self, text: str) -> None:
        """Wait until it has printed something."""
        wait_until(lambda: text in self.log() or self.state() in ("COMPLETED", "FAILED", "CANCELLED"))
        assert text in self.log(), self.log()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its ranks, as Slurm does before a time limit."""
        self._cluster.call("scancel", f"--signal={number.name[3:]}", self.number)
