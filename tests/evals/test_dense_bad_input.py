"""What is wrong with people's dense labels: each thing gives the right result, or one line that names it before hours of training."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_data import CATEGORIES, make_ade20k, make_coco, picture
from PIL import ExifTags, Image

from evals.openmmlab.ade20k import ADE20K
from evals.openmmlab.coco import COCO
from evals.openmmlab.foreign import openmmlab
from harness.checkpoint import Backbone
from harness.data import BadImage
from harness.layout import check_layout
from harness.plugins import EvalContext, Session
from harness.spec import JobFailed, Outcome, Protocol, Recipe, UserError, ViTConfig
from harness.vit import ViT

VIT = ViTConfig(size=(32, 32), patch=8, width=16, depth=1, heads=1)
SETTING = Protocol(name="smoke", family="smoke", summary="", backbones={"tiny": VIT}, backbone="tiny")
EVALUATORS: dict[str, Any] = {"ade20k": ADE20K(channels=8), "coco": COCO(side=64)}
NOWHERE = float("nan")


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    with openmmlab():
        yield


def evaluate(name: str, place: Path, data: Path, **session: Any) -> tuple[Outcome, Session]:
    """One step of two images, and the score."""
    place.mkdir()
    lent = Session(place, 5, torch.device("cpu"), torch.float32, {name: data}, **session)
    recipe = dataclasses.replace(EVALUATORS[name].recipe(SETTING, VIT), iterations=1, batch=2, warmup=0)
    checkpoint = Backbone(VIT, (0.5,) * 3, (0.5,) * 3, ViT(VIT).state_dict())
    return EVALUATORS[name].run(checkpoint, EvalContext(lent, SETTING, recipe)), lent


def edit(root: Path, split: str, change: Callable[[dict[str, Any]], object]) -> Path:
    path = root / "annotations" / f"instances_{split}.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    return root


def first(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda body: body["annotations"][0].update(fields)


REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "a box that is no number": ("train2017", first(bbox=[0, 0, NOWHERE, 4]), "box that is not four numbers"),
    "a box of three numbers": ("train2017", first(bbox=[0, 0, 4]), "box that is not four numbers"),
    "a corner that is no number": ("train2017", first(segmentation=[[0, 0, NOWHERE, 4, 4, 4]]), "corners that are nowhere"),  # pycocotools eats all memory
    "a corner far away": ("train2017", first(segmentation=[[0, 0, 1e9, 4, 4, 4]]), "corners that are nowhere"),
    "corners as pairs": ("train2017", first(segmentation=[[[0, 0], [4, 0], [4, 4]]]), "not in COCO's layout"),
    "runs of another size": ("train2017", first(segmentation={"size": [5, 5], "counts": [0, 25]}), r"mask of 5x5 pixels, its image has 64x48"),
    "runs that end early": ("train2017", first(segmentation={"size": [48, 64], "counts": [0, 4]}), "runs do not fill its image"),
    "compressed runs that are none": ("train2017", first(segmentation={"size": [48, 64], "counts": "no runs"}), "not in COCO's layout"),
    "compressed runs of another size": ("val2017", first(segmentation={"size": [48, 64], "counts": "0b0b1"}), "runs do not fill its image"),
    "compressed runs cut off": ("val2017", first(segmentation={"size": [48, 64], "counts": "0PP"}), "not in COCO's layout"),
    "a crowd that is null": ("train2017", first(iscrowd=None), "iscrowd None, neither 0 nor 1"),
    "scored: an area that is null": ("val2017", first(area=None), "area None, which is no number"),
    "scored: two corners": ("val2017", first(segmentation=[[1, 1, 5, 5]]), "fewer than three corners"),
    "scored: no mask": ("val2017", lambda body: body["annotations"][0].pop("segmentation"), "has no segmentation"),
    "scored: no iscrowd": ("val2017", lambda body: body["annotations"][0].pop("iscrowd"), "has no iscrowd"),
    "scored: id 0": ("val2017", first(id=0), "number annotations from 1"),
    "scored: an id twice": ("val2017", first(id=2), "the same id"),
    "a category of its own": ("val2017", lambda body: body["categories"].append({"id": 9, "name": "cat"}), "category 9 'cat' is none of"),
    "an image with text as id": ("val2017", lambda body: (body["images"][0].update(id="a"), body["annotations"].clear()), "the id 'a' is no whole number"),
    "a thread of an image": ("val2017", lambda body: body["images"][1].update(width=9, height=901), "000000001001.jpg is 9x901 pixels, too thin"),
    "an image without size": ("val2017", lambda body: body["images"][0].pop("width"), "'width' is missing"),
}


@pytest.mark.parametrize("split,change,said", REFUSED.values(), ids=REFUSED)
def test_annotations_that_cannot_be_used_are_named_before_anything_starts(split: str, change: Any, said: str, tmp_path: Path) -> None:
    root = make_coco(tmp_path / "coco", 2, 2)
    check_layout("coco", root)
    with pytest.raises(UserError, match=rf"instances_{split}.json: .*{said}"):
        check_layout("coco", edit(root, split, change))


def test_compressed_runs_are_read_as_pycocotools_writes_them(tmp_path: Path) -> None:
    import pycocotools.mask

    from data_sets.dense import run_lengths

    rng = np.random.default_rng(0)
    for height, width in ((48, 64), (1, 1), (700, 900)):
        dense, sparse = rng.random((height, width)) < 0.5, np.arange(height * width).reshape(height, width) % 997 == 5
        for mask in (dense, sparse, np.zeros_like(dense), np.ones_like(dense)):
            written = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
            runs = run_lengths(written)
            assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), mask.ravel(order="F"))
    root = make_coco(tmp_path / "coco", 1, 1)
    whole = pycocotools.mask.encode(np.ones((48, 64), np.uint8, order="F"))["counts"].decode()
    check_layout("coco", edit(root, "val2017", first(segmentation={"size": [48, 64], "counts": whole})))


@pytest.mark.parametrize("labels,said", [
    (np.full((48, 64), 9, np.uint8), "above the number of classes"), (np.ones((48, 64, 3), np.uint8), "mode RGB"),
    (np.ones((64, 48), np.uint8), "48x64 pixels, its image has 64x48"),
])
def test_label_pictures_that_cannot_be_right_are_named_before_anything_starts(labels: np.ndarray, said: str, tmp_path: Path) -> None:
    root = make_ade20k(tmp_path / "ade", 2, 2)
    check_layout("ade20k", root)
    Image.fromarray(labels).save(root / "annotations/training/ADE_0000.png")
    with pytest.raises(UserError, match=rf"ADE_0000.png: .*{said}"):
        check_layout("ade20k", root)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name,file,harm", [
    ("ade20k", "images/validation/ADE_1001.jpg", damage), ("ade20k", "annotations/validation/ADE_1001.png", damage),
    ("ade20k", "annotations/validation/ADE_1001.png", lambda path: Image.new("RGB", (48, 64)).save(path)),
    ("coco", "val2017/000000001001.jpg", damage), ("coco", "val2017/000000001001.jpg", lambda path: Image.new("RGB", (9, 9)).save(path)),
])
def test_what_is_scored_at_the_end_is_looked_at_before_the_training(name: str, file: str, harm: Callable[[Path], object], tmp_path: Path) -> None:
    data = {"ade20k": make_ade20k, "coco": make_coco}[name](tmp_path / "data", 2, 3)
    harm(data / file)
    with pytest.raises(BadImage, match=Path(file).stem):
        evaluate(name, tmp_path / "fail", data)
    assert not (tmp_path / "fail" / "metrics.jsonl").exists()  # not one step was made
    outcome, lent = evaluate(name, tmp_path / "skip", data, on_bad_image="skip", workers=0)
    assert outcome.facts["scored_images"] == 2 and [Path(p).stem for p in lent.skipped_images] == [Path(file).stem]


def test_boxes_are_cut_at_the_border_and_what_has_no_area_or_outline_is_left_out(tmp_path: Path) -> None:
    from evals.openmmlab.scenes import COCOScenes

    square = [[4, 4, 9, 4, 9, 9, 4, 9]]
    shapes = [([-5, 40, 20, 30], square), ([70, 4, 5, 5], square), ([4, 4, 0, 5], square), ([4, 4, -3, 5], square), ([4, 4, 5, 5], [[4, 4, 9, 9]]),
              ([4, 4, 5, 5], []), ([4, 4, 5, 5], [[1, 1, 2, 2], square[0]])]

    def change(body: dict[str, Any]) -> None:
        body["annotations"] = [
            {"id": i, "image_id": 0, "category_id": 3, "bbox": box, "segmentation": mask, "iscrowd": 0, "area": 25} for i, (box, mask) in enumerate(shapes, 1)
        ]

    root = edit(make_coco(tmp_path / "coco", 1, 1), "train2017", change)
    check_layout("coco", root)
    found = COCOScenes(root, "train2017", CATEGORIES, []).get_data_info(0)["instances"]
    assert [i["bbox"] for i in found] == [[0, 40, 15, 48], [4, 4, 9, 9]]
    assert all(i["mask"] == square for i in found)


def train_samples(data: Path, skip_bad: bool) -> Any:
    from mmengine.registry import DefaultScope

    from evals.openmmlab import mask_rcnn
    from evals.openmmlab.samples import InOrder
    from evals.openmmlab.scenes import COCOScenes

    with DefaultScope.overwrite_default_scope("mmdet"):
        return InOrder(COCOScenes(data, "train2017", CATEGORIES, mask_rcnn.train_pipeline(64, (1.0, 1.0))), [0, 1], 0, skip_bad)


def test_runs_that_cannot_be_decoded_are_a_failure_of_their_image(tmp_path: Path) -> None:
    root = edit(make_coco(tmp_path / "coco", 2, 1), "train2017", first(segmentation={"size": [48, 64], "counts": "no runs"}))
    with pytest.raises(BadImage, match=r"000000000000.jpg: a mask of its annotations cannot be read"):
        [train_samples(root, False)[i] for i in range(2)]
    assert {Path(train_samples(root, True)[i]["bad"]).name for i in range(2)} == {"000000000000.jpg", ""}


@pytest.mark.parametrize("change,said", [
    (lambda body: body["annotations"][0].pop("id"), "an annotation cannot be scored .KeyError: 'id'"),
    (lambda body: body["annotations"][0].pop("area"), "annotation 1 cannot be scored .KeyError: 'area'"),
    (first(segmentation=[]), "annotation 1 cannot be scored .(Index|Value)Error"),
])
def test_held_out_images_that_cannot_be_scored_are_found_before_the_training(change: Any, said: str, tmp_path: Path) -> None:
    """Training needs less of an annotation than scoring does."""
    root = edit(make_coco(tmp_path / "coco", 2, 1), "train2017", change)
    check_layout("coco", root)
    (tmp_path / "job").mkdir()
    lent = Session(tmp_path / "job", 5, torch.device("cpu"), torch.float32, {"coco": root})
    evaluator = COCO(side=64, holdout=0.5)
    recipe = dataclasses.replace(evaluator.recipe(SETTING, VIT) or Recipe(batch=1, lr=1.0), iterations=1, batch=1, warmup=0)
    checkpoint = Backbone(VIT, (0.5,) * 3, (0.5,) * 3, ViT(VIT).state_dict())
    with pytest.raises(JobFailed, match=rf"instances_train2017.json: {said}"):
        evaluator.run(checkpoint, EvalContext(lent, SETTING, recipe))
    assert not (tmp_path / "job" / "metrics.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_a_transform_stops_at_is_named(workers: int, tmp_path: Path) -> None:
    """OpenCV resizes nothing to no pixels, and says so in C++."""
    root = make_coco(tmp_path / "coco", 2, 1)

    def change(body: dict[str, Any]) -> None:
        body["images"][0].update(width=999, height=1)
        body["annotations"] = [{**a, "bbox": [0, 0, 9, 1], "segmentation": [[0, 0, 9, 0, 9, 1]]} for a in body["annotations"]]

    edit(root, "train2017", change)
    Image.new("RGB", (999, 1)).save(root / "train2017" / "000000000000.jpg")
    with warnings.catch_warnings(), pytest.raises(JobFailed, match=r"000000000000.jpg: cannot be prepared with its labels \(error: OpenCV") as found:
        warnings.filterwarnings("ignore", message="This process .* is multi-threaded", category=DeprecationWarning)  # Python's, about fork
        evaluate("coco", tmp_path / "job", root, workers=workers)
    assert "\n" not in str(found.value)


def test_an_outline_without_area_and_an_image_without_objects_train(tmp_path: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        body["annotations"] = [{**a, "segmentation": [[4, 4, 8, 4, 12, 4]], "iscrowd": 0} for a in body["annotations"]]

    root = edit(make_coco(tmp_path / "coco", 2, 1), "train2017", change)
    assert 0 <= evaluate("coco", tmp_path / "job", root)[0].metrics["AP_box"] <= 100


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_images_have_the_colours_of_their_picture(mode: str, tmp_path: Path) -> None:
    from evals.openmmlab.samples import ReadImage

    plain = Image.fromarray(picture(0)[0])
    plain.convert(mode).save(tmp_path / "a.jpg", quality=95)
    read = ReadImage().transform({"img_path": str(tmp_path / "a.jpg")})["img"][:, :, ::-1].astype(int)
    expected = np.asarray(plain.convert(mode).convert("RGB")).astype(int)
    assert read.shape == expected.shape and np.abs(read - expected).mean() < 5


@pytest.mark.parametrize("turned", [False, True], ids=["labels as stored", "labels upright"])
@pytest.mark.parametrize("name", EVALUATORS)
def test_an_exif_orientation_is_followed_where_the_labels_follow_it(name: str, turned: bool, tmp_path: Path) -> None:
    """Pixels and labels would be a quarter turn apart, or the job would end at this image."""
    from evals.openmmlab.samples import Reader
    from evals.openmmlab.scenes import COCOScenes

    make = {"ade20k": make_ade20k, "coco": make_coco}[name]
    root = make(tmp_path / "data", 1, 1)
    path = root / ("images/training/ADE_0000.jpg" if name == "ade20k" else "train2017/000000000000.jpg")
    upright = Image.fromarray(picture(0)[0])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn the stored pixels clockwise by a quarter
    (upright.transpose(Image.Transpose.ROTATE_90) if turned else upright).save(path, exif=exif, quality=95)
    check_layout(name, root)
    if name == "ade20k":
        from mmengine.registry import DefaultScope

        from evals.openmmlab import upernet

        with DefaultScope.overwrite_default_scope("mmseg"):
            source = upernet.scenes(root, "training", ("ground", "red", "blue"), upernet.train_pipeline({"crop": 32, "short": 32}, 3))
    else:
        source = COCOScenes(root, "train2017", CATEGORIES, [{"type": "HarnessReadImage"}])
    results = source.get_data_info(0)
    for step in source.pipeline.transforms:
        results = step(results) if isinstance(step, Reader) else results
    assert np.abs(results["img"][:, :, ::-1].astype(int) - np.asarray(upright)).mean() < 5
    if name == "ade20k":
        assert results["gt_seg_map"].shape == results["img"].shape[:2]


def test_classes_that_never_occur_have_no_part_in_the_mean(tmp_path: Path) -> None:
    root = make_ade20k(tmp_path / "ade", 2, 2)
    for path in (root / "annotations").rglob("*.png"):
        Image.fromarray(np.ones_like(np.asarray(Image.open(path)))).save(path)
    outcome, _ = evaluate("ade20k", tmp_path / "job", root)
    with np.load(outcome.outcomes) as saved:
        assert set(saved["gt"].tolist()) == {0}
        hit, union = saved["count"][saved["pred"] == 0].sum(), saved["count"].sum()
    predicted = 1 + len({1, 2} & set(np.load(outcome.outcomes)["pred"].tolist()))  # a class that is predicted, and wrong, counts 0
    assert outcome.metrics["mIoU"] == pytest.approx(100 * hit / union / predicted)


def test_more_classes_than_a_label_picture_can_tell_apart_are_refused() -> None:
    from evals.openmmlab.upernet import ReadLabels

    with pytest.raises(JobFailed, match="256 classes: at most 255"):
        ReadLabels(256)
