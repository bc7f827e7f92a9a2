"""A real SLURM on this machine, for tests: slurmctld and slurmd processes from Debian's packages, a cluster of several nodes on loopback.

    apt-get install slurm-wlm munge
    python -m slurm.local_cluster DIR        # prints the SLURM_CONF to export, and runs until Ctrl-C

As root, in a container or on a machine of one's own: it starts munged, adds its nodes' names to /etc/hosts, and stops what it started.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.spec import UserError
from slurm.queue import ask

CONFIG = """\
ClusterName=harness
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=15,socket={munge}
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=15
KillWait=20
MinJobAge=60
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
{nodes}
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 MaxTime=INFINITE
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""
NICE = 10


def missing() -> str:
    """Why there can be no cluster here, "" when there can."""
    absent = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    if absent:
        return f"{absent[0]} is not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "only root can start its daemons"


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start_munge(folder: Path) -> subprocess.Popen[bytes]:
    """A munged of our own, with its own key and socket."""
    place = folder / "munge"
    place.mkdir(mode=0o711)
    (place / "key").write_bytes(os.urandom(128))
    (place / "key").chmod(0o600)
    options = [f"--socket={place / 'socket'}", f"--key-file={place / 'key'}", f"--pid-file={place / 'pid'}", f"--log-file={place / 'log'}",
               f"--seed-file={place / 'seed'}"]
    return subprocess.Popen(["munged", "--foreground", "--force", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def cluster(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[Path]:
    """A running cluster; yields the path of its slurm.conf, for SLURM_CONF. Its daemons and their jobs are niced.

    Raises:
        RuntimeError: its nodes do not come up within a minute.
    """
    for name in ("state", *(f"spool-n{i + 1}" for i in range(nodes))):
        (folder / name).mkdir(parents=True)
    names, ports = [f"n{i + 1}" for i in range(nodes)], free_ports(nodes + 1)
    hosts = Path("/etc/hosts")
    if not all(any(name in line.split() for line in hosts.read_text().splitlines()) for name in names):
        with open(hosts, "a") as stream:
            stream.write(f"127.0.0.1 {' '.join(names)}\n")
    here = socket.gethostname()
    lines = [f"NodeName={n} NodeHostname={here} NodeAddr=127.0.0.1 Port={p} CPUs={cpus} State=UNKNOWN" for n, p in zip(names, ports[1:], strict=True)]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=here, port=ports[0], folder=folder, munge=folder / "munge" / "socket", nodes="\n".join(lines)))
    before, os.environ["SLURM_CONF"] = os.environ.get("SLURM_CONF"), str(config)
    started = [start_munge(folder)]
    try:
        time.sleep(1.0)
        commands = [["slurmctld", "-D", "-f", str(config)], *(["slurmd", "-D", "-f", str(config), "-N", name] for name in names)]
        for command in commands:
            with open(folder / f"{command[0]}-{command[-1].rpartition('/')[2]}.out", "wb") as log:
                started.append(subprocess.Popen(["nice", "-n", str(NICE), *command], stdout=log, stderr=log))
        wait_until_up(names, started)
        yield config
    finally:
        empty_queue()
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for left in started_with(config):
            os.kill(left, signal.SIGKILL)
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)


def empty_queue() -> None:
    """Cancel what is in the queue and give it a moment to end."""
    with suppress(UserError):
        ask("scancel", "--me")
        deadline = time.monotonic() + 30
        while ask("squeue", "-h", "-a") and time.monotonic() < deadline:
            time.sleep(0.5)


def started_with(config: Path) -> list[int]:
    """Processes that have this cluster's SLURM_CONF in their environment: a slurmstepd, and its job, outlive their slurmd."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"SLURM_CONF={config}".encode() in place.read_bytes().split(b"\0") and int(place.parent.name) != os.getpid():
                found.append(int(place.parent.name))
    return found


def wait_until_up(names: list[str], started: list[subprocess.Popen[bytes]]) -> None:
    """Wait for all nodes to be idle. Raises RuntimeError."""
    deadline, last = time.monotonic() + 90, ""
    while time.monotonic() < deadline:
        try:
            last = ask("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t")
            if [line.split() for line in sorted(last.splitlines())] == [[name, "idle"] for name in sorted(names)]:
                return
        except UserError as error:
            last = str(error)
        if any(p.poll() is not None for p in started):
            break
        time.sleep(0.5)
    raise RuntimeError(f"the cluster does not come up: {last}")


def main() -> int:
    """Run a cluster until Ctrl-C, or until it is told to end: its daemons end with it."""
    if len(sys.argv) != 2 or missing():
        print(missing() or "usage: python -m slurm.local_cluster DIR", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what is in its background with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    with cluster(Path(sys.argv[1]).resolve()) as config:
        print(f"export SLURM_CONF={config}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
