"""Is a data set what its layout says, and is it the same as before: quick checks before anything is launched, and fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from harness.data import data_set
from harness.spec import UserError

LABEL_FILES = (".json", ".txt", ".csv", ".toml")
MANY_FILES = 50_000  # from here on a fingerprint is cached


def check_layout(name: str, folder: Path) -> None:
    """What can be found wrong with a data set without decoding it.

    Raises:
        UserError: missing, empty or of another layout; labels or references that do not fit.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: needed for {name}; give its place with --data")
    data_set(name).check(folder)


def fingerprint(name: str, folder: Path) -> str:
    """sha256 over the sorted relative paths and sizes of a data set and the contents of its label files, 16 hex digits.

    The listing of a large set is cached in the user's cache folder under its path and the times of its folders.
    """
    entries, label_files = [], []
    extra = data_set(name).label_files
    stamp = _stamp(folder, extra)
    import platformdirs

    cache = Path(platformdirs.user_cache_dir("vision-harness")) / "fingerprints" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.json"
    try:
        known = json.loads(cache.read_text())
        if known["stamp"] == stamp and known["files"] >= MANY_FILES:
            return str(known["fingerprint"])
    except (OSError, ValueError, KeyError):
        pass
    stack = [str(folder)]
    while stack:
        with os.scandir(stack.pop()) as found:
            for entry in found:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    stack.append(entry.path)
                    continue
                relative = os.path.relpath(entry.path, folder)
                if entry.name == "complete.json":
                    continue  # bookkeeping of the generator, with a date in it
                entries.append(f"{relative}\0{entry.stat().st_size}")
                if entry.name.endswith(LABEL_FILES) or entry.name in extra:
                    label_files.append(relative)
    total = hashlib.sha256("\n".join(sorted(entries)).encode())
    for relative in sorted(label_files):
        total.update((folder / relative).read_bytes())
    result = total.hexdigest()[:16]
    if len(entries) >= MANY_FILES:
        from harness.checkpoint import write_atomically

        body = json.dumps({"stamp": stamp, "files": len(entries), "fingerprint": result}).encode()
        write_atomically(cache, lambda stream: stream.write(body))
    return result


def _stamp(folder: Path, extra: tuple[str, ...]) -> str:
    """Times of all folders (they change when a file is added or removed) and sizes and times of the label files; no image is looked at."""
    lines = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        lines.append(f"{parent} {Path(parent).stat().st_mtime_ns}")
        for file in sorted(f for f in files if f.endswith(LABEL_FILES) or f in extra):
            found = Path(parent, file).stat()
            lines.append(f"{file} {found.st_size} {found.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
