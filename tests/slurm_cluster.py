"""A real Slurm of two nodes on this machine, of one CPU each, as root and without systemd, from Debian's packages."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits until its old credential has expired: two minutes by default, five seconds at least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=30
KillWait=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Return why there can be no cluster here; empty: there can."""
    if os.getuid() != 0:
        return "a Slurm of our own needs root"
    names = [name for name in PROGRAMS if not shutil.which(name)]
    return f"needs {', '.join(names)}: apt-get install slurm-wlm munge" if names else ""


def _free_ports(number: int) -> list[int]:
    with_sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [item.getsockname()[1] for item in with_sockets]
    for item in with_sockets:
        item.close()
    return ports


def call(*words: str) -> str:
    """Run one of Slurm's commands; returns what it printed."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=300).stdout


def pid_of(folder: Path, name: str) -> int:
    """Return the process of a daemon: "slurmctld", "munged", "slurmd.n1" or "slurmd.n2"."""
    return int((folder / f"{name}.pid").read_text())


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Start Slurm within the block, with all its files in a folder; the commands find it by SLURM_CONF."""
    host, (port, port1, port2) = socket.gethostname().partition(".")[0], _free_ports(3)
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, port=port, port1=port1, port2=port2))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(256))
    key.chmod(0o400)
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
    munge = [f"--{name}={folder / file}" for name, file in {**files, "log-file": "munged.log"}.items()]
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(config)
    try:
        call("munged", "--force", *munge)
        call("slurmctld", "-c")
        for node in ("n1", "n2"):
            call("slurmd", "-N", node)
        until = time.monotonic() + 300
        while call("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() != "2":
            assert time.monotonic() < until, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.1)
        yield
    finally:
        with suppress(subprocess.SubprocessError):
            call("scancel", "--full", "--user=root")
            until = time.monotonic() + 60
            while call("squeue", "-h") and time.monotonic() < until:
                time.sleep(0.1)
        for name in ("slurmd.n1", "slurmd.n2", "slurmctld", "munged"):
            with suppress(OSError, ValueError):
                os.kill(pid_of(folder, name), signal.SIGTERM)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
