"""The pieces under the dense evaluators, each against something that is known to be right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from dense_data import CATEGORIES, make_ade20k, make_coco
from torch import nn

from evals.openmmlab.foreign import openmmlab
from harness.checkpoint import Backbone
from harness.spec import JobFailed, ViTConfig
from harness.vit import ViT

VIT = ViTConfig(size=(32, 32), patch=8, width=32, depth=4, heads=2)


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    with openmmlab():
        yield


# ------------------------------------------------------------------------------------------------------- mmcv's stand-in


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 1, 2])
def test_roi_align_of_mmcv_is_torchvisions_forward_and_backward(aligned: bool, samples: int) -> None:
    from mmcv.ops import roi_align

    torch.manual_seed(0)
    ours = torch.rand(2, 3, 12, 10, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    rois = torch.tensor([[0, 1.0, 2.0, 8.0, 9.0], [1, 0.0, 0.0, 19.0, 23.0], [1, 3.2, 4.1, 3.9, 5.0], [0, -9.0, 8.0, 30.0, 40.0]])
    got = roi_align(ours, rois, (4, 3), 0.5, samples, "avg", aligned)
    expected = torchvision.ops.roi_align(theirs, rois, (4, 3), 0.5, samples or -1, aligned)
    weight = torch.rand_like(expected)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(got, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_nms_of_mmcv_keeps_the_best_of_overlapping_boxes() -> None:
    from mmcv.ops import nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    kept, index = nms(boxes, torch.tensor([0.5, 0.9, 0.3]), 0.5)
    assert index.tolist() == [1, 2] and kept.shape == (2, 5)


def test_an_op_that_is_not_there_says_so() -> None:
    from mmcv.ops import deform_conv2d

    with pytest.raises(RuntimeError, match="needs compiled mmcv"):
        deform_conv2d(torch.rand(1, 1, 4, 4), torch.zeros(1, 18, 4, 4), torch.rand(1, 1, 3, 3), 1, 1)


# ------------------------------------------------------------------------------------------------------------- backbone


def test_the_pyramid_has_the_papers_strides_and_any_image_size() -> None:
    from evals.openmmlab.backbone import Pyramid, even_taps, scales_for

    maps = Pyramid(ViT(dataclasses.replace(VIT, patch=16)), (0, 1, 2, 3), scales_for(16))(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    small = Pyramid(ViT(VIT), (0, 1, 2, 3), scales_for(8))(torch.rand(1, 3, 64, 32))
    assert [tuple(m.shape[2:]) for m in small] == [(16, 8), (8, 4), (4, 2), (2, 1)]
    assert even_taps(12) == (2, 5, 8, 11) and even_taps(24) == (5, 11, 17, 23) and even_taps(6) == (1, 2, 4, 5)


def test_a_tap_is_the_shared_vits_feature_without_norm() -> None:
    from evals.openmmlab.backbone import Pyramid

    vit, images = ViT(VIT).eval(), torch.rand(1, 3, 32, 32)
    assert torch.equal(Pyramid(vit, (0, 1, 2, 3), (2.0, 1.0, 1.0, 0.5))(images)[2], vit.features(images, (2,))[0])


def test_building_a_head_leaves_the_pretrained_weights_alone() -> None:
    from mmengine.registry import DefaultScope

    from evals.openmmlab import upernet
    from evals.openmmlab.ade20k import ADE20K, SMOKE
    from harness.spec import Protocol

    saved = Backbone(VIT, (0.5,) * 3, (0.5,) * 3, {k: torch.randn_like(v) for k, v in ViT(VIT).state_dict().items()})
    setting = Protocol(name="smoke", family="smoke", summary="", backbones={"tiny": VIT}, backbone="tiny")
    with DefaultScope.overwrite_default_scope("mmseg"):
        model: Any = upernet.build(saved, SMOKE, ADE20K(channels=8).sizes(VIT, setting), 3)
        model.init_weights()
    assert all(torch.equal(v, saved.state[k]) for k, v in model.backbone.vit.state_dict().items())


def test_layer_decay_reaches_the_vit_inside_a_segmentor() -> None:
    from evals.openmmlab.ade20k import SMOKE
    from evals.openmmlab.backbone import Pyramid
    from evals.openmmlab.optimizer import Named
    from harness.optim import parameter_groups

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.decode_head = Pyramid(ViT(VIT), (0, 1, 2, 3), (2.0, 1.0, 1.0, 0.5)), nn.Conv2d(32, 3, 1)

    model = Model()
    scale = {name: g["lr_scale"] for g in parameter_groups(Named(model), dataclasses.replace(SMOKE, layer_decay=0.5), 4) for name in g["names"]}
    assert scale["vit.patch_embed.proj.weight"] == 0.5**5 and scale["vit.blocks.3.mlp.fc1.weight"] == 0.5
    assert scale["dense.decode_head.weight"] == 1 and scale["dense.backbone.steps.0.weight"] == 1
    assert len(scale) == len(list(model.parameters()))


def test_batch_norm_over_one_value_uses_running_statistics() -> None:
    from evals.openmmlab.backbone import NearBatchNorm

    near = NearBatchNorm(4).train()
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(near(x), x / (1 + near.eps) ** 0.5)
    assert near.running_mean is not None and not near.running_mean.any()
    batch = torch.randn(2, 4, 3, 3)
    assert torch.equal(near(batch), nn.BatchNorm2d(4).train()(batch))


# ----------------------------------------------------------------------------------------------------- places in the run


def test_a_place_in_the_run_is_the_same_sample_whatever_was_read_before(tmp_path: Path) -> None:
    from mmengine.registry import DefaultScope

    from evals.openmmlab import upernet
    from evals.openmmlab.samples import InOrder

    folder = make_ade20k(tmp_path / "ade")
    with DefaultScope.overwrite_default_scope("mmseg"):
        source = upernet.scenes(folder, "training", ("ground", "red", "blue"), upernet.train_pipeline({"crop": 32, "short": 32}, 3))
    samples = InOrder(source, range(9), 5, False)
    forward = [samples[i] for i in range(20)]
    for i in (19, 3, 11):
        assert torch.equal(samples[i]["inputs"], forward[i]["inputs"])
    order = [Path(s["data_samples"].img_path).name for s in forward]
    assert len(set(order[:9])) == 9 and sorted(order[:9]) == sorted(order[9:18]) and order[:9] != order[9:18]


def test_images_with_crowds_only_are_not_trained_on(tmp_path: Path) -> None:
    from evals.openmmlab.scenes import COCOScenes

    folder = make_coco(tmp_path / "coco")
    path = folder / "annotations" / "instances_train2017.json"
    body = json.loads(path.read_text())
    for annotation in body["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == 0)
    path.write_text(json.dumps(body))
    scenes = COCOScenes(folder, "train2017", CATEGORIES, [])
    assert scenes.with_instances(list(range(9))) == [1, 2, 3, 5, 6, 7, 8]  # 0: crowds, 4: nothing
    assert {i["bbox_label"] for n in range(9) for i in scenes.get_data_info(n)["instances"]} == {0, 1}


class Look(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What a loader's process finds: its threads, and the memory that is its own before and after it has read all annotations."""

    def __init__(self, scenes: Any) -> None:
        self.source, self.seed, self.scenes = scenes, None, scenes
        self.skip_bad = False

    def __len__(self) -> int:
        return 1

    def __getitem__(self, position: int) -> dict[str, Any]:
        import cv2

        def own() -> int:
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))

        before = own()
        count = sum(len(self.scenes.get_data_info(i)["instances"]) for i in range(len(self.scenes)))
        return {"torch": torch.get_num_threads(), "cv2": cv2.getNumThreads(), "grown": own() - before, "count": count}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's memory maps")
def test_loader_processes_share_the_annotations_and_have_one_thread(tmp_path: Path) -> None:
    """Sixteen copies of COCO's 450 MB, or cores x workers threads, would stop a machine."""
    import warnings

    from evals.openmmlab.samples import batches
    from evals.openmmlab.scenes import COCOScenes
    from harness.plugins import Session

    root = make_coco(tmp_path / "coco", 2, 1)
    path = root / "annotations" / "instances_train2017.json"
    body = json.loads(path.read_text())
    body["images"] = [{**body["images"][0], "id": i} for i in range(2000)]
    outline = np.random.default_rng(0).uniform(0, 40, 200).round(2).tolist()
    body["annotations"] = [{**body["annotations"][0], "id": 1 + i, "image_id": i % 2000, "segmentation": [outline]} for i in range(10_000)]
    path.write_text(json.dumps(body))
    scenes = COCOScenes(root, "train2017", CATEGORIES, [])
    assert scenes.data_list == [] and scenes.data_bytes.nbytes > 15e6  # one array, and no objects whose reference counts a reader writes to
    session = Session(tmp_path, 0, torch.device("cpu"), torch.float32, {}, workers=1)
    looked: Any = Look(scenes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This process .* is multi-threaded", category=DeprecationWarning)  # Python's, about fork
        (found,) = batches(looked, session, [[0]])
    assert (found["torch"], found["count"]) == ([1], [10_000]) and found["cv2"][0] <= 1
    assert found["grown"][0] < 0.3 * scenes.data_bytes.nbytes


def test_pixels_and_labels_come_as_bytes(tmp_path: Path) -> None:
    """Normalised floats and int64 labels would be four and eight times as much to pass from the loader to the device."""
    from mmengine.registry import DefaultScope

    from evals.openmmlab import mask_rcnn, upernet
    from evals.openmmlab.scenes import COCOScenes

    with DefaultScope.overwrite_default_scope("mmseg"):
        pipeline = upernet.train_pipeline({"crop": 32, "short": 32}, 3)
        sample = upernet.scenes(make_ade20k(tmp_path / "ade", 1, 1), "training", ("ground", "red", "blue"), pipeline)[0]
    assert sample["inputs"].dtype == sample["data_samples"].gt_sem_seg.data.dtype == torch.uint8
    with DefaultScope.overwrite_default_scope("mmdet"):
        sample = COCOScenes(make_coco(tmp_path / "coco", 1, 1), "train2017", CATEGORIES, mask_rcnn.train_pipeline(32, (1.0, 1.0)))[0]
    assert sample["inputs"].dtype == torch.uint8 and sample["data_samples"].gt_instances.masks.masks.dtype == np.uint8


# -------------------------------------------------------------------------------------------------------------- metrics


def test_miou_is_mmsegs_and_can_be_had_from_the_outcomes_again(tmp_path: Path) -> None:
    from mmseg.evaluation import IoUMetric

    from evals.openmmlab.mean_iou import MeanIoU

    rng, classes = np.random.default_rng(0), ("a", "b", "c", "never")
    ours, theirs = MeanIoU(tmp_path / "outcomes.npz"), IoUMetric()
    ours.dataset_meta = theirs.dataset_meta = {"classes": classes}
    for i in range(4):
        truth, predicted = rng.integers(0, 3, (1, 9, 11 + i)), rng.integers(0, 3, (1, 9, 11 + i))
        truth[:, :2] = 255
        sample = {"img_path": f"{i}.jpg", "gt_sem_seg": {"data": torch.from_numpy(truth).byte()}, "pred_sem_seg": {"data": torch.from_numpy(predicted)}}
        ours.process({}, [sample])
        theirs.process({}, [sample])
    got = ours.evaluate(4)["mIoU"]
    assert round(got, 2) == theirs.evaluate(4)["mIoU"]
    with np.load(tmp_path / "outcomes.npz") as saved:
        total = np.zeros((4, 4), np.int64)
        np.add.at(total, (saved["gt"], saved["pred"]), saved["count"])
    union = total.sum(0) + total.sum(1) - total.diagonal()
    assert np.isclose(100 * np.mean(total.diagonal()[:3] / union[:3]), got)


def detections(folder: Path, shift: float, score: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The true objects of val2017 (crowds left out), moved by `shift` pixels, as mmdet hands predictions to a metric."""
    import pycocotools.mask as rle

    from evals.openmmlab.scenes import COCOScenes

    scenes = COCOScenes(folder, "val2017", CATEGORIES, [])
    samples = []
    for i in range(len(scenes)):
        info = scenes.get_data_info(i)
        real = [x for x in info["instances"] if not x["ignore_flag"]]
        masks = [np.roll(rle.decode(rle.frPyObjects(x["mask"], info["height"], info["width"]))[:, :, 0], round(shift), 1).astype(bool) for x in real]
        samples.append({"img_id": info["img_id"], "pred_instances": {
            "bboxes": torch.tensor([x["bbox"] for x in real], dtype=torch.float).reshape(-1, 4) + torch.tensor([shift, 0, shift, 0]),
            "labels": torch.tensor([x["bbox_label"] for x in real], dtype=torch.long), "scores": torch.tensor([score(j) for j in range(len(real))]),
            "masks": torch.from_numpy(np.array(masks).reshape(-1, info["height"], info["width"])),
        }})
    return scenes, samples


def score_of(folder: Path, out: Path, shift: float, keep: Any = lambda samples: samples) -> dict[str, float]:
    from evals.openmmlab.average_precision import AveragePrecision

    scenes, samples = detections(folder, shift, lambda j: 0.9 - 0.1 * j)
    metric = AveragePrecision(out, scenes.json, scenes.ids(list(range(len(scenes)))), [n for n, _ in CATEGORIES])
    metric.dataset_meta = scenes.metainfo
    metric.process({}, keep(samples))
    for _ in range(len(samples) - len(metric.results)):
        metric.results.append([])
    return dict(metric.evaluate(len(samples)))


def test_perfect_detections_score_100_with_gaps_in_ids_crowds_and_empty_images(tmp_path: Path) -> None:
    scores = score_of(make_coco(tmp_path / "coco"), tmp_path / "outcomes.npz", 0.0)
    assert scores == pytest.approx({"AP_box": 100.0, "AP_mask": 100.0})


def test_no_detections_at_all_score_zero(tmp_path: Path) -> None:
    scores = score_of(make_coco(tmp_path / "coco"), tmp_path / "outcomes.npz", 0.0, lambda samples: [])
    assert scores == {"AP_box": 0.0, "AP_mask": 0.0}


def test_ap_is_what_mmdets_metric_gives_and_the_outcomes_hold_its_matches(tmp_path: Path) -> None:
    from mmdet.evaluation import CocoMetric

    folder = make_coco(tmp_path / "coco")
    scores = score_of(folder, tmp_path / "outcomes.npz", 2.0)
    scenes, samples = detections(folder, 2.0, lambda j: 0.9 - 0.1 * j)
    theirs = CocoMetric(str(folder / "annotations" / "instances_val2017.json"), ["bbox", "segm"])
    theirs.dataset_meta = scenes.metainfo
    for sample in samples:
        theirs.process({}, [{**sample, "ori_shape": sample["pred_instances"]["masks"].shape[1:]}])
    expected = theirs.evaluate(len(samples))
    assert scores["AP_box"] == pytest.approx(100 * expected["coco/bbox_mAP"], abs=0.051)  # theirs is rounded to three digits
    assert scores["AP_mask"] == pytest.approx(100 * expected["coco/segm_mAP"], abs=0.051)
    assert 20 < scores["AP_box"] < 90
    with np.load(tmp_path / "outcomes.npz") as saved:
        count = saved["bbox_gt"][:, 2].sum()
        assert len(saved["bbox_dt"]) == len(saved["bbox_matched"]) == count
        at_half = (saved["bbox_matched"] & 1).mean()
        assert 100 * at_half == pytest.approx(100 * expected["coco/bbox_mAP_50"], abs=1.0)  # every object is found once at IoU 0.5


def test_nothing_to_train_on_is_said_and_not_divided_by(tmp_path: Path) -> None:
    from evals.openmmlab.samples import InOrder
    from evals.openmmlab.scenes import COCOScenes

    with pytest.raises(JobFailed, match="nothing to train on"):
        InOrder(COCOScenes(make_coco(tmp_path / "coco"), "train2017", CATEGORIES, []), [], 0, False)


@pytest.mark.parametrize("size", [(32, 32), (32, 75), (60, 33)])
def test_windows_are_placed_and_averaged_as_mmseg_does(size: tuple[int, int]) -> None:
    from mmengine.registry import DefaultScope
    from mmseg.models.segmentors import EncoderDecoder

    from evals.openmmlab import upernet
    from evals.openmmlab.ade20k import ADE20K, SMOKE
    from harness.spec import Protocol

    setting = Protocol(name="smoke", family="smoke", summary="", backbones={"tiny": VIT}, backbone="tiny")
    saved = Backbone(VIT, (0.5,) * 3, (0.5,) * 3, ViT(VIT).state_dict())
    with DefaultScope.overwrite_default_scope("mmseg"), torch.no_grad():
        model: Any = upernet.build(saved, SMOKE, ADE20K(channels=8).sizes(VIT, setting), 3).eval()
        images, metas = torch.rand(1, 3, *size), [{"ori_shape": size, "img_shape": size}]
        torch.testing.assert_close(model.slide_inference(images, metas), EncoderDecoder.slide_inference(model, images, metas))
