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


class Cluster:
    """The daemons of a cluster by name: `munged`, `slurmctld`, and a node's name for its slurmd. Niced, and their jobs with them."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names, self.config, self._running = folder, names, folder / "slurm.conf", dict[str, subprocess.Popen[bytes]]()

    def start(self, name: str) -> None:
        """Start a daemon, again after `end`: slurmctld goes on with the queue that it left."""
        place = self.folder / "munge"
        munge = {"--socket": "socket", "--key-file": "key", "--pid-file": "pid", "--log-file": "log", "--seed-file": "seed"}
        command = {
            "munged": ["munged", "--foreground", "--force", *(f"{flag}={place / file}" for flag, file in munge.items())],
            "slurmctld": ["slurmctld", "-D", "-f", str(self.config)],
        }.get(name, ["slurmd", "-D", "-f", str(self.config), "-N", name])
        with open(self.folder / f"{name}.out", "ab") as log:
            self._running[name] = subprocess.Popen(["nice", "-n", str(NICE), *command], stdout=log, stderr=log)

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End a daemon; what a slurmd has started lives on."""
        process = self._running.pop(name)
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def end_all(self) -> None:
        """End what runs, the last started first."""
        for name in reversed(list(self._running)):
            self.end(name)

    def wait_until_up(self) -> None:
        """Wait for all nodes to be idle. Raises RuntimeError."""
        deadline, last = time.monotonic() + 90, ""
        while time.monotonic() < deadline:
            try:
                last = ask("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t")
                if [line.split() for line in sorted(last.splitlines())] == [[name, "idle"] for name in sorted(self.names)]:
                    return
            except UserError as error:
                last = str(error)
            if any(p.poll() is not None for p in self._running.values()):
                break
            time.sleep(0.5)
        raise RuntimeError(f"the cluster does not come up: {last}")


@contextmanager
def cluster(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[Cluster]:
    """A running cluster; `config` of what it yields is for SLURM_CONF.

    Raises:
        RuntimeError: its nodes do not come up within a minute and a half.
    """
    names, ports = [f"n{i + 1}" for i in range(nodes)], free_ports(nodes + 1)
    for name in ("state", *(f"spool-{n}" for n in names)):
        (folder / name).mkdir(parents=True)
    (folder / "munge").mkdir(mode=0o711)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o600)
    hosts = Path("/etc/hosts")
    if not all(any(name in line.split() for line in hosts.read_text().splitlines()) for name in names):
        with open(hosts, "a") as stream:
            stream.write(f"127.0.0.1 {' '.join(names)}\n")
    here, found = socket.gethostname(), Cluster(folder, names)
    lines = [f"NodeName={n} NodeHostname={here} NodeAddr=127.0.0.1 Port={p} CPUs={cpus} State=UNKNOWN" for n, p in zip(names, ports[1:], strict=True)]
    found.config.write_text(CONFIG.format(host=here, port=ports[0], folder=folder, munge=folder / "munge" / "socket", nodes="\n".join(lines)))
    before, os.environ["SLURM_CONF"] = os.environ.get("SLURM_CONF"), str(found.config)
    try:
        found.start("munged")
        time.sleep(1.0)
        for name in ("slurmctld", *names):
            found.start(name)
        found.wait_until_up()
        yield found
    finally:
        empty_queue()
        found.end_all()
        for left in started_with(found.config):
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


def main() -> int:
    """Run a cluster until Ctrl-C, or until it is told to end: its daemons end with it."""
    if len(sys.argv) != 2 or missing():
        print(missing() or "usage: python -m slurm.local_cluster DIR", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what is in its background with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    with cluster(Path(sys.argv[1]).resolve()) as running:
        print(f"export SLURM_CONF={running.config}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
