"""The order in which the local launcher starts what is ready. Runs under it are in tests/harness/test_graph.py."""

from __future__ import annotations

from harness.plan import Planner
from harness.request import Request
from launchers.local import longest_first


def test_what_has_the_longest_way_ahead_is_started_first() -> None:
    """On several cores a plan takes as long as what was begun too late: a short row in the plan's first place must not delay BEiT, its tokenizer least."""
    nodes = Planner(Request(("scratch", "mae", "beit"), ("linear", "imagenet"), "smoke", precision="fp32")).plan().nodes
    order = longest_first(nodes)
    assert sorted(n.key for n in order) == sorted(n.key for n in nodes) and [n.key for n in order] != [n.key for n in nodes]
    assert [(n.kind, n.name) for n in order[:3]] == [("asset", "dvae"), ("pretrain", "mae"), ("pretrain", "beit")]
    place = {n.key: i for i, n in enumerate(order)}
    assert all(place[p.key] < place[n.key] for n in nodes for p in n.parents.values())
