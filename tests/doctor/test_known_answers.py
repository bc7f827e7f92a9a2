"""`doctor --evaluators` finds an evaluator that is wrong, and says nothing against one that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doctor.command import known_answers
from evals.openmmlab.foreign import openmmlab
from harness import cli, plugins
from harness.plugins import Golden

with openmmlab():
    from evals.openmmlab import samples, scenes, upernet


def wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    cls = plugins.load("evals", name)
    monkeypatch.setattr(plugins, "importable", lambda kind: {name: cls})
    return [found.partition(": ")[2] for right, found, _ in known_answers() if not right]


def test_labels_one_class_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmseg's reduce_zero_label is the commonest mistake on ADE20K."""
    read = upernet.ReadLabels.transform

    def off(self: Any, results: dict[str, Any]) -> dict[str, Any]:
        labels = read(self, results)["gt_seg_map"]
        results["gt_seg_map"] = np.where(labels == 255, 255, (labels.astype(int) + 1) % 4).astype(np.uint8)
        return results

    monkeypatch.setattr(upernet.ReadLabels, "transform", off)
    assert {w.split(",")[0] for w in wrong("ade20k", monkeypatch)} >= {"perfect predictions", "a fixed tiny checkpoint"}


@pytest.mark.parametrize("name", ["ade20k", "coco"])
def test_blue_and_red_exchanged_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perfect predictions do not show it: the model does not see the image in them."""
    read = samples.ReadImage.transform

    def exchanged(self: Any, results: dict[str, Any]) -> dict[str, Any]:
        results = read(self, results)
        results["img"] = np.ascontiguousarray(results["img"][:, :, ::-1])
        return results

    monkeypatch.setattr(samples.ReadImage, "transform", exchanged)
    assert [w.split(",")[0].rstrip("0123456789. ") for w in wrong(name, monkeypatch)] == ["a fixed tiny checkpoint"]


def test_an_evaluator_that_stops_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes.COCOScenes, "load_data_list", lambda self: 1 / 0)
    assert wrong("coco", monkeypatch) == [""]  # the reason is the remedy's place


def test_a_score_that_is_no_number_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off:
        """An evaluator whose number is not the one that it must be."""

        golden = staticmethod(lambda folder: (Golden("a fixed tiny checkpoint", float("nan"), 8.0, 0.1),))

    monkeypatch.setattr(plugins, "importable", lambda kind: {"off": Off})
    assert next(iter(known_answers()))[:2] == (False, "evaluator off: a fixed tiny checkpoint nan")


def test_doctor_says_so_and_exits_with_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr("doctor.command.known_answers", lambda: iter([(False, "evaluator off: a fixed tiny checkpoint 9.00", "must be 8.00")]))
    words = ["doctor", "--runs", str(tmp_path / "runs")]
    assert [cli.main(words), cli.main([*words, "--evaluators"])] == [0, 1]
    assert capsys.readouterr().out.count("BAD  evaluator off: a fixed tiny checkpoint 9.00: must be 8.00") == 1
