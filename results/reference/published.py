"""The published numbers (published.csv) as frozen rows: who printed which value where, for which model, data, length and protocol."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("published.csv")
COLUMNS = ("method", "variant", "backbone", "pretrain_data", "epochs", "eval", "metric", "value", "paper", "table")
SOURCES: Mapping[str, str] = {  # tag in the file -> what it is
    "BEiT": "BEiT, arXiv 2106.08254v2", "BEiT-repo": "microsoft/unilm, beit/", "MAE": "MAE, arXiv 2111.06377", "MAE-repo": "facebookresearch/mae",
    "MAE-issue43": "facebookresearch/mae, issue 43", "Li21": "Li et al. 2021, arXiv 2111.11429", "MoCo3": "MoCo v3, arXiv 2104.02057",
    "MoCo3-repo": "facebookresearch/moco-v3", "DINO": "DINO, arXiv 2104.14294", "DINO-repo": "facebookresearch/dino", "DeiT-repo": "facebookresearch/deit",
    "iGPT": "iGPT, Chen et al. 2020", "D2": "facebookresearch/detectron2, ViTDet",
}
METRICS: Mapping[str, str] = {  # metric in the file -> metric of our evaluators; costs have none
    "top1": "top-1", "mIoU": "mIoU", "APbox": "AP_box", "APmask": "AP_mask", "mCE": "mCE", "hours": "", "speedup-x": "", "FLOPs-x": "",
}
LOWER_IS_BETTER = ("mCE", "hours", "FLOPs-x")


@dataclass(frozen=True)
class Published:
    """One printed number. Scores are 0..100; `text` is the value as printed, with its digits.

    `epochs` are those of pre-training, for `scratch` those of training, None where the source gives none. `paper` is a tag of SOURCES, `table` the
    number of a table, or "fig5", "sec4.3", "A.2", "footnote2", a file name; "" for an issue.
    """

    method: str
    variant: str
    backbone: str
    pretrain_data: str
    epochs: int | None
    eval: str
    metric: str
    value: float
    paper: str
    table: str
    text: str

    @property
    def digits(self) -> int:
        """Decimals that the source prints."""
        return len(self.text.partition(".")[2])

    @property
    def source(self) -> str:
        """Where it stands, as "MAE-paper Table 3"."""
        place = self.table
        for prefix, word in (("fig", "Figure "), ("sec", "section "), ("A.", "appendix A."), ("footnote", "footnote ")):
            if place.startswith(prefix):
                place = word + place.removeprefix(prefix)
        if place[:1].isdigit():
            place = f"Table {place}"
        paper = self.paper if "-" in self.paper or self.paper in ("Li21", "D2") else f"{self.paper}-paper"
        return f"{paper} {place}".strip()

    def fits(self, **patterns: str) -> bool:
        """Whether each named field matches its pattern (fnmatch, case counts)."""
        return all(fnmatchcase(str(getattr(self, name)), pattern) for name, pattern in patterns.items())


@cache
def published() -> tuple[Published, ...]:
    """All rows of published.csv in its order.

    Raises:
        ValueError: other columns, or a row that is no such number.
    """
    with open(FILE, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream, strict=True)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{FILE.name}: columns {reader.fieldnames}, expected {list(COLUMNS)}")
        return tuple(read(row, reader.line_num) for row in reader)


def read(row: Mapping[str, str], line: int) -> Published:
    """One line of the file. Raises ValueError naming the line when it is no published number."""
    if set(row) != set(COLUMNS) or any(v is None or v != v.strip() for v in row.values()):
        raise ValueError(f"{FILE.name}:{line}: not {len(COLUMNS)} fields, or blanks around one")
    if empty := [n for n in COLUMNS if not row[n] and n not in ("variant", "epochs", "table")]:
        raise ValueError(f"{FILE.name}:{line}: {', '.join(empty)} empty")
    if row["paper"] not in SOURCES or row["metric"] not in METRICS:
        raise ValueError(f"{FILE.name}:{line}: unknown paper {row['paper']!r} or metric {row['metric']!r}")
    given = {f.name: row[f.name] for f in fields(Published) if f.name not in ("epochs", "value", "text")}
    try:
        return Published(**given, epochs=int(row["epochs"]) if row["epochs"] else None, value=float(row["value"]), text=row["value"])
    except ValueError as error:
        raise ValueError(f"{FILE.name}:{line}: {error}") from error
