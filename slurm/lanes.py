"""`max_running` by dependencies alone: at most so many nodes run at a time. Plain SLURM has nothing else for that but a QOS or a licence of its administrators.

The cap is so many lanes. A batch (a job or an array) takes as many lanes as it may have tasks running (`--array=...%k`), and starts when all that was
submitted into one of them before has ended, well or not (`afterany`). So a lane has one task at a time. A batch waits for every earlier one of its lanes,
not for the last alone: that one may be cancelled, or removed because what it depends on failed, while the one before it still runs. All waiting is for what
was submitted before, so that nothing waits in a circle; a requeued job keeps its id, and with it its lanes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slurm.queue import Job


class Lanes:
    """Who is in which lane. With 0 lanes there is no cap, and nobody waits."""

    def __init__(self, count: int, queued: Iterable[Job] = ()) -> None:
        self.count, self._taken, self._ends = count, dict[str, tuple[int, ...]](), [0.0] * count
        tasks: dict[str, list[Job]] = {}
        for job in queued:
            tasks.setdefault(job.id.partition("_")[0], []).append(job)
        for id, jobs in tasks.items():
            lanes = jobs[0].lanes
            # one that was submitted without a cap, or with a larger one, may run more than fits beside others: nothing new starts before its end
            self.add(id, lanes if lanes and max(lanes) < count else range(count), len(jobs))

    def choose(self, size: int, of: int) -> tuple[int, ...]:
        """Lanes for a batch of `size` among `of` nodes that could run beside one another: its share of all, those that are free first."""
        width = min(size, self.count, max(1, self.count * size // of))
        return tuple(sorted(sorted(range(self.count), key=self._ends.__getitem__)[:width]))

    def before(self, lanes: Sequence[int]) -> tuple[str, ...]:
        """Ids of the jobs and arrays that must have ended before another one starts there."""
        return tuple(id for id, taken in self._taken.items() if set(taken) & set(lanes))

    def add(self, id: str, lanes: Sequence[int], size: int) -> None:
        """A batch of `size` nodes was submitted into lanes. Nodes count alike where it is estimated which lane is free first."""
        self._taken[id] = tuple(lanes)
        end = max((self._ends[lane] for lane in lanes), default=0.0) + size / max(1, len(lanes))
        for lane in lanes:
            self._ends[lane] = end
