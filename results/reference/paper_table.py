"""What the table of a paper looks like: its rows and columns, and which published number stands in each field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from results.reference.published import Published, published

Pick = Mapping[str, object]  # fields of a published row -> the value that they must have


@dataclass(frozen=True)
class Column:
    """A column of numbers: its heading and what its numbers have in common."""

    heading: str
    pick: Pick


@dataclass(frozen=True)
class Row:
    """A row: its label and further texts at the left, and what its numbers have in common.

    `cells` replaces what is picked in single columns (by heading): a number that the table repeats and that published.csv has elsewhere.
    `section` opens a part of the table; `aside` are texts at the right (what others had).
    """

    label: str
    pick: Pick
    texts: tuple[str, ...] = ()
    section: str = ""
    cells: Mapping[str, Pick] = field(default_factory=dict)
    aside: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper. `stub` are the headings of label and texts, `asides` those of what stands at the right."""

    paper: str
    table: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    stub: tuple[str, ...] = ("method",)
    asides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return f"{self.paper.lower()}-table{self.table}"

    def number(self, row: Row, column: Column) -> Published | None:
        """The published number of a field; None where the paper has none.

        Raises:
            ValueError: the field is ambiguous, or names a number of elsewhere that is not there.
        """
        pick = {"paper": self.paper, "table": self.table, **row.pick, **column.pick, **row.cells.get(column.heading, {})}
        found = [p for p in published() if all(getattr(p, name) == value for name, value in pick.items())]
        if len(found) > 1 or (not found and column.heading in row.cells):
            raise ValueError(f"{self.name}: {row.label!r}, {column.heading!r}: {len(found)} published numbers fit")
        return found[0] if found else None
