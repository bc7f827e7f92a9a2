"""The two ways in which papers set up Mask R-CNN on a ViT, any ViT that comes along, and COCO's average precision."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_data import make_coco
from torch import nn

from evals.openmmlab.coco import COCO
from evals.openmmlab.foreign import openmmlab
from harness.checkpoint import Backbone
from harness.optim import lr_at, parameter_groups
from harness.plugins import EvalContext, Session, build
from harness.spec import Outcome, Protocol, Recipe, UserError, ViTConfig
from harness.vit import ViT
from protocols.paper import BACKBONES, paper

VIT = ViTConfig(size=(16, 16), patch=8, width=16, depth=5, heads=2)
SMOKE = Protocol(name="smoke", family="smoke", summary="", backbones={"tiny": VIT}, backbone="tiny")


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    with openmmlab():
        yield


def checkpoint(config: ViTConfig) -> Backbone:
    torch.manual_seed(0)
    return Backbone(config, (0.5,) * 3, (0.5,) * 3, ViT(config).state_dict())


def model_of(by: str, config: ViTConfig, side: int, size: Any = None) -> Any:
    """A detector as `coco` builds it, of small heads."""
    from mmengine.registry import DefaultScope

    from evals.openmmlab import mask_rcnn
    from evals.openmmlab.backbone import even_taps

    given, scales = checkpoint(config), COCO().map_scales(config)
    with DefaultScope.overwrite_default_scope("mmdet"):
        backbone = mask_rcnn.backbone(given, by, side, 0.0, 2, even_taps(config.depth), scales)
        return mask_rcnn.build(given, backbone, size or mask_rcnn.SMALL, by, side, scales, 2)


# --------------------------------------------------------------------------------------------------------------- recipes


def paper_recipe(name: str, backbone: str) -> Recipe:
    recipe = build("evals", name).recipe(paper, BACKBONES[backbone])
    assert recipe is not None, (name, backbone)
    return recipe


@pytest.mark.parametrize("name,backbone,expected", [  # recipes A10
    ("coco", "vit-b16", {"lr": 8e-5, "epochs": 100, "weight_decay": 0.1, "drop_path": 0.1, "layer_decay": None, "schedule": "cosine", "warmup": 0.25}),
    ("coco@li21", "vit-l16", {"lr": 8e-5, "epochs": 100, "weight_decay": 0.1, "drop_path": 0.3, "clip": None}),
    ("coco@li21-25", "vit-b16", {"epochs": 25}), ("coco@li21-50", "vit-b16", {"epochs": 50}),
    ("coco@vitdet", "vit-b16", {"lr": 1e-4, "iterations": 184_375, "drop_path": 0.1, "layer_decay": 0.7, "warmup": 250, "steps": (163_889, 177_546)}),
    ("coco@vitdet", "vit-l16", {"lr": 1e-4, "iterations": 184_375, "drop_path": 0.4, "layer_decay": 0.8}),
    ("coco@vitdet", "vit-h14", {"lr": 1e-4, "iterations": 138_281, "drop_path": 0.5, "layer_decay": 0.9, "no_decay": (), "decay_vectors": True}),
])
def test_recipes_are_the_papers(name: str, backbone: str, expected: dict[str, Any]) -> None:
    recipe = paper_recipe(name, backbone)
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.batch == 64 and recipe.betas == (0.9, 0.999)


def test_vitdets_schedule_warms_up_and_falls_twice() -> None:
    recipe = paper_recipe("coco@vitdet", "vit-b16")
    total = recipe.iterations or 0
    rates = [lr_at(recipe, step, total) for step in (0, 250, 163_888, 163_889, 177_545, 177_546, total - 1)]
    assert rates == pytest.approx([1e-7, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])


def test_from_scratch_li21_has_another_lr_and_weight_decay_and_vitdet_has_not() -> None:
    scratch, mae = build("methods", "scratch"), build("methods", "mae")
    for name in ("coco", "coco@li21-200"):
        recipe = scratch.transfer(name, paper, BACKBONES["vit-b16"]).on(paper_recipe(name, "vit-b16"))
        assert (recipe.lr, recipe.weight_decay) == (1.6e-4, 0.2)
        assert not mae.transfer(name, paper, BACKBONES["vit-b16"]).recipe
    assert not scratch.transfer("coco@vitdet", paper, BACKBONES["vit-b16"]).recipe
    assert not scratch.transfer("coco", SMOKE, VIT).recipe


@pytest.mark.parametrize("by,exempt", [("vitdet", (nn.LayerNorm,)), ("li21", ())])
def test_weight_decay_leaves_out_what_the_source_leaves_out(by: str, exempt: tuple[type, ...]) -> None:
    from evals.openmmlab.optimizer import Named

    name = f"coco@{by}"
    model = Named(model_of(by, VIT, 64))
    owner = {f"{prefix}.{n}".lstrip("."): (module, n) for prefix, module in model.named_modules() for n, _ in module.named_parameters(recurse=False)}
    for group in parameter_groups(model, paper_recipe(name, "vit-b16"), VIT.depth):
        for parameter in group["names"]:
            module, last = owner[parameter]
            spared = isinstance(module, exempt) or last == "pos_embed" if by == "vitdet" else getattr(module, last).ndim < 2
            assert group["decays"] != spared, parameter


def test_each_backbone_has_a_recipe_or_one_line_that_names_those_that_have() -> None:
    from harness.plan import Planner
    from harness.request import Request

    planner = Planner(Request(methods=("scratch",), evals=("coco",), protocol="paper", backbone="vit-h14"))
    with pytest.raises(UserError, match=r"coco has no recipe .* vit-h14: no source gives one; there is one for vit-b16, .*; variants .*: coco@vitdet$"):
        planner.recipe_of("coco", COCO(), BACKBONES["vit-h14"])


@pytest.mark.parametrize("fields,message", [
    ({"by": "vitdet", "epochs": 50}, "coco.recipe.epochs"), ({"epochs": 0}, "at least 1"), ({"by": "mae"}, "not 'mae'"),
])
def test_a_field_that_means_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        COCO(**fields)


# ------------------------------------------------------------------------------------------------------------- the model


def test_the_simple_pyramid_written_out() -> None:
    from evals.openmmlab.simple_pyramid import SimplePyramid

    torch.manual_seed(0)
    neck, x = SimplePyramid(16, 6, (4.0, 2.0, 1.0, 0.5), 5), torch.randn(2, 16, 4, 6)
    for parameter in neck.parameters():
        nn.init.normal_(parameter, std=0.5)

    def norm(y: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
        mean, variance = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
        return (y - mean) / (variance + 1e-6).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]

    def up(y: torch.Tensor, layer: Any) -> torch.Tensor:
        return F.conv_transpose2d(y, layer.weight, layer.bias, stride=2)

    for level, found in zip(neck.levels, neck((x,)), strict=False):
        y, parts = x, dict(level.named_children())
        if "up1" in parts:
            y = up(y, parts["up1"])
        if "up2" in parts:
            y = up(F.gelu(norm(y, parts["norm"])), parts["up2"])
        if "pool" in parts:
            y = F.max_pool2d(y, 2)
        y = norm(F.conv2d(y, parts["conv1"].weight), parts["norm1"])
        torch.testing.assert_close(found, norm(F.conv2d(y, parts["conv2"].weight, padding=1), parts["norm2"]), rtol=1e-4, atol=1e-4)
    maps = neck((x,))
    assert [tuple(m.shape) for m in maps] == [(2, 6, 16, 24), (2, 6, 8, 12), (2, 6, 4, 6), (2, 6, 2, 3), (2, 6, 1, 2)]
    assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])
    assert [level[0].out_channels for level in list(neck.levels)[:2]] == [8, 8] and neck.levels[0].up2.out_channels == 4


@pytest.mark.parametrize("by", ["li21", "vitdet"])
def test_heads_are_those_of_the_papers(by: str) -> None:
    from evals.openmmlab import mask_rcnn
    from evals.openmmlab.backbone import NearBatchNorm
    from evals.openmmlab.simple_pyramid import LayerNorm2d

    model = model_of(by, dataclasses.replace(VIT, patch=16, size=(32, 32)), 64, mask_rcnn.PAPER)
    norm, other = (LayerNorm2d, NearBatchNorm) if by == "vitdet" else (NearBatchNorm, LayerNorm2d)
    assert len(model.rpn_head.rpn_conv) == 2
    assert [type(c.norm) for c in model.roi_head.bbox_head.shared_convs] == [norm] * 4 and len(model.roi_head.bbox_head.shared_fcs) == 1
    assert [type(c.norm) for c in model.roi_head.mask_head.convs] == [norm] * 4
    assert any(isinstance(m, norm) for m in model.neck.modules()) and not any(isinstance(m, other) for m in model.modules())
    assert len(model.backbone.steps) == (1 if by == "vitdet" else 4)
    assert any(isinstance(m, nn.GroupNorm) for m in model.backbone.steps.modules()) == (by == "li21")
    assert (model.rpn_head.train_cfg is not None, model.test_cfg.rpn.nms_pre, model.train_cfg.rpn_proposal.nms_pre) == (True, 1000, 2000)


def test_strides_are_exact_for_a_patch_of_14() -> None:
    """A stride of 3.5 taken for 4 would put every box of a ViT-H in the wrong place."""
    from evals.openmmlab import mask_rcnn

    huge = ViTConfig(size=(28, 28), patch=14, width=16, depth=5, heads=2)
    side = COCO(side=40).input_side(SMOKE, huge)
    model = model_of("vitdet", huge, side, mask_rcnn.PAPER).eval()
    assert side == 56 and COCO(side=40).notes(SMOKE, huge) == ("input of 56 pixels: the pyramid on patches of 14 does not divide 40",)
    assert COCO().input_side(paper, BACKBONES["vit-h14"]) == 1036 and COCO().notes(paper, BACKBONES["vit-b16"]) == ()
    maps = model.extract_feat(torch.rand(1, 3, side, side))
    strides = model.rpn_head.prior_generator.strides
    assert [m.shape[-1] * s[0] for m, s in zip(maps[:4], strides, strict=False)] == [56, 56, 56, 56] and strides[0] == (3.5, 3.5)
    assert model.roi_head.bbox_roi_extractor.roi_layers[0].spatial_scale == 1 / 3.5


@pytest.mark.parametrize("name,bias,said", [
    ("coco", "none", False), ("coco", "shared", False), ("coco", "block", True), ("coco@vitdet", "none", False), ("coco@vitdet", "shared", True),
])
def test_a_bias_that_the_setting_does_not_have_is_a_footnote(name: str, bias: str, said: bool) -> None:
    vit = dataclasses.replace(BACKBONES["vit-b16"], relative_bias=bias)
    assert any("relative position bias" in note for note in build("evals", name).notes(paper, vit)) == said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco") / "coco", train=4, val=5)


@pytest.mark.parametrize("by,config", [
    ("li21", dataclasses.replace(VIT, relative_bias="shared", positions="none", layer_scale=0.1, key_bias=False)),  # BEiT as released
    ("vitdet", dataclasses.replace(VIT, patch=14, size=(28, 28))),
    ("default", dataclasses.replace(VIT, relative_bias="block", positions="none")),
])
def test_any_vit_is_trained_and_every_image_scored(by: str, config: ViTConfig, folder: Path, tmp_path: Path) -> None:
    evaluator = COCO(by=by, side=56)  # type: ignore[arg-type]
    recipe = evaluator.recipe(SMOKE, config)
    assert recipe is not None and evaluator.skip(config) is None
    lent = Session(dir=tmp_path, seed=3, device=torch.device("cpu"), dtype=torch.bfloat16, folders={"coco": folder})
    outcome: Outcome = evaluator.run(checkpoint(config), EvalContext(lent, SMOKE, dataclasses.replace(recipe, batch=2, iterations=2, warmup=1, steps=())))
    assert set(outcome.metrics) == {"AP_box", "AP_mask"} and outcome.outcomes is not None
    with np.load(outcome.outcomes) as saved:
        assert saved["images"].tolist() == [1000, 1001, 1002, 1003, 1004]  # the last has no objects, and what is found in it counts as wrong
    trained = torch.load(next(iter(sorted((tmp_path / "checkpoint" / "train").glob("*.pt")))), weights_only=True)["model"]
    moved = [k for k in trained if k.endswith((".rows", ".columns", "relative_bias.0.table"))]
    assert moved and all(trained[k].abs().sum() > 0 for k in moved)  # all of these start at zero


# ---------------------------------------------------------------------------------------------------------------- scoring


def crowded(root: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Annotations with crowds, images without any and a category that never occurs; detections with ties, some in crowds, one image with 300 of a kind."""
    import pycocotools.mask as rle

    rng, side = np.random.default_rng(0), 96
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []

    def mask_of(box: np.ndarray) -> np.ndarray:
        mask = np.zeros((side, side), bool)
        left, top, right, bottom = box.round().astype(int)
        mask[top:bottom, left:right] = True
        return mask

    def box() -> np.ndarray:
        corner, size = rng.integers(0, 60, 2), rng.integers(6, 34, 2)
        return np.concatenate([corner, corner + size]).astype(np.float32)

    for image in range(8):
        boxes, labels, scores = [], [], []
        for number in range(0 if image == 5 else 6):
            at, label, crowd = box(), int(rng.integers(2)), int(number == 0 and image % 2)
            width, height = (float(v) for v in at[2:] - at[:2])
            runs = rle.encode(np.asfortranarray(mask_of(at).astype(np.uint8)))
            outline = [float(at[i]) for i in (0, 1, 2, 1, 2, 3, 0, 3)]
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": (3, 7)[label], "iscrowd": crowd, "area": width * height,
                "bbox": [float(at[0]), float(at[1]), width, height],
                "segmentation": {"size": [side, side], "counts": runs["counts"].decode()} if crowd else [outline],
            })
            for _ in range(3 if crowd else 2):
                boxes.append(np.clip(at + rng.integers(-4, 5, 4), 0, side).astype(np.float32))
                labels.append(label if rng.random() < 0.8 else 1 - label)
                scores.append(round(float(rng.random()), 1))
        for _ in range(300 if image == 2 else 10):
            boxes.append(box())
            labels.append(0)
            scores.append(round(float(rng.random()), 1))
        keep = [i for i, b in enumerate(boxes) if (b[2:] - b[:2]).min() > 1]
        found.append({"img_id": image, "pred_instances": {
            "bboxes": torch.from_numpy(np.array([boxes[i] for i in keep])), "labels": torch.tensor([labels[i] for i in keep]),
            "scores": torch.tensor([scores[i] for i in keep]), "masks": torch.from_numpy(np.array([mask_of(boxes[i]) for i in keep])),
        }})
    body = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": side, "width": side} for i in range(8)], "annotations": annotations,
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}, {"id": 11, "name": "never"}],
    }
    path = root / "instances.json"
    path.write_text(json.dumps(body))
    return path, found


def test_average_precision_is_pycocotools_with_crowds_empty_images_ties_and_many_detections(tmp_path: Path) -> None:
    import pycocotools.mask as rle
    from pycocotools.coco import COCO as Truth
    from pycocotools.cocoeval import COCOeval

    from evals.openmmlab.average_precision import AveragePrecision

    path, found = crowded(tmp_path)
    metric = AveragePrecision(tmp_path / "outcomes.npz", path, np.arange(8), [3, 7, 11])
    metric.dataset_meta = {"classes": ("a", "b", "never")}
    metric.process({}, found)
    ours = metric.evaluate(8)
    results = []
    for sample in found:
        p = {k: v.numpy() for k, v in sample["pred_instances"].items()}
        for box, label, score, mask in zip(p["bboxes"].astype(float), p["labels"], p["scores"].astype(float), p["masks"], strict=True):
            runs = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            results.append({
                "image_id": sample["img_id"], "category_id": (3, 7, 11)[label], "score": score, "bbox": [*box[:2], *(box[2:] - box[:2])],
                "segmentation": {"size": list(mask.shape), "counts": runs["counts"].decode()},
            })
    written = tmp_path / "detections.json"
    written.write_text(json.dumps(results))
    truth = Truth(str(path))
    for kind, column in (("bbox", "AP_box"), ("segm", "AP_mask")):
        judge = COCOeval(truth, truth.loadRes(str(written)), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert abs(ours[column] / 100 - judge.stats[0]) < 1e-6
        assert 0.1 < judge.stats[0] < 0.9  # neither nothing nor everything is found
        judge.params.maxDets = [1, 10, 1000]
        judge.evaluate()
        judge.accumulate()
        assert abs(judge.eval["precision"][:, :, :, 0, 2][judge.eval["precision"][:, :, :, 0, 2] > -1].mean() - judge.stats[0]) > 1e-6  # the limit matters
