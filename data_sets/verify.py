"""`harness data verify`: every file of a data set looked at, every problem listed, and its counts beside the official ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.data import Count, data_set
from harness.layout import GENERATED, check_as_made, check_layout
from harness.spec import JobFailed, UserError

Step = Callable[[int], None]


def verify(name: str, folder: Path, step: Step = lambda images: None) -> list[str]:
    """All problems of a data set, one line each; an empty list when it is in order."""
    try:
        check_layout(name.partition(":")[0], folder)
    except (UserError, JobFailed) as error:
        first = [" ".join(str(error).split())]
    else:
        first = []
    try:
        found = list(data_set(name.partition(":")[0]).problems(folder, step))
    except (UserError, KeyError, TypeError, ValueError) as error:
        found = [] if first else [f"{folder}: not in the layout of {name} ({error})"]
    if not first and not found:
        try:
            check_as_made(name.partition(":")[0], folder)
        except UserError as error:
            return [str(error)]
    return found + [f for f in first if not any(f.startswith(g.partition(": ")[0]) for g in found)]  # each file's problem once


def compare_counts(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """(problems, remarks): images and classes of each split beside the official numbers.

    Another number of images is a problem: the copy is not complete, or not the official one. It is a remark only where the official number
    was never found in a primary source, and where the number of classes differs: that is another set in this layout, which may be what is wanted.
    Sets that our generator made, and names without official numbers, are passed over.
    """
    layout, found = data_set(name.partition(":")[0]), dict[tuple[int, int, Count], list[str]]()
    if (folder / GENERATED).is_file():
        return [], []
    for split, official in layout.official.items():
        try:
            images, classes = layout.count(split, folder)
        except (UserError, KeyError, TypeError, ValueError):
            continue  # `verify` has said what is wrong with it
        if (images, classes) != official[:2]:
            found.setdefault((images, classes, official), []).append(split)
    problems, remarks = [], []
    for (images, classes, official), splits in found.items():
        which = splits[0] if len(splits) == 1 else f"{splits[0]} (and {len(splits) - 1} more)"
        line = f"{folder}: {which} has {images} images of {classes} classes, the official {name} {official.images} of {official.classes}"
        if classes != official.classes:
            remarks.append(f"{line}: another set in the same layout")
        elif not official.sure:
            remarks.append(f"{line} (a number from memory, no primary source found)")
        else:
            problems.append(f"{line}: download or unpack it again")
    return problems, remarks
