"""The loop by which mmengine's Runner scores a dense evaluation: each image once, on one process or several, some of them drawn."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from mmengine.evaluator import Evaluator
from mmengine.runner import BaseLoop

from evals.openmmlab import pictures
from evals.openmmlab.loops import LOG_EVERY_S
from evals.openmmlab.samples import InOrder, batches
from evals.scoring import share
from harness.batches import any_of, gathered, processes, rank, together
from harness.plugins import Progress
from harness.spec import Interrupted


class TestInOrder(BaseLoop):  # type: ignore[misc]
    """Killed, it begins again: training is kept."""

    __test__ = False  # no test of pytest's

    def __init__(self, runner: Any, dataloader: InOrder, evaluator: Evaluator) -> None:
        self._runner, self.work, self.evaluator = runner, runner.work, evaluator
        self.evaluator.dataset_meta = runner.work.test.metainfo

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Metrics over all images."""
        work, session, batch = self.work, self.work.session, self.work.test_batch
        mine, shown_at = share(len(work.test), rank(), processes()), set(pictures.places(len(work.test)))
        groups = [mine[i : i + batch] for i in range(0, len(mine), batch)]
        stream = batches(work.test, session, groups)
        rounds, done = -(-len(share(len(work.test), 0, processes())) // batch), 0  # as many on each process, which all ask whether to stop
        work.model.eval()
        started = shown = time.monotonic()
        for i in range(rounds):
            if i < len(groups):
                data = next(stream)
                data.pop("bad")
                with work.autocast():
                    outputs = work.model.test_step(data)
                for place, output in zip(groups[i], outputs, strict=True):
                    if place in shown_at:
                        info = work.test.source.get_data_info(int(work.test.indices[place]))
                        pictures.draw(output, info, work.test.metainfo["classes"], session.dir / "samples")
                self.evaluator.process(data_samples=outputs, data_batch=data)
                done += len(outputs)
            now = time.monotonic()
            if rank() == 0 and (now - shown > LOG_EVERY_S or i in (0, rounds - 1)):
                shown, speed = now, done / max(now - started, 1e-9)
                session.report(Progress("evaluate", done, len(mine), speed, None, (len(mine) - done) / speed))
            if any_of(session.should_stop())[0]:
                raise Interrupted("evaluate: stopped; the training is saved")
        return joined_scores(work.metric, len(work.test))


def joined_scores(metric: Any, count: int) -> dict[str, float]:
    """The metric's scores from the results of all processes, each having those of its `share` of the images; the first process computes and writes them."""
    parts = gathered(metric.results)
    results: list[Any] = [None] * count
    for number, part in enumerate(parts):
        results[number :: len(parts)] = part
    metric.results = []
    found: list[Any] = [metric.compute_metrics(results) if rank() == 0 else None]
    if together():
        dist.broadcast_object_list(found)
    scores: dict[str, float] = found[0]
    return scores
