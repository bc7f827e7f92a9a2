"""What SLURM's queue holds of a runs folder: batches as they were submitted, and what squeue says of them. sacct is not needed.

    runs/.slurm/lock                     held while somebody submits
    runs/.slurm/<batch>/submission.json  the nodes of one job or array, in the order of its tasks
                        batch.sh         what sbatch was given       slurm-*.out   what SLURM and the setup lines printed
    runs/.slurm/snapshots/               the code that jobs run (slurm/snapshot.py)
    runs/<node>/slurm.json               the attempts at a node: job, host, start, end, and how it ended

A batch's name is its job's comment in SLURM. What squeue shows under it is in the queue, whoever submitted it and whatever became of them.
"""

from __future__ import annotations

import datetime
import getpass
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.spec import UserError
from harness.store import Locked, State, Store, lock, read_json

FOLDER = ".slurm"
RESUMES = ("stopped", "time limit")  # how an attempt ends that is gone on with
OF_JOBS = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_")
OUR_OWN = tuple(f"HARNESS_{name}" for name in ("LAUNCHER_PID", "ATTEMPT", "NODES", "NODE", "RANK", "WORLD", "MEETING", "DOOR"))  # set for each process
OF_PROCESSES = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", *OUR_OWN,
                "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SILENT_S = 600.0  # a running job that has reported no step for so long is shown as silent
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "STOPPED", "SUSPENDED")
NO_CLUSTER = "no SLURM cluster answers on this machine ({}): run this on a login node of the cluster, when it is up"


def ask(*words: str) -> str:
    """What a SLURM command prints.

    Raises:
        UserError: it is not there, or refuses; its own last line says why.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, env=outside(os.environ))
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else "no answer in 120 s" if isinstance(error, subprocess.TimeoutExpired) else error
        raise UserError(NO_CLUSTER.format(f"{words[0]}: {reason}")) from error
    if done.returncode != 0:
        lines = [re.split("(?:error|fatal): ", line)[-1] for line in done.stderr.strip().splitlines()]
        if lines and re.search("configuration source|slurm controller", lines[-1]):
            raise UserError(NO_CLUSTER.format(f"{words[0]}: {lines[-1]}"))
        raise UserError(f"{words[0]}: {': '.join(lines[-2:]) or f'exit code {done.returncode}'}")
    return done.stdout


def outside(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment as it was outside the job that this process may run in: sbatch hands its own on, and with it the outer job's shape, task and GPUs."""
    if "SLURM_JOB_ID" not in environment:
        return dict(environment)
    return {k: v for k, v in environment.items() if k == "SLURM_CONF" or not (k.startswith(OF_JOBS) or k in OF_PROCESSES)}


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, as squeue shows it. `id` as in 12 or 12_3; `lanes` as it was submitted with (slurm/lanes.py), none without a cap."""

    id: str
    state: str
    reason: str
    host: str
    lanes: tuple[int, ...] = ()

    @property
    def waits(self) -> bool:
        """Whether it has not started (again)."""
        return self.state in WAITING

    def shown(self, folder: Path) -> State:
        """The state of its node, for `status`."""
        if self.waits:
            return State("pending", f"job {self.id} waits: {self.reason}")
        told = read_json(folder / "progress.json")
        silent = time.time() - told["time"] if isinstance(told, dict) and "time" in told else 0.0
        return State("running", f"job {self.id} on {self.host}" + (f", no step for {silent / 60:.0f} minutes" if silent > SILENT_S else ""))


def jobs_of(store: Store) -> tuple[dict[str, Job], int]:
    """(jobs of this runs folder by the name of their node's folder, number of all jobs that the user has in the queue). Raises UserError."""
    found, batches, lines = {}, dict[str, Any](), ask("squeue", "--me", "-h", "-r", "-o", "%i|%T|%N|%k|%r").splitlines()
    for line in lines:
        id, state, host, batch, reason = line.strip().split("|", 4)
        if batch not in batches:  # a comment of other people's jobs may be anything
            batches[batch] = read_json(store.root / FOLDER / batch / "submission.json") if batch.startswith("harness-") and "/" not in batch else None
        body, task = batches[batch], int(id.partition("_")[2] or 0)
        if not isinstance(body, dict) or task >= len(body["nodes"]):
            continue
        name, job = body["nodes"][task], Job(id, state, reason, host, tuple(body.get("lanes", ())))
        if job.waits or not ended(store.root / name, id):
            found[name] = job
    return found, len(lines)


def ended(folder: Path, id: str) -> bool:
    """Whether a job has said that it is over; SLURM may show it for a moment longer. One that was stopped may be on its way back into the queue."""
    attempts = (read_json(folder / "slurm.json") or {}).get("attempts") or [{}]
    return attempts[-1].get("job") == id and attempts[-1].get("how") not in (None, *RESUMES)


def states(store: Store) -> Mapping[str, State]:
    """States of the nodes in the queue by folder name, for `status`; where squeue cannot be asked, none and a warning."""
    if not (store.root / FOLDER).is_dir():
        return {}
    try:
        queue = {name: job.shown(store.root / name) for name, job in jobs_of(store)[0].items()}
        return queue | left(store, queue)
    except UserError as error:
        print(f"the queue is not shown: {error}", file=sys.stderr)
        return {}


def left(store: Store, queue: Mapping[str, State]) -> dict[str, State]:
    """Nodes that were submitted, are in the queue no more, and have no result although everything above them has."""
    last: dict[str, Path] = {}
    for path in sorted((store.root / FOLDER).glob("harness-*/submission.json")):
        last |= dict.fromkeys((read_json(path) or {}).get("nodes", ()), path.parent)
    found, without_memory = {}, list[str]()
    for name, batch in last.items():
        folder = store.root / name
        if name in queue or (folder / "record.json").exists() or store.state(folder).status not in ("missing", "interrupted"):
            continue
        parents = (read_json(folder / "job.json") or {}).get("parents", {}).values()
        if all((store.root / p["folder"] / "record.json").exists() for p in parents):
            attempts = (read_json(folder / "slurm.json") or {}).get("attempts") or [{"how": "never began"}]
            how = attempts[-1].get("how")
            if how is None:
                without_memory = without_memory or ["", *ask("squeue", "--me", "-h", "-r", "-t", "OUT_OF_MEMORY", "-o", "%i").split()]
                how = "out of memory" if attempts[-1]["job"] in without_memory else "died without a word"
            reason = f"left the queue ({how})"
            found[name] = State("interrupted", f"{reason}: see {batch}/slurm-*.out and log.txt; the same run line submits it again")
    return found


def limits(account: str, partition: str, qos: str) -> Mapping[str, int]:
    """MaxArraySize and the other whole numbers of the cluster's configuration, and what accounting lets this user have in the queue. Raises UserError.

    Args:
        account, partition, qos: what jobs ask for; "" for the user's own.
    """
    pairs = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in ask("scontrol", "show", "config").splitlines())}
    found = {name: int(value) for name, value in pairs.items() if value.isdecimal()}
    enforced = pairs.get("AccountingStorageEnforce", "").split(",")  # without "limits" they are written down and hold nobody back
    return found | (accounted(account, partition, qos) if "limits" in enforced else {})


def accounted(account: str, partition: str, qos: str) -> dict[str, int]:
    """MaxSubmitJobs of the user's association and MaxSubmitJobsPerUser of the QOS, where they are set and sacctmgr can be asked.

    A limit that is not seen here (of a parent, a partition's QOS) is met when sbatch refuses: what it does not take is held back, too.
    """
    try:
        rows = [line.split("|") for line in ask(
            "sacctmgr", "-nP", "show", "user", getpass.getuser(), "withassoc", "format=DefaultAccount,Account,Partition,MaxSubmitJobs,DefaultQOS").splitlines()]
        own = [row for row in rows if row[1] == (account or row[0]) and row[2] in ("", partition)]
        name = qos or next((row[4] for row in own if row[4]), "normal")
        of_qos = ask("sacctmgr", "-nP", "show", "qos", name, "format=MaxSubmitJobsPU").split()
    except UserError:
        return {}
    told = {"MaxSubmitJobs": [row[3] for row in own], f"MaxSubmitJobsPerUser of the QOS {name}": of_qos}
    return {limit: min(map(int, numbers)) for limit, values in told.items() if (numbers := [v for v in values if v.isdecimal()])}


@contextmanager
def sole_submitter(store: Store) -> Iterator[None]:
    """One at a time looks at the queue and submits; a second one waits. The kernel frees the lock when its owner dies."""
    with ExitStack() as held:
        told = False
        while True:
            try:
                held.enter_context(lock(store.root / FOLDER))
                break
            except Locked as error:
                if not told:
                    print(f"waiting: {error.owner} is submitting into {store.root}", file=sys.stderr)
                told = True
        yield


def new_batch(store: Store) -> Path:
    """Folder for a batch; its name is unlike any other."""
    import secrets

    name = f"harness-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    return store.root.resolve() / FOLDER / name
