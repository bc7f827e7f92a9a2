"""Is a data set what its layout says, and is it the same as before: quick checks before anything is launched, and fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from harness.data import data_set, files_below
from harness.spec import UserError

LABEL_FILES = (".json", ".txt", ".csv", ".toml")
MANY_FILES = 50_000  # from here on the content of images is not read
GENERATED = "complete.json"  # what a generator leaves beside its data: {"fingerprint": ..., and what it likes}


def check_layout(name: str, folder: Path) -> None:
    """What can be found wrong with a data set without decoding it.

    Raises:
        UserError: missing, empty or of another layout; labels or references that do not fit.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: needed for {name}; give its place with --data")
    data_set(name).check(folder)


def check_as_made(name: str, folder: Path) -> None:
    """Whether a generated set is what was made: a cleaner of caches may have taken files. Raises UserError when it is not."""
    try:
        made = json.loads((folder / GENERATED).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if made != fingerprint(name, folder):
        raise UserError(f"{folder}: not as it was generated, files are missing or changed: remove the folder, it is made again")


def fingerprint(name: str, folder: Path) -> str:
    """sha256 over the sorted relative paths of a data set and the contents of its files, 16 hex digits.

    From 50,000 files on an image counts by its path and size. What was read is remembered in the user's cache folder with the size and the time of
    each file, of a large set with the times of its folders: an image that is overwritten there by one of the same size is not noticed.

    Raises:
        UserError: a file cannot be read.
    """
    import platformdirs

    extra = data_set(name).label_files
    place = f"{folder.resolve()}\0{name}"
    cache = Path(platformdirs.user_cache_dir("vision-harness")) / "fingerprints" / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.json"
    try:
        known = json.loads(cache.read_text())
        stamp, files = str(known["stamp"]), dict(known["files"])
    except (OSError, ValueError, KeyError, TypeError):
        stamp, files = "", {}
    current = folders_stamp(folder, extra)
    if stamp and stamp == current:
        return str(known["fingerprint"])
    paths = [f for f in files_below(folder) if f != GENERATED]
    many, lines, read = len(paths) >= MANY_FILES, [], {}
    for relative in paths:
        try:
            found = (folder / relative).stat()
            label = relative.endswith(LABEL_FILES) or Path(relative).name in extra
            if many and not label:
                lines.append(f"{relative}\0{found.st_size}")
                continue
            when = [found.st_size, found.st_mtime_ns]
            content = files[relative][2] if files.get(relative, [])[:2] == when else hashlib.sha256((folder / relative).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{folder / relative}: cannot be read ({error.strerror}): mend or remove it") from error
        read[relative] = [*when, content]
        lines.append(f"{relative}\0{content}")
    result = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    if read != files or many:
        from harness.checkpoint import write_atomically

        body = json.dumps({"stamp": current if many else "", "files": {} if many else read, "fingerprint": result}).encode()
        write_atomically(cache, lambda stream: stream.write(body))
    return result


def folders_stamp(folder: Path, extra: tuple[str, ...]) -> str:
    """Times of all folders (they change when a file is added or removed) and sizes and times of the label files; no image is looked at."""
    lines = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        lines.append(f"{parent} {Path(parent).stat().st_mtime_ns}")
        for file in sorted(f for f in files if f.endswith(LABEL_FILES) or f in extra):
            found = Path(parent, file).lstat()
            lines.append(f"{file} {found.st_size} {found.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
