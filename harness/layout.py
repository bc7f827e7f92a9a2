"""Is a data set what its layout says, and is it the same as before: quick checks before anything is launched, and fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
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
    each file, of a large set with the times of its folders: an image that is overwritten in place there is not noticed (remove that cache).

    Raises:
        UserError: a file cannot be read.
    """
    import platformdirs

    extra = data_set(name).label_files
    place = f"{folder.resolve()}\0{name}"
    cache = Path(platformdirs.user_cache_dir("vision-harness")) / "fingerprints" / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.json"
    try:
        known = json.loads(cache.read_text())
        stamp, files, places = str(known["stamp"]), dict(known["files"]), list(known["places"])
    except (OSError, ValueError, KeyError, TypeError):
        stamp, files, places = "", {}, []
    if stamp and stamp == stamp_of(places):
        return str(known["fingerprint"])
    paths = [f for f in files_below(folder) if f != GENERATED]
    many, lines, read = len(paths) >= MANY_FILES, [], {}
    if many:
        holders = {Path(name) for name in {os.path.dirname(f) for f in paths}}  # noqa: PTH120  # a million of them
        labels = [f for f in paths if f.endswith(LABEL_FILES) or Path(f).name in extra]
        folders = sorted({a for h in holders for a in (h, *h.parents)})
        places = [str(folder.resolve() / p) for p in (Path(), *folders, *map(Path, labels))]
    current = stamp_of(places)
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
    result = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]
    if read != files or many:
        from harness.checkpoint import write_atomically

        body = json.dumps({"stamp": current if many else "", "places": places, "files": {} if many else read, "fingerprint": result}).encode()
        write_atomically(cache, lambda stream: stream.write(body))
    return result


def stamp_of(places: Sequence[str]) -> str:
    """Times of folders (they change when an entry is added or removed) and sizes and times of label files, without a look at any image; "" if one is gone."""
    lines = []
    for place in places:
        try:
            found = Path(place).stat()
        except OSError:
            return ""
        lines.append(f"{place} {found.st_mtime_ns} {'' if stat.S_ISDIR(found.st_mode) else found.st_size}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
