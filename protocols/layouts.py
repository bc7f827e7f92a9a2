"""Generated data sets, written as files in the layouts of the real ones: ImageNet, ADE20K, COCO 2017, iNaturalist 2018, Places365.

A set is complete or not there at all: it is written beside its place and renamed at the end. Each image is a function of
(set, split, index) alone, so the number of worker processes does not matter, and no two sets share an image.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.data import folder_names
from harness.layout import GENERATED, fingerprint
from harness.randomness import generator
from harness.spec import UserError
from protocols import scenes
from protocols.scenes import BACKGROUNDS, SHAPE_NAMES, TEXTURES, Scene

WORLD = "world 2"
COUNTS = {  # set -> (train, val) images
    "demo": {"imagenet": (4000, 800), "ade20k": (1600, 300), "coco": (1600, 300), "inat2018": (2400, 600), "places365": (2400, 480)},
    "smoke": {"imagenet": (320, 80), "ade20k": (96, 24), "coco": (96, 24), "inat2018": (320, 80), "places365": (240, 60)},
}
STUFF_FIRST = 1 + len(BACKGROUNDS)  # ADE-like label of the first shape; 0 is unlabelled, 1.. are the backgrounds
CATEGORY_IDS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)  # with gaps, as COCO's
FINE = [(s, t) for s in SHAPE_NAMES[:8] for t in TEXTURES]  # iNaturalist's fine classes
PLACES = [(kind, layout) for kind in BACKGROUNDS for layout in ("open", "framed")]


def save(image: np.ndarray, path: Path) -> None:
    """Write a picture as JPEG (RGB) or PNG (labels)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **({"quality": 90} if path.suffix == ".jpg" else {}))


def rng_of(name: str, split: str, index: int) -> np.random.Generator:
    """The generator of one image."""
    return generator(WORLD, name, split, index)


def draw_imagenet(root: Path, split: str, index: int) -> None:
    """One object in the middle of a background; the shape is the class."""
    rng = rng_of("imagenet", split, index)
    shape = SHAPE_NAMES[index % len(SHAPE_NAMES)]
    kind = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    thing = scenes.random_thing(rng, 80, 80, (0.22, 0.42), shape)
    picture = scenes.compose(rng, scenes.background(rng, kind, 80, 80), np.zeros((80, 80), int), [thing])
    save(picture.image, root / split / shape / f"{shape}_{index:06}.jpg")


def draw_fine(root: Path, split: str, index: int) -> tuple[int, str]:
    """A fine class is a shape with a texture; training counts fall off over the classes, validation is even."""
    rng = rng_of("inat2018", split, index)
    weights = 1 / np.arange(2, len(FINE) + 2) ** 0.7
    label = int(rng.choice(len(FINE), p=weights / weights.sum())) if split == "train" and index >= 2 * len(FINE) else index % len(FINE)
    shape, tex = FINE[label]
    thing = scenes.random_thing(rng, 80, 80, (0.26, 0.44), shape, tex)
    picture = scenes.compose(rng, scenes.background(rng, BACKGROUNDS[rng.integers(len(BACKGROUNDS))], 80, 80), np.zeros((80, 80), int), [thing])
    file = f"train_val2018/{shape}/{label}/{split}_{index:06}.jpg"
    save(picture.image, root / file)
    return label, file


def draw_place(root: Path, split: str, index: int) -> tuple[int, str]:
    """A place is the kind of background and its layout (open, or framed by another kind); objects are distractors."""
    rng = rng_of("places365", split, index)
    label = index % len(PLACES)
    kind, layout = PLACES[label]
    side = 80
    ground = scenes.background(rng, kind, side, side)
    if layout == "framed":
        other = scenes.background(rng, rng.choice([b for b in BACKGROUNDS if b != kind]), side, side)
        y, x = np.mgrid[0:side, 0:side]
        edge = side * rng.uniform(0.12, 0.22)
        frame = (np.minimum(np.minimum(x, side - 1 - x), np.minimum(y, side - 1 - y)) < edge)[..., None]
        ground = np.where(frame, other, ground)
    things = [scenes.random_thing(rng, side, side, (0.12, 0.26)) for _ in range(rng.integers(0, 3))]
    picture = scenes.compose(rng, ground, np.zeros((side, side), int), things)
    file = f"/{kind[0]}/{kind}/{layout}/{index:08}.jpg" if split == "train" else f"Places365_val_{index:08}.jpg"
    save(picture.image, root / ("data_256_standard" if split == "train" else "val_256") / file.lstrip("/"))
    return label, file


def varied_size(rng: np.random.Generator) -> tuple[int, int]:
    """(height, width) of a scene."""
    return tuple(((96, 128), (128, 96), (112, 112), (96, 96))[rng.integers(4)])  # type: ignore[return-value]


def draw_ade20k(root: Path, split: str, index: int) -> None:
    """A scene and its label picture: 0 on thin borders of objects, 1.. backgrounds, then shapes."""
    rng = rng_of("ade20k", split, index)
    picture = scenes.scene(rng, *varied_size(rng), int(rng.integers(2, 6)))
    labels = (picture.stuff + 1).astype(np.uint8)
    for thing, mask in zip(picture.things, picture.visible, strict=True):
        labels[mask] = STUFF_FIRST + SHAPE_NAMES.index(thing.shape)
    edges = np.zeros_like(labels, dtype=bool)
    for mask in picture.visible:
        edges[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        edges[1:] |= mask[1:] != mask[:-1]
    labels[edges] = 0
    folder, stem = ("training", "ADE_train") if split == "train" else ("validation", "ADE_val")
    save(picture.image, root / "images" / folder / f"{stem}_{index:08}.jpg")
    save(labels, root / "annotations" / folder / f"{stem}_{index:08}.png")


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed RLE of a mask: column by column, beginning with zeros."""
    flat = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    counts = np.diff(np.concatenate([[0], changes])).tolist()
    return {"size": list(mask.shape), "counts": [int(c) for c in counts]}


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines of a mask as COCO polygons [x0, y0, x1, y1, ...], crumbs left out."""
    import cv2

    # contours run through pixel centres, so half a pixel is lost all round: an eighth when the mask is enlarged fourfold
    fine = np.kron(mask.astype(np.uint8), np.ones((4, 4), dtype=np.uint8))
    found, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((c.reshape(-1, 2) + 0.5) / 4).ravel().astype(float).tolist() for c in found if len(c) >= 4 and cv2.contourArea(c) >= 64]


def annotate(picture: Scene, crowd: np.ndarray | None) -> list[dict[str, Any]]:
    """COCO annotations of a scene without ids."""
    found = []
    for thing, mask in zip(picture.things, picture.visible, strict=True):
        outlines = polygons(mask)
        if mask.sum() < 24 or not outlines:
            continue
        found.append({"category_id": CATEGORY_IDS[SHAPE_NAMES.index(thing.shape)], "iscrowd": 0, "segmentation": outlines, **extent(mask)})
    if crowd is not None and crowd.sum() >= 24:
        found.append({"category_id": CATEGORY_IDS[SHAPE_NAMES.index("disc")], "iscrowd": 1, "segmentation": run_lengths(crowd), **extent(crowd)})
    return found


def extent(mask: np.ndarray) -> dict[str, Any]:
    """Area and box (x, y, w, h) of a mask."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return {"area": float(mask.sum()), "bbox": [float(xs[0]), float(ys[0]), float(xs[-1] - xs[0] + 1), float(ys[-1] - ys[0] + 1)]}


def draw_coco(root: Path, split: str, index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A scene with annotations; one in twenty has no object, one in fifteen a crowd of small discs."""
    rng = rng_of("coco", split, index)
    height, width = varied_size(rng)
    kind = rng.random()
    picture = scenes.scene(rng, height, width, 0 if kind < 0.05 else int(rng.integers(1, 6)), (0.14, 0.36))
    crowd = None
    if kind > 1 - 1 / 15:
        x, y = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height
        small = [scenes.random_thing(rng, height, width, (0.04, 0.06), "disc") for _ in range(10)]
        small = [type(t)(t.shape, t.texture, (x + rng.normal(0, 9), y + rng.normal(0, 9)), t.size, t.angle, t.colours) for t in small]
        before = len(picture.things)
        drawn = scenes.compose(rng, picture.image.astype(float), picture.stuff, small)
        crowd = np.any(drawn.visible, axis=0)
        picture = Scene(drawn.image, picture.things, tuple(m & ~crowd for m in picture.visible), picture.stuff)
        assert len(picture.things) == before
    name = f"{index + (1 if split == 'train' else 500_000):012}.jpg"
    save(picture.image, root / f"{split}2017" / name)
    return {"id": int(name[:-4]), "file_name": name, "height": height, "width": width}, annotate(picture, crowd)


DRAW: dict[str, Callable[[Path, str, int], Any]] = {
    "imagenet": draw_imagenet, "ade20k": draw_ade20k, "coco": draw_coco, "inat2018": draw_fine, "places365": draw_place,
}


def draw_range(job: tuple[str, str, str, int, int]) -> list[Any]:
    """Some images of a split, in a worker process."""
    name, root, split, first, last = job
    return [DRAW[name](Path(root), split, i) for i in range(first, last)]


def end_with(parent: int) -> None:
    """Make a worker end when its parent was killed; it would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_lists(name: str, root: Path, drawn: dict[str, list[Any]]) -> None:
    """The label files of a set, from what its draw function returned."""
    if name == "ade20k":
        rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
        for i, label in enumerate((*BACKGROUNDS, *SHAPE_NAMES), start=1):
            rows.append(f"{i}\t0\t{len(drawn['train'])}\t{len(drawn['val'])}\t{int(i <= len(BACKGROUNDS))}\t{label}")
        (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    elif name == "coco":
        categories = [{"id": i, "name": n, "supercategory": "shape"} for i, n in zip(CATEGORY_IDS, SHAPE_NAMES, strict=True)]
        for split, rows in drawn.items():
            images, notes = [image for image, _ in rows], []
            for image, found in rows:
                notes += [{"id": len(notes) + 1 + i, "image_id": image["id"], **a} for i, a in enumerate(found)]
            body = {"images": images, "annotations": notes, "categories": categories}
            (root / "annotations").mkdir(exist_ok=True)
            (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(body))
    elif name == "inat2018":
        categories = [{"id": i, "name": f"{t} {s}", "supercategory": s} for i, (s, t) in enumerate(FINE)]
        for split, rows in drawn.items():
            body = {"images": [{"id": i, "file_name": f} for i, (_, f) in enumerate(rows)], "categories": categories,
                    "annotations": [{"id": i, "image_id": i, "category_id": label} for i, (label, _) in enumerate(rows)]}
            (root / f"{split}2018.json").write_text(json.dumps(body))
    elif name == "places365":
        (root / "categories_places365.txt").write_text("".join(f"/{k[0]}/{k}/{layout} {i}\n" for i, (k, layout) in enumerate(PLACES)))
        for split, file in (("train", "places365_train_standard.txt"), ("val", "places365_val.txt")):
            (root / file).write_text("".join(f"{f} {label}\n" for label, f in drawn[split]))


def counted(results: Iterable[list[Any]], name: str, total: int, chunk: int) -> Iterable[list[Any]]:
    """Pass results on and show progress: a bar on a terminal, lines in a log."""
    from tqdm import tqdm

    tty = sys.stderr.isatty()
    bar = tqdm(total=total, desc=f"making {name}", unit="image", disable=not tty, leave=False)
    done = shown = 0
    for result in results:
        done += len(result)
        bar.update(len(result))
        if not tty and (done - shown >= total // 2 or done == total):
            shown = done
            print(f"making {name}: {done}/{total} images", file=sys.stderr, flush=True)
        yield result
    bar.close()


def make(name: str, place: Path, scale: str, pool: ProcessPoolExecutor) -> None:
    """Make one set at its place, whole or not at all."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        counts, chunk = dict(zip(("train", "val"), COUNTS[scale][name], strict=True)), 20
        jobs = [(name, str(temporary), split, i, min(i + chunk, n)) for split, n in counts.items() for i in range(0, n, chunk)]
        drawn: dict[str, list[Any]] = {"train": [], "val": []}
        for job, part in zip(jobs, counted(pool.map(draw_range, jobs), name, sum(counts.values()), chunk), strict=True):
            drawn[job[2]] += part
        write_lists(name, temporary, drawn)
        (temporary / GENERATED).write_text(json.dumps({"world": WORLD, "scale": scale, **counts, "fingerprint": fingerprint(name, temporary)}))
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def generate(folder: Path, names: Sequence[str], scale: str, workers: int) -> None:
    """Make the sets `names` below `folder` that are not there yet. Another process that makes them at the same time is waited for."""
    if unknown := [n for n in names if n not in COUNTS[scale]]:
        raise UserError(f"{unknown[0]}: not among the sets that are generated ({', '.join(COUNTS[scale])}): give its place with --data")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for leftover in folder.glob(".*.tmp"):  # of a run that was killed; nobody else writes while we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        todo = [n for n in names if not (folder / folder_names()[n]).is_dir()]
        if todo:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(max(1, workers), mp_context=context, initializer=end_with, initargs=(os.getpid(),)) as pool:
                for name in todo:
                    make(name, folder / folder_names()[name], scale, pool)
