"""How fast what was measured: the one table that costs of a plan are estimated from, records of the runs folder first, then results/throughput.csv.

    python -m results.throughput results/demo results/photos > results/throughput.csv     # how that file is made, from the records kept there
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from harness.canonical import digest
from harness.spec import UserError
from harness.store import Store, read_record

SHIPPED = Path(__file__).with_name("throughput.csv")


@dataclass(frozen=True)
class Work:
    """What a job does, as far as it decides how long an image takes. `name` is the evaluator's, or the method's or maker's; `shape` the ViT's size."""

    kind: str
    name: str
    shape: str
    precision: str
    trained: bool


@dataclass(frozen=True)
class Figure:
    """One measurement: device-hours of a whole job that was shown so many images, starting and scoring included.

    `once`: every image was read once, however many epochs were done on its features. `data`: what it read. `runs`: how many jobs it is the median of.
    `flops`: those of its training steps, None where they are not known; `computed` tells what an image's FLOPs depend on (`computation`).
    """

    work: Work
    method: str
    hardware: str
    images: int
    hours: float
    once: bool
    data: str
    source: str
    runs: int = 1
    flops: float | None = None
    computed: str = ""


def work_of(job: Mapping[str, Any]) -> Work:
    """The work of a job.json or a record."""
    identity, about = job["identity"], job["about"]
    recipe = identity.get("recipe") or {}
    vit = next((i["vit"] for i in (identity, *about.get("lineage", ())) if i.get("vit")), None)
    shape = "{}x{} patch {}, width {}, {} blocks".format(*vit["size"], vit["patch"], vit["width"], vit["depth"]) if vit else digest(identity.get("plugin"))
    return Work(job["kind"], about.get("eval") or about.get("method", job["name"]), shape, recipe.get("precision", "fp32"), bool(recipe))


def computation(job: Mapping[str, Any]) -> str:
    """Digest of what decides how many FLOPs a training needs for an image: the plugin's fields, the ViT, precision, what is frozen, and in which roles other
    networks stand beside it, from nodes or from files (a tokenizer is DALL-E's from a file, a small one from a node)."""
    identity = job["identity"]
    plugin = {k: v for k, v in (identity.get("plugin") or {}).items() if k != "holdout"}
    vits = [i["vit"] for i in (identity, *job["about"].get("lineage", ())) if i.get("vit")][:1]
    recipe = {k: v for k, v in (identity.get("recipe") or {}).items() if k in ("precision", "frozen")}
    return digest([job["kind"], plugin, vits, recipe, *(sorted(identity.get(where) or {}) for where in ("parents", "files"))])


def data_of(job: Mapping[str, Any]) -> str:
    """The data that a job reads, with fingerprints."""
    return ", ".join(f"{name} {print_}" for name, print_ in sorted((job["identity"].get("data") or {}).items()))


def hardware_words(hardware: Mapping[str, Any]) -> str:
    """The device of a record; a processor with the threads that the job had."""
    if hardware["device"] != "cpu":
        return str(hardware["device"])
    threads = hardware.get("threads", 1)
    return f"{hardware.get('cpu')}, {threads} thread{'s' if threads > 1 else ''}"


def hardware_here() -> str:
    """What jobs of the launchers `local` and `debug` run on."""
    from harness.launch import gpus, room
    from harness.provenance import processor

    if gpus():
        import torch

        return torch.cuda.get_device_name()
    return hardware_words({"device": "cpu", "cpu": processor(), "threads": room()[1]})


def figure_of(record: Mapping[str, Any], source: str) -> Figure:
    """What a record has measured."""
    return Figure(work_of(record), record["about"].get("method", record["name"]), hardware_words(record["hardware"]), record["images_seen"] or 0,
                  record["device_hours"], "epochs_on_features" in record["facts"], data_of(record), source, 1, record.get("flops"), computation(record))


def measured(store: Store) -> list[Figure]:
    """The figures of a runs folder. A record that cannot be read, or says too little, measures nothing."""
    found = []
    for folder in store.folders():
        try:
            if (record := read_record(folder)) is not None:
                found.append(figure_of(record, folder.name))
        except (UserError, KeyError, TypeError, AttributeError):
            continue
    return found


@cache
def shipped() -> tuple[Figure, ...]:
    """The figures of results/throughput.csv."""
    with open(SHIPPED, newline="") as stream:
        return tuple(
            Figure(Work(r["kind"], r["name"], r["shape"], r["precision"], r["trained"] == "True"), r["method"], r["hardware"], int(r["images"]),
                   float(r["hours"]), r["once"] == "True", r["data"], r["source"], int(r["runs"]), float(r["flops"]) if r.get("flops") else None,
                   r.get("computed") or "") for r in csv.DictReader(stream))


def medians(figures: Iterable[Figure]) -> Iterator[Figure]:
    """One figure for each kind of job: the median over those that differ in seed alone."""
    groups: dict[tuple[Any, ...], list[Figure]] = {}
    for f in figures:
        groups.setdefault((f.work, f.method, f.hardware, f.images, f.once, f.data, f.computed), []).append(f)
    for (work, method, hardware, images, once, data, computed), same in groups.items():
        yield Figure(work, method, hardware, images, round(statistics.median(f.hours for f in same), 5), once, data, same[0].source, len(same),
                     same[0].flops, computed)


def main(folders: Sequence[str]) -> None:
    """Print the table of the records that folders keep."""
    from results.kept import read_kept

    found: list[Figure] = []
    for folder in folders:
        if (kept := read_kept(Path(folder))) is None:
            raise SystemExit(f"results.throughput: {folder}: no kept records there")
        found += medians(figure_of(record, Path(folder).as_posix()) for record in kept.records.values())
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*(f.name for f in fields(Work)), *(f.name for f in fields(Figure)[1:])])
    writer.writerows([*astuple(f.work), *list(asdict(f).values())[1:]] for f in sorted(found, key=lambda f: (f.source, f.work.kind, f.work.name, f.method)))


if __name__ == "__main__":
    main(sys.argv[1:])
