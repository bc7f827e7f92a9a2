"""Nodes of the job graph: pure data with a content key, written to job.json and read back by the process that runs it.

A node's key covers everything that can change its number: every field of the plugin, its version, the recipe, the ViT, the data's
fingerprint, seeds, precision and the keys of its parents. Where it runs (device, threads, folders) is kept beside it, not in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from harness.canonical import digest, restore
from harness.spec import UserError

SCHEMA = 1
JOB_PARTS = ("identity", "about", "where", "parents")
Kind = Literal["asset", "pretrain", "evaluate"]


@dataclass(frozen=True)
class Node:
    """One job. `identity` is canonical JSON data and decides the key; `about` is shown to people; `where` says what lies where."""

    kind: Kind
    name: str
    identity: Mapping[str, Any]
    parents: Mapping[str, Node] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""

    def __post_init__(self) -> None:
        body = {"schema": SCHEMA, "kind": self.kind, **self.identity, "parents": {role: p.key for role, p in self.parents.items()}}
        object.__setattr__(self, "identity", body)
        object.__setattr__(self, "key", digest(body, done=True))

    @cached_property
    def settings(self) -> str:
        """The key without the seeds: what results must share to be averaged."""
        body = {k: v for k, v in self.identity.items() if k not in ("seed", "eval_seed", "parents")}
        return digest({**body, "parents": {role: p.settings for role, p in self.parents.items()}}, done=True)

    @property
    def recipe(self) -> Any:
        """What it trains by, as an object; None where nothing is trained."""
        return restore(self.identity["recipe"])

    @property
    def lineage(self) -> list[Mapping[str, Any]]:
        """Identities of the trainings that its checkpoint went through, the last one first; what makes assets is left out."""
        above = [p for p in self.parents.values() if p.kind != "asset"]
        return [identity for parent in above for identity in (parent.identity, *parent.lineage)]

    @property
    def folder(self) -> str:
        """Name of its folder below the runs folder."""
        return f"{self.kind}-{re.sub(r'[^A-Za-z0-9@._+-]+', '_', self.name)[:80]}-{self.key}"

    def job(self, runs: Path) -> dict[str, Any]:
        """Content of job.json."""
        return {
            "schema": SCHEMA, "kind": self.kind, "name": self.name, "key": self.key, "identity": self.identity,
            "about": {**self.about, "lineage": self.lineage}, "where": dict(self.where),
            "parents": {role: {"key": p.key, "folder": p.folder} for role, p in self.parents.items()},
        }


def ordered(nodes: Iterable[Node]) -> list[Node]:
    """Nodes and their ancestors, parents first, each key once; the given order is kept where it can be."""
    seen: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.key not in seen:
            for parent in node.parents.values():
                visit(parent)
            seen[node.key] = node

    for node in nodes:
        visit(node)
    return list(seen.values())


def read_job(path: Path) -> dict[str, Any]:
    """job.json as data.

    Raises:
        UserError: the file is missing, no JSON, damaged, or of another schema version.
    """
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a job ({error}): start jobs with `python -m harness run`") from error
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        found = body.get("schema") if isinstance(body, dict) else None
        raise UserError(f"{path}: job of schema version {found}, this harness reads {SCHEMA}: use the version that wrote it, or another --runs")
    wrong = [f for f in ("kind", "name", "key") if not isinstance(body.get(f), str)] + [f for f in JOB_PARTS if not isinstance(body.get(f), dict)]
    wrong += [f"parents.{role}" for role, p in (body.get("parents") or {}).items() if not isinstance(p, dict) or "folder" not in p] if not wrong else []
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is missing or damaged: move its folder away, then run again")
    return body
