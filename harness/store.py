"""The runs folder: one folder per node, its state, its lock, its record.

    runs/.harness.json                     version of the layout
    runs/<kind>-<name>-<key>/job.json      what the node is           log.txt, metrics.jsonl   what it said
                             machine.json  threads and GEMM mode      usage.json               seconds used so far
                             checkpoint/   weights and training state progress.json            where it stands
                             record.json   the result, written last   failure.json             why it failed
                             cells.json    cells that stand on it, if several
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harness.checkpoint import write_atomically
from harness.jobs import Node, read_job
from harness.spec import UserError

LAYOUT = 1
RECORD_SCHEMA = 1
MIN_FREE_BYTES = 64 * 2**20
ENDED = ("done", "failed", "killed", "blocked")  # words of launchers for nodes that they will not start again


def write_json(path: Path, body: Any, indent: int | None = 1) -> None:
    """Write JSON atomically; without an indent ten times as fast."""
    write_atomically(path, lambda stream: stream.write((json.dumps(body, indent=indent, allow_nan=False) + "\n").encode()))


def read_json(path: Path) -> Any | None:
    """JSON data, or None when the file is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as stream:  # a table reads 10,000: `read_text` takes a third longer
            return json.loads(stream.read())
    except (OSError, ValueError):
        return None


@cache
def record_schema() -> dict[str, Any]:
    """record.schema.json (JSON Schema draft 2020-12)."""
    schema: dict[str, Any] = json.loads(Path(__file__).with_name("record.schema.json").read_text())
    return schema


def read_record(folder: Path) -> dict[str, Any] | None:
    """record.json of a node's folder, None when there is none.

    Raises:
        UserError: the record is damaged or of another schema version.
    """
    path = folder / "record.json"
    record = read_json(path)
    if record is None and not path.exists():
        return None
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a readable record: move its folder away, then run again")
    if record.get("schema") != RECORD_SCHEMA:
        raise UserError(
            f"{path}: record of schema version {record.get('schema')}, this harness reads {RECORD_SCHEMA}: "
            f"use the version that wrote it, or another --runs"
        )
    wrong = [name for name, types in record_shape().items() if name not in record or not isinstance(record[name], types)]
    if wrong or not all(isinstance(v, (int, float)) for v in record["metrics"].values()):
        raise UserError(f"{path}: {', '.join(wrong[:3]) or 'metrics'} missing or damaged: move its folder away, then run again")
    return record


@cache
def record_shape() -> dict[str, tuple[type, ...]]:
    """Field of a record -> the types that the schema allows. Checked on reading: the whole schema, which is checked on writing, takes 100 times as long."""
    types: dict[str, tuple[type, ...]] = {
        "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    }
    found = {}
    for name, told in record_schema()["properties"].items():
        allowed = told.get("type", [])
        found[name] = tuple(t for word in ([allowed] if isinstance(allowed, str) else allowed) for t in types[word]) or (object,)
    return found


class Locked(Exception):
    """Another process works on the node; `owner` says which."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a node's lock. The kernel frees it when its owner dies, however it dies; the file says who holds it.

    Raises:
        Locked: somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as stream:
        for attempt in range(10):  # somebody who only looks holds it for an instant
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                stream.seek(0)
                owner = stream.read().strip()
                if attempt == 9:
                    raise Locked(owner or "an unknown process") from error
                time.sleep(0.05)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now().isoformat(timespec='seconds')}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def is_locked(folder: Path) -> bool:
    """Whether a living process holds the node's lock."""
    try:
        with open(folder / "lock") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except IsADirectoryError:
        raise UserError(f"{folder / 'lock'}: is a folder: remove it") from None
    except OSError:
        return True
    return False


def lock_owner(folder: Path) -> str:
    """Who holds a node's lock, as its owner wrote it; "" in the instant before that."""
    try:
        return (folder / "lock").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class State:
    """State of a node: done, running, failed, interrupted (resumes by itself) or missing, with the reason where there is one."""

    status: str
    reason: str = ""


class Store:
    """A runs folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the folder and check that it can be used.

        Raises:
            UserError: it cannot be written, is full, or was made by a newer version.
        """
        self.check_version()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{os.getpid()}"
            try:
                with open(probe, "wb") as stream:
                    stream.write(bytes(2**20))
                    stream.flush()
                    os.fsync(stream.fileno())
            finally:
                probe.unlink(missing_ok=True)
            free = shutil.disk_usage(self.root).free
            if not (self.root / ".harness.json").exists():
                write_json(self.root / ".harness.json", {"layout": LAYOUT})
        except OSError as error:
            remedy = "choose another folder, or mend its permissions or space"
            raise UserError(f"--runs {self.root}: cannot be written ({error.strerror}): {remedy}") from error
        if free < MIN_FREE_BYTES:
            raise UserError(f"--runs {self.root}: only {free // 2**20} MB free, {MIN_FREE_BYTES // 2**20} MB are needed: make room or choose another folder")

    def check_version(self) -> None:
        """Raises UserError when the folder is no folder or was made by a newer version."""
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"--runs {self.root}: is a file: choose a folder")
        try:
            exists = (self.root / ".harness.json").exists()
        except OSError as error:
            raise UserError(f"--runs {self.root}: cannot be read ({error.strerror}): choose another folder or mend its permissions") from error
        if exists:
            body = read_json(self.root / ".harness.json")
            if not isinstance(body, dict) or not isinstance(layout := body.get("layout"), int) or layout < 1:
                raise UserError(f"--runs {self.root}: .harness.json is damaged: restore it as {{\"layout\": {LAYOUT}}}, or choose another folder")
            if layout != LAYOUT:
                raise UserError(
                    f"--runs {self.root}: made by a newer version of the harness (layout {layout}, this one knows {LAYOUT}): "
                    f"update the harness or choose another folder"
                )

    def folder(self, node: Node) -> Path:
        """Folder of a node."""
        return self.root / node.folder

    def state(self, folder: Path) -> State:
        """State of a node's folder."""
        if read_record(folder) is not None:
            return State("done")
        if is_locked(folder):
            return State("running", lock_owner(folder))
        failure = read_json(folder / "failure.json")
        if failure is not None:
            return State("failed", str(failure.get("message", "failed")) if isinstance(failure, dict) else "failed")
        if (folder / "usage.json").exists():
            return State("interrupted", "not finished: run the same line again to go on")
        return State("missing", "not run")

    def explain(self, folder: Path, away: Mapping[str, State] = MappingProxyType({})) -> State:
        """State of a node's folder; one that waits for a parent which failed says which and why. `away`: what launchers know of nodes elsewhere."""
        state = self.state(folder)
        if state.status not in ("done", "failed") and folder.name in away:
            return away[folder.name]
        if state.status in ("missing", "interrupted"):
            for role, parent in read_job(folder / "job.json")["parents"].items() if (folder / "job.json").exists() else ():
                above = self.explain(self.root / parent["folder"], away)
                if above.status in ("failed", "interrupted"):
                    return State("failed", above.reason if above.reason.startswith("its ") else f"its {role} {above.status}: {above.reason}")
        return state

    def set_aside(self, folder: Path) -> Path | None:
        """Move a node's folder out of the way (--force); nothing is ever deleted."""
        if not folder.exists():
            return None
        for count in range(1, 10_000):
            target = self.root / "aside" / f"{folder.name}.{count}"
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                folder.rename(target)
                return target
        raise UserError(f"{self.root / 'aside'}: too many old copies of {folder.name}: remove some")

    def folders(self) -> list[Path]:
        """All node folders, sorted by name."""
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            return [self.root / name for name in sorted(e.name for e in entries if os.path.exists(f"{e.path}/job.json"))]  # noqa: PTH110
