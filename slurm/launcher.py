"""`--launcher slurm --cluster FILE`: the whole graph goes into SLURM's queue at once, and goes on there when this process ends.

Each node is `python -m harness.run JOB.json` in a job of its own, as under `local`: the same locks, records and resume. What is in the
queue already is picked up, whoever submitted it. `--wait` follows until everything has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from harness.jobs import Node
from harness.run import stop_on_signal
from harness.spec import UserError
from harness.store import ENDED, State, Store
from slurm.lanes import Lanes
from slurm.profile import Profile, default_precision, read_profile
from slurm.queue import Job, jobs_of, limits, sole_submitter, states
from slurm.snapshot import Snapshot, snapshot
from slurm.submit import Group, Refused, Submission, arrange, call_sbatch, folders_of, show_groups, warn

POLL_S = 5.0
HELD_S = 60.0  # how often --wait looks whether there is room for what was held back
SUBMITTED = 3
MAX_ARRAY = 1000  # where the cluster does not say: SLURM's own default is 1001


@dataclass
class Slurm:
    """Jobs of a SLURM cluster."""

    cluster: str | None = None
    wait: bool = False
    poll_s: float = POLL_S
    profile: Profile = field(init=False)
    code: Snapshot | None = field(default=None, init=False)

    flags: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cluster": {"metavar": "FILE", "help": "cluster profile, a TOML file (examples: slurm/profiles/)"},
        "wait": {"action": "store_true", "help": "follow until everything has ended, then print the table"},
    }

    def __post_init__(self) -> None:
        if self.cluster is None:
            raise UserError("--launcher slurm: name your cluster's profile with --cluster FILE (examples: slurm/profiles/)")
        if find_spec("submitit") is None:
            raise UserError("--launcher slurm: submitit is not installed: pip install 'vision-pretraining-harness[slurm]'")
        self.profile = read_profile(Path(self.cluster))

    @property
    def precision(self) -> str | None:
        """What `auto` means on the nodes; a login node may have no GPU."""
        return default_precision(self.profile)

    @staticmethod
    def queued(store: Store) -> Mapping[str, State]:
        """What is in the queue, for `status`."""
        return states(store)

    def standing(self, nodes: Sequence[Node], store: Store) -> tuple[dict[str, State], dict[str, str], Collection[Job], int]:
        """(state by key, job id by key of those in the queue, jobs here, number of all). The queue first: what leaves it meanwhile has its record."""
        queue, total = jobs_of(store)
        found = {n.key: store.state(store.folder(n)) for n in nodes}
        ids = {n.key: queue[n.folder].id for n in nodes if n.folder in queue and found[n.key].status not in ("done", "failed")}
        return found | {n.key: queue[n.folder].shown(store.folder(n)) for n in nodes if n.key in ids}, ids, queue.values(), total

    def submit(self, nodes: Sequence[Node], store: Store, only: Sequence[Node] | None = None) -> Submission:
        """Submit what is neither done, failed, in the queue nor worked on elsewhere. `only`: of these nodes.

        Raises:
            UserError: SLURM cannot be asked, or refuses the very first job.
        """
        with sole_submitter(store):
            found, ids, jobs, total = self.standing(nodes, store)
            todo = [n for n in (nodes if only is None else only) if found[n.key].status in ("missing", "interrupted")]
            done = {key for key, state in found.items() if state.status == "done"}
            most = self.limits() if todo else {}
            max_array = min(self.profile.max_array or MAX_ARRAY, most.get("MaxArraySize", MAX_ARRAY))
            caps = {name: number for name, number in most.items() if name.startswith(("MaxSubmitJobs", "MaxJobCount"))}
            caps |= {"max_submit": self.profile.max_submit} if self.profile.max_submit else {}
            least = min(caps, key=caps.__getitem__, default="")
            room = caps[least] - total if least else len(todo)
            lanes = Lanes(self.profile.max_running, jobs)
            out = arrange(todo, ids, done, self.profile, max(1, max_array), max(0, room), lanes, lambda group: self.sbatch(group, store))
            out.full = f"the queue has no room for more ({least} is {caps[least]}, {total + len(out.new)} are there)" if least else ""
        if out.refused and not out.ids:
            raise Refused(f"--cluster {self.profile.path}: {out.refused}")
        return out

    def limits(self) -> Mapping[str, int]:
        """See `slurm.queue.limits`."""
        asked = self.profile.resources
        return limits(asked.account, asked.partition, asked.qos)

    def sbatch(self, group: Group, store: Store) -> str:
        """Submit a group. All that one process submits runs the same code, also what --wait submits hours later."""
        self.code = self.code or snapshot(store)
        return call_sbatch(group, store, self.profile, self.code)

    def check_places(self, nodes: Sequence[Node], store: Store) -> None:
        """Raises UserError when jobs elsewhere could not see what they need."""
        self.profile.check_shared("--runs", store.root)
        for folder in folders_of(nodes):
            self.profile.check_shared("--data", folder)

    def check(self, nodes: Sequence[Node], store: Store, force: bool) -> None:
        """Raises UserError when there is something to submit and jobs could not see what they need, or SLURM cannot be asked."""
        if force or any(store.state(store.folder(n)).status != "done" for n in nodes):
            self.check_places(nodes, store)
            jobs_of(store)

    def launch(self, nodes: Sequence[Node], store: Store, show: Callable[[Mapping[str, Any]], None]) -> int:
        """See `harness.launch.Launcher`."""
        out = self.submit(nodes, store)
        self.report(out)
        if self.wait:
            return self.follow(nodes, store, show, out)
        return SUBMITTED if out.ids or out.held or any(store.state(store.folder(n)).status == "running" for n in nodes) else 0

    @staticmethod
    def report(out: Submission) -> None:
        """What was done, on stderr."""
        before = len(out.ids) - len(out.new)
        jobs = len({out.ids[n.key].partition("_")[0] for n in out.new})
        warn(f"submitted {len(out.new)} nodes as {jobs} jobs or arrays" + (f", {before} were in the queue already" if before else "")
             + ": `python -m harness status` follows them, the same line with --wait too")
        if out.held:
            warn(f"{len(out.held)} nodes are not submitted yet: {out.refused or out.full}: run the same line again later, or with --wait")
        if out.waiting:
            warn(f"{len(out.waiting)} nodes wait for one that failed (--retry) or that a process elsewhere works on: run the same line again when it has ended")

    def follow(self, nodes: Sequence[Node], store: Store, show: Callable[[Mapping[str, Any]], None], out: Submission) -> int:
        """Show how it goes until everything has ended; the jobs do not need it."""
        again, held, told = time.monotonic() + HELD_S, {n.key for n in (*out.held, *out.waiting)}, ""
        with stop_on_signal() as asked:
            while not asked():
                try:
                    if held and time.monotonic() > again:
                        again = time.monotonic() + HELD_S
                        out = self.submit(nodes, store, [n for n in nodes if n.key in held])
                        held = {n.key for n in (*out.held, *out.waiting)}
                    found = self.standing(nodes, store)[0]
                    told = told if held else ""
                except UserError as error:  # the controller may be away for a while, or other jobs of the user fill all that a QOS allows
                    if str(error) != told:
                        warn(f"{error}; asking again")
                    told = str(error)
                    time.sleep(self.poll_s)
                    continue
                status = {key: self.word(state, key in held) for key, state in found.items()}
                for node in nodes:  # parents come first
                    above = {status[p.key] for p in node.parents.values()} & set(ENDED)
                    if (status[node.key] == "killed" or node.key in held) and above - {"done"}:
                        status[node.key] = "blocked"
                show(status)
                if all(word in ENDED for word in status.values()):
                    return 0
                time.sleep(self.poll_s)
        warn("the jobs stay in the queue")
        return 130

    @staticmethod
    def word(state: State, held: bool) -> str:
        """A node's state as the display knows it: one that is no longer in the queue, and has no result, was taken out of it."""
        return "pending" if held else "killed" if state.status in ("missing", "interrupted") else state.status

    def preview(self, nodes: Sequence[Node], store: Store, force: bool = False) -> str:
        """What --dry-run adds: the text of each batch; with `force` as if nothing were done. Works where there is no SLURM."""
        self.check_places(nodes, store)
        try:
            found, ids, jobs, _ = self.standing(nodes, store)
            max_array = self.limits().get("MaxArraySize", MAX_ARRAY)
        except UserError as error:
            warn(f"as if the queue were empty: {error}")
            found, ids, jobs, max_array = {n.key: store.state(store.folder(n)) for n in nodes}, {}, (), MAX_ARRAY
        todo = [n for n in nodes if found[n.key].status in ("missing", "interrupted") or (force and n.key not in ids)]
        done = {key for key, state in found.items() if state.status == "done" and not force}
        lanes = Lanes(self.profile.max_running, jobs)
        return show_groups(todo, ids, done, store, self.profile, min(self.profile.max_array or MAX_ARRAY, max_array), lanes)
