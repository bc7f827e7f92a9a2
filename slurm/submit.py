"""From a plan to jobs of SLURM: which nodes make an array, what each waits for, what is submitted and what is held back."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.jobs import Node
from harness.launch import write_job
from harness.spec import UserError
from harness.store import Store, read_json, write_json
from slurm.lanes import Lanes
from slurm.profile import Profile, Resources
from slurm.queue import ask, new_batch
from slurm.script import script
from slurm.snapshot import Snapshot, snapshot


@dataclass(frozen=True)
class Group:
    """Nodes that ask for the same and wait for the same jobs: one job, or one array. `behind`: ids of all that must have ended before in its `lanes`."""

    nodes: Sequence[Node]
    after: Sequence[str]
    resources: Resources
    lanes: Sequence[int] = ()
    behind: Sequence[str] = ()


class Refused(UserError):
    """sbatch refuses a group; the message is its own."""


@dataclass
class Submission:
    """What became of a call: ids by key (of jobs in the queue before, too), nodes held back for lack of room, what sbatch said, and whose limit the room is."""

    ids: dict[str, str] = field(default_factory=dict)
    new: list[Node] = field(default_factory=list)
    held: list[Node] = field(default_factory=list)
    waiting: list[Node] = field(default_factory=list)
    refused: str = ""
    full: str = ""


def arrange(
    todo: Sequence[Node], queue: Mapping[str, str], done: set[str], profile: Profile, max_array: int, room: int, lanes: Lanes, submit: Callable[[Group], str]
) -> Submission:
    """Submit nodes in the order of the graph, those of equal shape and equal dependency together.

    Args:
        todo: nodes to submit, parents first.
        queue: key -> job id of nodes that are in the queue.
        done: keys of nodes whose result is there.
        max_array: nodes of one array at most.
        room: jobs that the queue takes.
        lanes: what is in the queue, for the cap on what runs; new groups are added.
        submit: a group -> its job id; raises Refused.

    Returns:
        `waiting` are nodes below one that is neither done nor in the queue (it failed, or a process elsewhere works on it).
    """
    out, left = Submission(dict(queue)), list(todo)
    while left:
        groups: dict[tuple[Resources, tuple[str, ...]], list[Node]] = {}
        later = []
        for node in left:
            parents = [p.key for p in node.parents.values() if p.key not in done]
            if all(p in out.ids for p in parents):
                groups.setdefault((profile.of_node(node), tuple(sorted({out.ids[p] for p in parents}))), []).append(node)
            else:
                later.append(node)
        if not groups:
            above = {n.key for n in out.held}
            for node in later:  # parents come first, so one pass finds all that are below a node held back
                held = any(p.key in above for p in node.parents.values())
                (out.held if held else out.waiting).append(node)
                above |= {node.key} if held else set()
            break
        beside = sum(map(len, groups.values()))
        for (resources, after), members in groups.items():
            while members:
                size = min(max_array, room - len(out.new))
                if size < 1 or out.refused:
                    out.held += members
                    break
                part, members = members[:size], members[size:]
                chosen = lanes.choose(len(part), beside)
                try:
                    job = submit(Group(part, after, resources, chosen, [id for id in lanes.before(chosen) if id not in after]))
                except Refused as error:
                    out.refused, members = str(error), part + members
                    continue
                lanes.add(job, chosen, len(part))
                out.new += part
                out.ids |= {n.key: f"{job}_{task}" if len(part) > 1 else job for task, n in enumerate(part)}
        left = later
    return out


def call_sbatch(group: Group, store: Store, profile: Profile, code: Snapshot) -> str:
    """Write a batch down, then submit it: killed in between, it is found again in the queue by its name. Returns the job's id; raises Refused."""
    batch = new_batch(store)
    for node in group.nodes:  # written by an earlier line it may name folders that have moved since, or another --on-oom; `local` writes it at each start, too
        told = read_json(store.folder(node) / "job.json")
        if not isinstance(told, dict) or json.dumps(told.get("where"), sort_keys=True) != json.dumps(node.where, sort_keys=True):
            write_job(node, store)
    body = {"schema": 1, "nodes": [n.folder for n in group.nodes], "max_lost": profile.max_lost, "cluster": profile.path, "time": time.time()}
    code.save()
    write_json(batch / "submission.json", {**body, "snapshot": code.name, "lanes": group.lanes})
    (batch / "batch.sh").write_text(text_of(group, batch, profile, code.tree))
    try:
        answer = ask("sbatch", "--parsable", str(batch / "batch.sh"))
    except UserError as error:
        raise Refused(str(error)) from error
    return answer.strip().splitlines()[-1].partition(";")[0]


def text_of(group: Group, batch: Path, profile: Profile, tree: Path) -> str:
    """What sbatch gets."""
    return script(batch, group.nodes, group.resources, profile, tree, {"afterok": group.after, "afterany": group.behind}, len(group.lanes))


def show_groups(todo: Sequence[Node], queue: Mapping[str, str], done: set[str], store: Store, profile: Profile, max_array: int, lanes: Lanes) -> str:
    """What would be submitted: the exact text of each batch. Ids are not known yet: J1, J2, ... stand for them."""
    parts: list[str] = []
    tree = snapshot(store).tree

    def submit(group: Group) -> str:
        id = f"J{len(parts) + 1}"
        text = text_of(group, store.root.resolve() / ".slurm" / id, profile, tree)
        titles = [f"#   {task}: {n.key} {n.about['title']} seed {n.about['seed']}" for task, n in enumerate(group.nodes)]
        capped = f", {len(group.lanes)} of {lanes.count} lanes" if group.lanes else ""
        parts.append("\n".join([f"# ---- {id}: {len(group.nodes)} node{'s' * (len(group.nodes) > 1)}{capped}", *titles, text]))
        return id

    arrange(todo, queue, done, profile, max_array, len(todo), lanes, submit)
    return "\n".join(parts) or "nothing to submit"


def folders_of(nodes: Sequence[Node]) -> list[Path]:
    """Data folders and files that nodes read, each once."""
    return sorted({Path(p) for n in nodes for kind in ("folders", "files") for p in n.where.get(kind, {}).values()})


def warn(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)
