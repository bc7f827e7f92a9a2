"""`max_running` holds for the whole of a submission, and nothing waits for ever: schedules played on random graphs, with whatever can happen to a job."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

import pytest

from harness.jobs import Node
from slurm.lanes import Lanes
from slurm.profile import Profile, Resources
from slurm.queue import Job
from slurm.submit import Group, arrange


class Played:
    """SLURM as its documentation has it: afterok, afterany, kill-on-invalid-dep, tasks of an array at a time, ids that a requeued job keeps."""

    def __init__(self, seed: int) -> None:
        self.random, self.next = random.Random(seed), 100
        self.state, self.groups, self.most = dict[str, str](), dict[str, Group](), 0  # by task: waits, runs, ok, bad

    def submit(self, group: Group) -> str:
        id, self.next = str(self.next), self.next + 1
        assert all(self.tasks(other) for other in (*group.after, *group.behind)), "it waits for what was submitted before"
        self.groups[id] = group
        tasks = [f"{id}_{i}" for i in range(len(group.nodes))] if len(group.nodes) > 1 else [id]
        self.state |= dict.fromkeys(tasks, "waits")
        return id

    def tasks(self, id: str) -> list[str]:
        """Of an array's id all of its tasks."""
        return [id] if id in self.state else [t for t in self.state if t.startswith(f"{id}_")]

    def ended(self, id: str) -> bool:
        return all(self.state[t] in ("ok", "bad") for t in self.tasks(id))

    def can_start(self, task: str) -> bool:
        group = self.groups[task.partition("_")[0]]
        running = sum(self.state[t] == "runs" for t in self.tasks(task.partition("_")[0]))
        free = running < (len(group.lanes) or len(group.nodes))
        return free and self.state[task] == "waits" and all(self.state[p] == "ok" for p in group.after) and all(map(self.ended, group.behind))

    def kill(self) -> None:
        """What depends on a failure leaves the queue."""
        for task, state in self.state.items():
            if state == "waits" and any(self.state[p] == "bad" for p in self.groups[task.partition("_")[0]].after):
                self.state[task] = "bad"

    def step(self) -> bool:
        """Something happens; False when all has ended."""
        waiting, running = ([t for t, s in self.state.items() if s == word] for word in ("waits", "runs"))
        if not waiting and not running:
            return False
        ready = [t for t in waiting if self.can_start(t)]
        assert ready or running, "nothing runs, and nothing can start"
        task = self.random.choice([*ready * 3, *running, *self.random.sample(waiting, min(1, len(waiting)))])
        if task in ready:
            self.state[task] = "runs"
        elif task in running:
            self.state[task] = self.random.choices(["ok", "bad", "waits"], [6, 1, 1])[0]
        elif self.random.random() < 0.1:
            self.state[task] = "bad"  # cancelled
        while (before := list(self.state.values())) and (self.kill() or list(self.state.values()) != before):
            pass
        self.most = max(self.most, sum(s == "runs" for s in self.state.values()))
        return True

    def jobs(self) -> list[Job]:
        """The queue."""
        return [Job(t, s, "", "", tuple(self.groups[t.partition("_")[0]].lanes)) for t, s in self.state.items() if s in ("waits", "runs")]


def graph(draw: random.Random, number: int) -> list[Node]:
    """Nodes of which each may wait for up to two earlier ones."""
    nodes: list[Node] = []
    for i in range(draw.randint(1, 25)):
        parents = {p.name: p for p in draw.sample(nodes, min(len(nodes), draw.choice((0, 1, 1, 2))))}
        nodes.append(Node("pretrain", f"{draw.choice('abc')}{number}-{i}", {"i": i, "of": number}, parents))
    return nodes


def submitted(slurm: Played, nodes: Sequence[Node], cap: int, max_array: int, profile: Profile) -> None:
    arrange(nodes, {}, set(), profile, max_array, 1000, Lanes(cap, slurm.jobs()), slurm.submit)


SHAPES = Profile("c.toml", Resources(), nodes=(("pretrain-b*", (("cpus", 2),)),))


@pytest.mark.parametrize("seed", range(150))
def test_never_more_than_the_cap_run_and_all_come_to_an_end(seed: int) -> None:
    """Also while tasks fail, are cancelled and requeued, and with what earlier lines have left in the queue under the same cap."""
    slurm, draw = Played(seed), random.Random(seed)
    cap = draw.randint(1, 9)
    for number in range(3):
        submitted(slurm, graph(draw, number), cap, draw.randint(1, 12), SHAPES)
        for _ in range(draw.randint(0, 40)):
            slurm.step()
    while slurm.step():
        pass
    assert 0 < slurm.most <= cap


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize(("before", "after"), [(0, 3), (7, 3), (2, 5)])
def test_what_was_submitted_under_another_cap_counts(seed: int, before: int, after: int) -> None:
    """Without one, or under a larger one: what runs then goes on, and no new node beside it that would be one too many."""
    slurm, draw = Played(seed), random.Random(seed)
    submitted(slurm, graph(draw, 0), before, 12, SHAPES)
    for _ in range(10):
        slurm.step()
    old = set(slurm.state)
    submitted(slurm, graph(draw, 1), after, 12, SHAPES)
    while slurm.step():
        running = {t for t, s in slurm.state.items() if s == "runs"}
        assert running <= old or len(running) <= max(before, after)
        assert before in range(1, after) or not running - old or len(running) <= after


def test_a_cap_that_is_not_reached_keeps_nobody_waiting() -> None:
    slurm = Played(0)
    submitted(slurm, graph(random.Random(3), 0), 25, 12, SHAPES)
    assert not any(group.behind for group in slurm.groups.values())


def seconds_of(nodes: Sequence[Node], took: dict[str, float], cap: int, lanes: bool) -> float:
    """How long a submission takes, with lanes or on a cluster that starts what it can up to the cap (as a QOS of that size does)."""
    slurm, now, running = Played(0), 0.0, list[tuple[float, str]]()
    submitted(slurm, nodes, cap if lanes else 0, 1000, SHAPES)
    while True:
        for task in slurm.state:
            if len(running) < cap and slurm.can_start(task):
                slurm.state[task] = "runs"
                batch, _, number = task.partition("_")
                heapq.heappush(running, (now + took[slurm.groups[batch].nodes[int(number or 0)].name], task))
        if not running:
            return now
        now, task = heapq.heappop(running)
        slurm.state[task] = "ok"


@pytest.mark.parametrize("cap", [2, 4, 8, 16])
def test_what_it_costs(cap: int) -> None:
    """Four methods, three seeds, evaluations of very unequal length: the lanes are busy most of the time."""
    draw, nodes, took = random.Random(0), list[Node](), dict[str, float]()
    for i in range(12):
        nodes.append(pretrain := Node("pretrain", f"{i}", {"i": i}))
        nodes += [Node("evaluate", f"{e}-{i}", {"e": e}, {"checkpoint": pretrain}) for e in "bcdef"]
    for node in nodes:
        took[node.name] = draw.uniform(5, 15) if node.kind == "pretrain" else draw.lognormvariate(0, 1)
    assert 1.0 <= seconds_of(nodes, took, cap, True) / seconds_of(nodes, took, cap, False) < 1.5
