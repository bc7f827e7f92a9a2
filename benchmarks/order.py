"""How long a plan takes on several cores by the order in which ready nodes are started: longest path first (launchers.local) against the plan's own order.

A simulation: each node takes what it was measured to take (results/throughput.csv, the demo on one core), starts as soon as a core is free and its parents are
done, and disturbs no other. `bound` is what no order can beat: the longest path, or all work shared evenly. What the order goes by, images
shown, is not what the seconds come from.

    .venv/bin/python benchmarks/order.py [benchmarks/results]
"""

from __future__ import annotations

import csv
import heapq
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import keep

from harness.jobs import Node
from harness.plan import Planner
from harness.request import Request
from launchers.local import longest_first
from results.throughput import SHIPPED

METHODS, EVALS = ("scratch", "supervised", "beit-pixel", "beit", "mae"), ("imagenet", "linear", "inat2018", "places365", "ade20k", "coco")
PLANS = {
    "make demo": Request(("beit", "mae"), ("ade20k", "coco"), precision="bf16"), "five methods, six evaluators": Request(METHODS, EVALS, precision="bf16"),
    "the same, three seeds": Request(METHODS, EVALS, seeds=(0, 1, 2), precision="bf16"),
}


def measured() -> dict[tuple[str, str, str], float]:
    """(kind, evaluator, method or maker) -> seconds of a node of the demo."""
    with open(SHIPPED, newline="") as stream:
        return {(r["kind"], r["name"], r["method"]): 3600 * float(r["hours"]) for r in csv.DictReader(stream) if r["source"] == "results/demo"}


def took(order: Sequence[Node], seconds: Mapping[str, float], cores: int) -> float:
    """Seconds until all nodes are done, ready ones started in this order."""
    now, done, running, todo = 0.0, set[str](), list[tuple[float, str]](), list(order)
    while todo or running:
        for node in list(todo):
            if len(running) < cores and all(p.key in done for p in node.parents.values()):
                heapq.heappush(running, (now + seconds[node.key], node.key))
                todo.remove(node)
        now, key = heapq.heappop(running)
        done.add(key)
    return now


def main() -> None:
    """Simulate, print, keep."""
    figures, rows = measured(), list[dict[str, Any]]()
    for name, request in PLANS.items():
        nodes = list(Planner(request).plan().nodes)
        seconds = {n.key: figures[n.kind, n.about.get("eval") or n.name, n.about.get("method", n.name)] for n in nodes}
        path = dict(seconds)
        for node in reversed(nodes):
            for parent in node.parents.values():
                path[parent.key] = max(path[parent.key], seconds[parent.key] + path[node.key])
        for cores in (2, 4):
            before, after = took(nodes, seconds, cores), took(longest_first(nodes), seconds, cores)
            bound = max(sum(seconds.values()) / cores, *path.values())
            rows.append({"name": f"{name}, {cores} cores", "ratio": before / after, "rival": "the plan's order", "nodes": len(nodes),
                         "seconds": {"longest first": round(after), "the plan's order": round(before), "bound": round(bound)}})
            print(f"{name}, {cores} cores: {len(nodes)} nodes, {rows[-1]['seconds']}", flush=True)
    if len(sys.argv) > 1:
        keep("order", rows, Path(sys.argv[1]), note="simulated from measured seconds of nodes")


if __name__ == "__main__":
    main()
