"""A number is starred when what it was measured with has changed since: its evaluator, a library, its data."""

import json
from pathlib import Path

import pytest
from folders import about, written

from evals.linear import Linear
from harness.collect import Result, collect
from harness.jobs import Node
from harness.layout import fingerprint
from harness.plan import Planner
from harness.request import Request
from harness.store import Store
from results.ancestry import Archive
from results.cells import sheets
from results.staleness import Staleness, with_stale
from results.table import Table


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images as a data set."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"1")
    return folder


def measured(tmp_path: Path, images: Path, **fields: object) -> tuple[Result, Archive]:
    """A score of the probe, measured with torch 2.0."""
    root = tmp_path / "runs"
    Store(root).prepare()
    identity = {"seed": 0, "plugin": {"class": "evals.linear:Linear"}, "data": {"folder": fingerprint("folder", images)}}
    node = Node("evaluate", "linear-mae", identity, about=about("mae", "linear", 0, "top-1"), where={"folders": {"folder": str(images)}})
    plain = {"metrics": {"top-1": 50.0}, "plugin_version": Linear.version, "packages": {"torch": "2.0.0+cpu", "python": "3.0", "gone": "1"}}
    written(root, node, 1.0, **{**plain, **fields})
    return collect([root])[0], Archive((root,))


def reasons(found: tuple[Result, Archive], torch: str = "2.0.0+cu130") -> tuple[str, ...]:
    result, archive = found
    return Staleness(archive, True, {"torch": torch, "python": "3.99"}).reasons(result)


def test_nothing_changed(tmp_path: Path, images: Path) -> None:
    # Another build of the same version is other hardware, and another Python changes no number.
    assert reasons(measured(tmp_path, images)) == ()


def test_evaluator_library_and_data_are_each_noticed(tmp_path: Path, images: Path) -> None:
    assert reasons(measured(tmp_path / "v", images, plugin_version=0)) == (f"linear was version 0, is {Linear.version}",)
    found = measured(tmp_path, images)
    assert reasons(found, torch="2.1.0") == ("torch was 2.0.0, is 2.1.0",)
    then = fingerprint("folder", images)
    (images / "b.png").write_bytes(b"22")
    assert reasons(found) == (f"data folder was {then[:6]}, is {fingerprint('folder', images)[:6]}",)
    for path in images.iterdir():
        path.unlink()
    images.rmdir()
    assert reasons(found) == ()  # it cannot be asked: no claim


def test_a_stale_number_is_starred_with_the_reason(tmp_path: Path, images: Path) -> None:
    result, archive = measured(tmp_path, images, plugin_version=0)
    (sheet,) = sheets([result])
    assert with_stale(sheet, Staleness(archive)).cells["mae", "linear", "top-1"].stale[0] == f"linear was version 0, is {Linear.version}"
    text = Table.render([result], folders=archive.roots)
    assert "50.0 * [" in text and "stale: linear was version 0" in text and "Starred: stale" in text
    assert json.loads(Table.render([result], "json", folders=archive.roots))[0]["stale"]
    (images / "b.png").write_bytes(b"22")
    assert "stale: data folder was " in Table.render([result], folders=archive.roots)
    assert "*" not in Table.render([result])  # without its folder nothing is known


def test_a_newer_evaluator_is_another_job_and_a_newer_library_is_not(smoke_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the report says of its commands: which stale numbers the same line makes anew.
    def key() -> str:
        return Planner(Request(("scratch",), ("linear",), "smoke", data=str(smoke_data))).plan().nodes[-1].key

    before = key()
    monkeypatch.setattr("harness.provenance.versions", lambda: {"torch": "0"})
    assert key() == before
    monkeypatch.setattr(Linear, "version", Linear.version + 1)
    assert key() != before
