"""The code that jobs run: a copy taken at submission, so that editing the tree does not change what waits in the queue.

    runs/.slurm/snapshots/<hash>/tree/           what git tracks and untracked *.py (of an installed harness its packages), and its entry points
                                 snapshot.json   commit and changes as they go into records      changes.diff   the changes, however long

The hash is of the content and the commit: submissions of the same code share a copy, which is there whole or not at all. Packages beside ours, third
parties' plugins among them, are not copied: jobs use those that are installed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

from harness.spec import UserError
from harness.store import Store, read_json, write_json
from slurm.queue import FOLDER

ROOT = Path(__file__).resolve().parents[1]
NAME = "vision-pretraining-harness"
LONGEST = 20_000  # characters of a diff that goes into each record


@dataclass(frozen=True)
class Snapshot:
    """Code as it was at one moment, in memory. `tree` is where its copy lies, or will."""

    tree: Path
    files: dict[str, bytes]
    git: dict[str, Any]
    diff: bytes

    @property
    def name(self) -> str:
        """Its hash."""
        return self.tree.parent.name

    def save(self) -> None:
        """Make the copy, unless it is there.

        Raises:
            UserError: the runs folder cannot be written.
        """
        place = self.tree.parent
        if place.is_dir():
            return
        making = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        try:
            for name, content in self.files.items():
                path = making / "tree" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            (making / "changes.diff").write_bytes(self.diff)
            write_json(making / "snapshot.json", {"schema": 1, "git": self.git})
            making.rename(place)
        except OSError as error:
            shutil.rmtree(making, ignore_errors=True)
            if not place.is_dir():  # else somebody else was quicker
                raise UserError(f"--runs {place}: the copy of the code cannot be written ({error.strerror}): make room or mend the permissions") from error


def ask_git(root: Path, *words: str) -> bytes | None:
    """What git prints, None where it is not there or this is none of its folders."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def listed(answer: bytes | None) -> list[str]:
    """Names in an answer of `git ... -z`."""
    return [os.fsdecode(name) for name in (answer or b"").split(b"\0") if name]


def installed_files(root: Path, ours: Distribution) -> list[str]:
    """Files of the packages that our entry points name."""
    packages = sorted({e.module.partition(".")[0] for e in ours.entry_points})
    return [p.relative_to(root).as_posix() for name in packages for p in sorted((root / name).rglob("*")) if "__pycache__" not in p.parts]


def snapshot(store: Store, root: Path = ROOT) -> Snapshot:
    """The code of this process as it lies on disk now; nothing is written.

    A process that runs from a copy itself, because it was submitted, hands the same copy on.
    """
    taken = read_json(root.parent / "snapshot.json")
    if isinstance(taken, dict):
        return Snapshot(root, {}, taken["git"], b"")
    ours = distribution(NAME)
    names, untracked, commit, diff = listed(ask_git(root, "ls-files", "-z")), [], None, b""
    if "harness/__init__.py" in names:
        untracked = listed(ask_git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", "*.py"))
        commit = (ask_git(root, "rev-parse", "HEAD") or b"").decode().strip() or None
        diff = ask_git(root, "diff", "HEAD", "--relative", "--binary", "--no-ext-diff", "--no-textconv", "--no-color") or b""
    else:
        names = installed_files(root, ours)
    files = {name: (root / name).read_bytes() for name in sorted({*names, *untracked}) if (root / name).is_file()}
    about = f"{NAME.replace('-', '_')}-{ours.version}.dist-info"
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {ours.version}\n".encode()
    files[f"{about}/entry_points.txt"] = (ours.read_text("entry_points.txt") or "").encode()  # a later installation may have others
    whole = hashlib.sha256(repr((commit, [(name, hashlib.sha256(content).hexdigest()) for name, content in files.items()])).encode()).hexdigest()[:16]
    shown = diff.decode(errors="replace")
    git = {
        "commit": commit, "dirty": None if commit is None else bool(diff or untracked), "snapshot": whole, "untracked": untracked,
        "diff": shown if len(shown) <= LONGEST else f"{len(shown)} characters, sha256 {hashlib.sha256(diff).hexdigest()}: see changes.diff of the snapshot",
    }
    return Snapshot(store.root.resolve() / FOLDER / "snapshots" / whole / "tree", files, git, diff)


def python_path(tree: Path) -> str:
    """PYTHONPATH of a job: the copy in front; then where this process finds what is not installed, a plugin in the folder it was started in, say."""
    here = [sys.path[0]] if sys.path[0] == str(Path.cwd()) else []  # as `python -m harness` has it
    given = [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return os.pathsep.join(dict.fromkeys([str(tree), *here, *given]))
