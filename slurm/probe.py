"""`harness doctor --cluster FILE`: a job of a minute by the profile, on two nodes where there are two, and what it saw, line by line."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from harness import __version__, plugins
from harness.data import locate
from harness.provenance import versions
from harness.spec import UserError
from harness.store import MIN_FREE_BYTES, Store, read_json, write_json
from slurm.launcher import Slurm
from slurm.probe_job import MARK
from slurm.profile import Profile
from slurm.queue import FOLDER, WAITING, ask
from slurm.script import script
from slurm.snapshot import snapshot
from slurm.submit import Refused, warn

START_S = 600.0  # so long a probe may wait in the queue
RUN_S = 300.0  # and so long it may take: its time limit
POLL_S = 1.0
Line = tuple[bool | None, str, str]  # works (None: only told), what was found, what helps


class Cluster:
    """The check `cluster` of `harness doctor`."""

    flags: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cluster": {"metavar": "FILE", "help": "submit a probe of a minute by this cluster profile and say what it saw"},
        "drill": {"action": "store_true", "help": "with --cluster: preempt a tiny job, and compare its result with that of one left alone"},
    }

    @staticmethod
    def lines(args: argparse.Namespace) -> Iterator[Line]:
        """What was found, as it is found.

        Raises:
            UserError: a mistake in the profile, no SLURM here, or sbatch refuses the job.
        """
        from slurm.drill import drill

        if args.cluster is None:
            raise UserError("--drill: name your cluster's profile with --cluster FILE")
        launcher, store = Slurm(cluster=args.cluster), Store(Path(args.runs))
        profile = launcher.profile
        profile.check_shared("--runs", store.root)
        roots = [str(p.resolve()) for p in locate(args.data, plugins.build("protocols", "demo")).values() if p.is_dir()]
        for root in roots if args.data else ():
            profile.check_shared("--data", Path(root))
        ask("squeue", "--me", "-h")
        store.prepare()
        good = True
        with ended_as_by_ctrl_c():
            for line in probe(profile, store, sorted({*roots, *(str(Path(s).expanduser()) for s in profile.shared)})):
                good &= line[0] is not False
                yield line
            if args.drill:
                yield from drill(launcher, store) if good else [(None, "the drill is not done: mend what is BAD above first", "")]


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM and a terminal that is closed (unless nohup has it ignored) end it so, too: its jobs are not to stay in the queue."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def probe(profile: Profile, store: Store, roots: Sequence[str]) -> Iterator[Line]:
    """Submit the probe, wait for it, and tell what it saw. It is cancelled when it does not start in time, or when nobody listens any more."""
    batch = store.root.resolve() / FOLDER / f"probe-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    write_json(batch / "probe.json", {"roots": list(roots), "gpus": profile.resources.gpus})
    job, nodes = submit(profile, store, batch)
    try:
        yield True, f"job {job} submitted to {nodes} node{'s' * (nodes > 1)}", ""
        waited, reason = wait(job, lambda state: state not in WAITING, START_S)
        if reason:
            remedy = REASONS.get(reason, "see `man squeue`")
            yield False, f"job {job} has not started in {waited / 60:.0f} minutes and is cancelled: SLURM says {reason}", remedy
            return
        warn(f"job {job} began after {waited:.0f} s")
        waited, reason = wait(job, lambda state: state == "", RUN_S + 60)
        if reason:
            yield False, f"job {job} has not ended in {waited / 60:.0f} minutes", f"see {batch}"
        reports = read_reports(batch, nodes)
        yield from judge(reports, nodes, profile, batch)
    finally:
        with suppress(UserError):
            ask("scancel", job)


REASONS = {
    "Resources": "the nodes are busy: try again later, or another partition", "Priority": "others come first: try again later, or another partition or qos",
    "PartitionNodeLimit": "the partition gives fewer nodes to a job", "PartitionTimeLimit": "the partition allows less time",
    "PartitionDown": "choose another partition", "QOSMaxJobsPerUserLimit": "as many jobs as the qos allows are running already",
    "AssocGrpBillingMinutes": "the account's hours are used up",
}


def submit(profile: Profile, store: Store, batch: Path) -> tuple[str, int]:
    """(job id, number of nodes): two where the partition has two and sbatch takes that, else one. Raises Refused."""
    code = snapshot(store)
    code.save()
    short = dataclasses.replace(profile.resources, time=str(round(RUN_S / 60)), signal_s=60)
    for nodes in (2, 1) if most_nodes(profile.resources.partition) > 1 else (1,):
        (batch / "batch.sh").write_text(script(batch, (), short, profile, code.tree, probe=nodes))
        try:
            return ask("sbatch", "--parsable", str(batch / "batch.sh")).strip().splitlines()[-1].partition(";")[0], nodes
        except UserError as error:
            if nodes == 1:
                shutil.rmtree(batch)
                raise Refused(f"--cluster {profile.path}: {error}") from error
            warn(f"not on two nodes ({error}); trying one")
    raise AssertionError("unreachable")


def most_nodes(partition: str) -> int:
    """Nodes that one job may have in a partition ("": the default one), 1 where SLURM does not say."""
    for line in ask("sinfo", "-h", "-o", "%P|%D|%s").splitlines():
        name, there, size = line.strip().split("|")[:3]
        if name.rstrip("*") == partition or (not partition and name.endswith("*")):
            most = size.rpartition("-")[2]
            return min(int(there), int(most) if most.isdecimal() else int(there))
    return 1


def wait(job: str, over: Callable[[str], bool], seconds: float) -> tuple[float, str]:
    """Wait until a job's state ("" when it is out of the queue) is such. (seconds waited, why not: "" when it is)."""
    began = time.monotonic()
    while True:
        lines = [line.strip().split("|", 4) for line in ask("squeue", "--me", "-h", "-o", "%i|%T|%N|%k|%r").splitlines()]
        state, reason = next(((line[1], line[4]) for line in lines if line[0] == job), ("", ""))
        if over(state) or not state:
            return time.monotonic() - began, ""
        if time.monotonic() - began > seconds:
            return time.monotonic() - began, reason if state in WAITING else state
        time.sleep(POLL_S)


def read_reports(batch: Path, nodes: int) -> dict[int, dict[str, Any]]:
    """Rank -> report: from its file, else as it was printed."""
    found = {}
    for line in output(batch):
        if MARK in line:
            with suppress(ValueError):
                report = json.loads(line.partition(MARK)[2])
                found[int(report["rank"])] = report
    return found | {rank: told for rank in range(nodes) if (told := read_json(batch / f"report-{rank}.json"))}


def output(batch: Path) -> list[str]:
    """What SLURM, the setup lines and the probe printed."""
    return [line for path in sorted(batch.glob("slurm-*.out")) for line in path.read_text(errors="replace").splitlines() if line.strip()]


def judge(reports: Mapping[int, Mapping[str, Any]], nodes: int, profile: Profile, batch: Path) -> Iterator[Line]:
    """The lines of the reports."""
    if absent := nodes - len(reports):
        said = [line for line in output(batch) if MARK not in line and "Exited with exit code" not in line][-2:] or ["nothing was printed"]
        remedy = f"the interpreter (`python`), the setup lines and the folder must be there on every node: see {batch}"
        yield False, f"{absent} of {nodes} nodes said nothing ({' / '.join(said)})", remedy
    asked, ours = profile.resources.gpus, {"harness": __version__, **versions()}
    for _, r in sorted(reports.items()):
        there = f"{len(r['gpus'])} GPUs ({', '.join(sorted(set(r['gpus'])))})" if r["gpus"] else "no GPU"
        if asked:
            remedy = f"{asked} asked for: see `gpus` and `gres` of the profile, and whether this torch is one for CUDA"
            yield len(r["gpus"]) >= asked, f"{r['host']}: {there}", remedy
        else:
            yield None, f"{r['host']}: {there}", "none is asked for (`gpus` of the profile)"
        wrong = r["wrong"] or ("" if r["free"] >= MIN_FREE_BYTES else f"has {r['free'] // 2**20} MB free")
        found = wrong or f"is seen and written, {r['free'] // 2**30} GB free"
        yield not wrong, f"{r['host']}: {batch.parents[1]} {found}", "choose a --runs that all nodes share, with room"
        for root, problem in r["roots"].items():
            yield not problem, f"{r['host']}: {root} {problem or 'is seen'}", "a folder that all nodes share is needed: copy the data there, or mend `shared`"
        differ = [f"{k} {r['versions'].get(k, 'missing')} (here {ours.get(k, 'missing')})" for k in sorted({*ours, *r["versions"]})
                  if ours.get(k) != r["versions"].get(k)]
        same = f"the same {len(ours)} versions as here (python {ours['python']}, torch {ours.get('torch')}, harness {ours['harness']})"
        yield not differ, f"{r['host']}: {', '.join(differ) or same}", "let the nodes use this environment: `python` and `setup` of the profile"
    sums = [r.get("reduce") or {"error": "did not end"} for _, r in sorted(reports.items())]
    if bad := [s.get("error", "wrong sum") for s in sums if not s.get("right")]:
        variable = "NCCL_SOCKET_IFNAME" if asked else "GLOO_SOCKET_IFNAME"
        remedy = f"nodes must resolve and reach one another; {variable} in the profile's environment names the network"
        yield False, f"all-reduce across {nodes} nodes: {bad[0]}", remedy
    elif sums:
        yield (True, f"all-reduce of 4 MB across {sums[0]['world']} nodes with {sums[0]['backend']} in {max(s['seconds'] for s in sums) * 1000:.0f} ms", "")
    if nodes == 1:
        yield None, "one node only", "the partition, or sbatch, gives no two"
