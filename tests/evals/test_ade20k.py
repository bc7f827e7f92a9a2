"""The protocols of `ade20k`: what each does to the ViT, what it trains with, how it scores."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_data import make_ade20k
from torch import nn

from evals.openmmlab.ade20k import ADE20K
from evals.openmmlab.ade20k_published import PUBLISHED
from evals.openmmlab.foreign import openmmlab
from harness import plugins
from harness.checkpoint import Backbone
from harness.plugins import EvalContext, Session
from harness.positions import resize_bias
from harness.randomness import seed_all
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Outcome, Protocol, UserError, ViTConfig
from harness.vit import ViT
from protocols.paper import BACKBONES, paper

VIT = ViTConfig(size=(32, 32), patch=8, width=32, depth=4, heads=2)
PLUS = dataclasses.replace(VIT, positions="none", relative_bias="shared", layer_scale=0.1, key_bias=False)
SMOKE = Protocol(name="smoke", family="smoke", summary="", backbones={"tiny": VIT}, backbone="tiny")


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    with openmmlab():
        yield


def checkpoint(config: ViTConfig, **more: Any) -> Backbone:
    """Random weights, none of them at its initial value."""
    seed_all("checkpoint")
    state = {k: v + 0.05 * torch.randn_like(v) for k, v in ViT(config).state_dict().items()}
    return Backbone(config, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), state, **more)


# ------------------------------------------------------------------------------------------------------- the ViT at transfer


def for_crops(saved: Backbone, crop: int = 48, **changed: Any) -> ViT:
    from evals.openmmlab.backbone import for_crops

    return for_crops(saved, crop, 0.0, **({"bias": "kept", "layer_scale": None, "positions": "bicubic"} | changed)).eval()


def test_a_shared_bias_is_copied_into_each_block_on_the_crops_grid() -> None:
    saved = checkpoint(PLUS)
    vit, table = for_crops(saved), resize_bias(saved.state["relative_bias.0.table"], (4, 4), (6, 6))
    assert vit.config.relative_bias == "block" and vit.config.layer_scale == 0.1 and vit.relative_bias is not None
    assert [torch.equal(bias.table, table) for bias in vit.relative_bias] == [True] * 4
    assert len({bias.table.data_ptr() for bias in vit.relative_bias}) == 4  # trained apart


def test_what_mae_adds_starts_as_nothing_and_trains() -> None:
    """A bias that is not zero, or a LayerScale that is not one, would destroy the pre-training before the first step."""
    saved, images = checkpoint(VIT), torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    plain, added = for_crops(saved), for_crops(saved, bias="added", layer_scale=1.0)
    for a, b in zip(plain.features(images, (0, 3)), added.features(images, (0, 3)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    more = set(dict(added.named_parameters())) - set(dict(plain.named_parameters()))
    assert more == {f"relative_bias.{i}.table" for i in range(4)} | {f"blocks.{i}.ls{j}.gamma" for i in range(4) for j in (1, 2)}
    added.features(images, (3,))[0].square().sum().backward()
    assert all(dict(added.named_parameters())[name].grad.abs().max() > 0 for name in more)


def test_a_bias_from_pre_training_is_kept_where_mae_adds_one() -> None:
    assert all(bias.table.any() for bias in for_crops(checkpoint(PLUS), bias="added", layer_scale=1.0).relative_bias or ())
    saved = checkpoint(PLUS)
    assert torch.equal(for_crops(saved, layer_scale=1.0).blocks[0].ls1.gamma, saved.state["blocks.0.ls1.gamma"])


def test_setr_interpolates_positions_linearly() -> None:
    saved = checkpoint(VIT)
    grid = saved.state["pos_embed"][:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(grid, size=(6, 6), mode="bilinear").flatten(2).transpose(1, 2)
    found = for_crops(saved, positions="bilinear").pos_embed.detach()
    torch.testing.assert_close(found[:, 1:], wanted)
    assert torch.equal(found[:, :1], saved.state["pos_embed"][:, :1])
    assert not torch.allclose(found, for_crops(saved).pos_embed)


# ------------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(("name", "size", "lr", "decay", "path", "iterations", "windows"), [
    ("mae-160k", "vit-b16", 1e-4, 0.65, 0.1, 160_000, (512, 341)), ("mae-long-seq", "vit-b16", 8e-5, 0.8, 0.1, 160_000, (512, 341)),
    ("beit", "vit-b16", 7e-4, 0.65, 0.1, 160_000, (512, 341)), ("setr", "vit-b16", 1e-3, 0.65, 0.1, 160_000, (512, 341)),
    ("beit-pt2ft", "vit-b16", 3e-5, 0.9, 0.1, 160_000, (512, 341)), ("beit-pt2ft", "vit-l16", 2e-5, 0.95, 0.2, 160_000, (512, 341)),
    ("beit-640", "vit-b16", 3e-5, 0.9, 0.1, 160_000, (640, 426)), ("beit-640", "vit-l16", 2e-5, 0.95, 0.2, 160_000, (640, 426)),
])
def test_recipes_are_those_of_their_sources(name: str, size: str, lr: float, decay: float, path: float, iterations: int, windows: tuple[int, int]) -> None:
    """facts/recipes.md A9."""
    evaluator = plugins.build("evals", f"ade20k@{name}")
    recipe = evaluator.recipe(paper, BACKBONES[size])
    assert (recipe.lr, recipe.layer_decay, recipe.drop_path, recipe.iterations, recipe.batch, recipe.warmup) == (lr, decay, path, iterations, 16, 1500)
    assert (recipe.weight_decay, recipe.schedule, recipe.poly_power, recipe.min_lr, recipe.clip) == (0.05, "poly", 1.0, 0.0, None)
    assert evaluator.windows(paper, BACKBONES[size]) == windows


def test_plain_ade20k_is_maes_protocol_with_what_was_never_published_marked() -> None:
    for size in ("vit-b16", "vit-l16", "vit-h14"):
        vit = BACKBONES[size]
        recipe = ADE20K().recipe(paper, vit)
        assert recipe == ADE20K(by="mae").recipe(paper, vit) and recipe is not None and recipe.epochs == 100
        assert round(recipe.epochs * 20_210 / recipe.batch) == 126_312 and round(recipe.warmup * 20_210 / 16) == 1500
        told = " ".join(source for words, source in recipe.sources if "lr" in words.split(", "))
        assert told.startswith("ours") and "never published" in told, size
    assert ADE20K().published(paper) is PUBLISHED["mae"]
    assert ADE20K().notes(paper, BACKBONES["vit-h14"]) == ("crops of 518 pixels: the patch of 14 does not divide 512",)
    assert ADE20K().notes(paper, BACKBONES["vit-b16"]) == ()


def test_sizes_that_no_source_has_get_no_recipe() -> None:
    known = {by: [n for n, v in BACKBONES.items() if ADE20K(by=by).recipe(paper, v) is not None] for by in PUBLISHED}
    assert known == {"mae": ["vit-b16", "vit-l16", "vit-h14"], "mae-160k": ["vit-b16"], "mae-long-seq": ["vit-b16"], "beit": ["vit-b16"],
                     "beit-pt2ft": ["vit-b16", "vit-l16"], "beit-640": ["vit-b16", "vit-l16"], "setr": ["vit-b16"]}


@pytest.mark.parametrize("changed", [{"by": "beits"}, {"crop": 512, "stride": 600}, {"stride": 0}])
def test_settings_that_cannot_be_are_refused_before_anything_runs(changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="did you mean beit" if "by" in changed else "stride must be"):
        ADE20K(**changed).recipe(paper, BACKBONES["vit-b16"])


CONFIGS = {  # mmsegmentation's own file for a protocol and size, as its wheel has it
    ("mae-160k", "vit-b16"): "mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py",
    ("beit-640", "vit-b16"): "beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py",
    ("beit-640", "vit-l16"): "beit/beit-large_upernet_8xb1-amp-160k_ade20k-640x640.py",
    ("setr", "vit-l16"): "setr/setr_vit-l_pup_8xb2-160k_ade20k-512x512.py",  # BEiT's recipe is for ViT-B, SETR's decoder for ViT-L
}


@pytest.mark.parametrize(("name", "size"), CONFIGS)
def test_decoders_crops_windows_and_recipes_are_those_of_mmsegmentations_configurations(name: str, size: str) -> None:
    """A head of another width, or one loss weighed otherwise, trains as well and gives another number."""
    import mmseg
    from mmengine.config import Config

    from evals.openmmlab import setr, upernet

    theirs = Config.fromfile(Path(mmseg.__file__).parent / ".mim" / "configs" / CONFIGS[name, size])
    evaluator, vit = plugins.build("evals", f"ade20k@{name}"), BACKBONES[size]
    sizes, recipe = evaluator.sizes(vit, paper), evaluator.recipe(paper, vit)
    ours = (setr if name == "setr" else upernet).heads(vit.width, sizes, {"num_classes": 150, "align_corners": False})
    for head, reference in zip((ours[0], *always_list(ours[1])), (theirs.model.decode_head, *always_list(theirs.model.auxiliary_head)), strict=True):
        told = {"up_scale": 4, **reference}  # the default of SETRUPHead
        same = {key: value for key, value in head.items() if key not in ("type", "up_scale")} | ({"up_scale": head["up_scale"]} if name == "setr" else {})
        assert {key: value for key, value in same.items() if plain(told[key]) != plain(value)} == {}
    test = theirs.model.test_cfg
    assert (sizes["crop"], sizes["stride"]) == (test.crop_size[0], test.stride[0]) and test.mode == "slide"
    assert sizes["taps"] == tuple(theirs.model.backbone.out_indices)
    steps = {step.type: step for step in theirs.train_dataloader.dataset.pipeline}
    chain = {step["type"]: step for step in upernet.train_pipeline(sizes, 150)}
    for step in ("RandomResize", "RandomCrop", "RandomFlip", "PhotoMetricDistortion"):
        assert {k: plain(v) for k, v in chain[step].items()} == {k: plain(v) for k, v in steps[step].items()}
    if recipe is None:
        return
    wrapper, times = theirs.optim_wrapper, theirs.optim_wrapper.get("accumulative_counts", 1)
    assert (recipe.lr, recipe.weight_decay, recipe.betas) == (wrapper.optimizer.lr, wrapper.optimizer.weight_decay, tuple(wrapper.optimizer.betas))
    assert recipe.layer_decay == wrapper.paramwise_cfg.layer_decay_rate and recipe.drop_path == theirs.model.backbone.drop_path_rate
    warmup, poly = theirs.param_scheduler
    assert recipe.warmup * times == warmup.end and recipe.warmup_lr == pytest.approx(recipe.lr * warmup.start_factor)
    assert (recipe.poly_power, recipe.min_lr, poly.type) == (poly.power, poly.eta_min, "PolyLR")
    assert recipe.batch == 8 * theirs.train_dataloader.batch_size * times  # eight devices


def always_list(heads: Any) -> list[Any]:
    """mmseg takes one auxiliary head or several."""
    return heads if isinstance(heads, list) else [heads]


def plain(value: Any) -> Any:
    """Lists and tuples of a configuration are the same, and a loss's name does not matter."""
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else dict(value) if isinstance(value, dict) else value


@pytest.mark.parametrize("config", [VIT, PLUS])
def test_learning_rates_and_weight_decay_of_each_parameter_are_mmsegs(config: ViTConfig) -> None:
    """num_layers + 2 groups, heads and rescaling steps at the full rate; positions and class token decayed, as in BEiT's segmentation code."""
    from mmseg.engine.optimizers.layer_decay_optimizer_constructor import get_layer_id_for_vit

    from evals.openmmlab.optimizer import Named
    from harness.optim import parameter_groups

    recipe = ADE20K(by="mae-160k").recipe(paper, BACKBONES["vit-b16"])
    assert recipe is not None
    model = segmentor(checkpoint(config), "mae-160k")
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in parameter_groups(Named(model), recipe, 4) for name in group["names"]}
    wanted = {}
    for name, parameter in model.named_parameters():
        ours = name.replace("backbone.vit.", "vit.") if name.startswith("backbone.vit.") else f"dense.{name}"
        theirs = re.sub(r"^backbone\.vit\.(blocks|relative_bias)", "backbone.layers", name).replace("backbone.vit", "backbone")
        plain = parameter.ndim == 1 or name.endswith(".bias")
        wanted[ours] = (0.65 ** (4 + 2 - get_layer_id_for_vit(theirs, 4 + 2) - 1), 0.0 if plain else 0.05)
    assert {n: (pytest.approx(s), d) for n, (s, d) in wanted.items()} == found
    assert found["vit.cls_token"] == (pytest.approx(0.65**5), 0.05) and found["vit.relative_bias.2.table"] == (pytest.approx(0.65**2), 0.05)
    assert found["dense.decode_head.conv_seg.weight"][0] == found["dense.backbone.steps.0.weight"][0] == 1


# ---------------------------------------------------------------------------------------------------------------- batch norm

JOINED = """
import sys, warnings, torch, torch.distributed as dist
from evals.openmmlab.foreign import openmmlab
with openmmlab():
    from evals.openmmlab.backbone import NearBatchNorm
torch.set_num_threads(1)

def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 4, 6), torch.randn(5, 3, 4, 6)
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    norm, own = NearBatchNorm(3).train(), x[part].clone().requires_grad_()
    out = norm(own)
    (out * weight[part]).sum().backward()
    whole, reference = x.clone().requires_grad_(), torch.nn.BatchNorm2d(3).train()
    expected = reference(whole)
    (expected * weight).sum().backward()
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, expected[part], **close)
    torch.testing.assert_close(own.grad, whole.grad[part], **close)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(norm, name), getattr(reference, name), **close)
    one = NearBatchNorm(3).train()(torch.full((1, 3, 1, 1), float(rank)))
    torch.testing.assert_close(one, torch.full((1, 3, 1, 1), 2.0 * rank - 1), rtol=1e-3, atol=1e-3)  # mean 1/2, deviation 1/2
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(process, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_batch_norm_of_two_processes_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    """Two images on each of eight devices must not be eight batch norms over two images: the recipes have SyncBN."""
    (tmp_path / "joined.py").write_text(JOINED)
    done = subprocess.run([sys.executable, str(tmp_path / "joined.py"), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------------- scoring


def test_miou_is_mmsegs_to_the_last_digit(tmp_path: Path) -> None:
    """150 classes, some of which never occur, labels to ignore, two kinds of prediction."""
    from mmseg.evaluation import IoUMetric

    from evals.openmmlab.mean_iou import MeanIoU

    rng, classes = np.random.default_rng(1), tuple(map(str, range(150)))
    metric, theirs = MeanIoU(tmp_path / "outcomes.npz", ["mIoU", "mIoU_ms"]), {"pred_sem_seg": [], "pred_ms": []}
    metric.dataset_meta = {"classes": classes}
    for i in range(6):
        truth = torch.from_numpy(rng.integers(0, 140, (1, 20 + i, 30)))
        truth[torch.from_numpy(rng.random(truth.shape) < 0.2)] = 255
        sample: dict[str, Any] = {"img_path": f"{i}.jpg", "gt_sem_seg": {"data": truth}}
        for name, areas in theirs.items():
            right = torch.from_numpy(rng.random(truth.shape) < 0.5)
            predicted = torch.where(right & (truth != 255), truth, torch.from_numpy(rng.integers(0, 145, truth.shape)))
            sample[name] = {"data": predicted}
            areas.append(IoUMetric.intersect_and_union(predicted[0], truth[0], 150, 255))
        metric.process({}, [sample])
    scores = metric.evaluate(6)
    for score, areas in zip(("mIoU", "mIoU_ms"), theirs.values(), strict=True):
        sums = [sum(a) for a in zip(*areas, strict=True)]
        expected = IoUMetric.total_area_to_metrics(*sums, ["mIoU"])["IoU"]
        assert scores[score] == pytest.approx(100 * float(np.nanmean(expected)), abs=1e-5) and 20 < scores[score] < 60
    with np.load(tmp_path / "outcomes.npz") as saved:
        assert saved["count"].sum() == saved["ms_count"].sum() == sum(int(a[3].sum()) for a in theirs["pred_ms"])


def segmentor(saved: Backbone, by: str = "beit") -> Any:
    from mmengine.registry import DefaultScope

    from evals.openmmlab import upernet

    evaluator = ADE20K(by=by, channels=8)
    recipe = evaluator.recipe(SMOKE, saved.config)
    assert recipe is not None
    with DefaultScope.overwrite_default_scope("mmseg"):
        return upernet.build(saved, recipe, evaluator.sizes(saved.config, SMOKE), 3).eval()


@torch.no_grad()
def test_views_are_six_scales_with_short_sides_of_at_least_the_crop_and_their_mirror_images() -> None:
    """What SETR's resize for several scales does in BEiT's test, written out: small ratios end at the crop and count all the same."""
    import cv2
    from mmseg.structures import SegDataSample

    from evals.openmmlab.views import Views, predict_from_views

    model, (height, width) = segmentor(checkpoint(VIT)), (50, 37)
    image = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    total, shorts = torch.zeros(3, height, width), []
    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        short = max(32, int(32 * ratio))
        shorts.append(short)
        view = cv2.resize(image, (short, int(short * height / width + 0.5)))
        pixels = (torch.from_numpy(view[:, :, ::-1].copy()).permute(2, 0, 1).float() - 127.5) / 63.75
        for mirrored in (False, True):
            logits = model.slide_inference(pixels.flip(2)[None] if mirrored else pixels[None], [{}])
            logits = nn.functional.interpolate(logits, size=(height, width), mode="bilinear")
            total += (logits.flip(3) if mirrored else logits)[0].softmax(0) / 12
    sample = SegDataSample(metainfo={"ori_shape": (height, width), **Views(32, 32).transform({"img": image})})
    assert shorts == [32, 32, 32, 40, 48, 56] and sorted((min(i.shape[:2]), n) for i, n in sample.views) == [(32, 3), (40, 1), (48, 1), (56, 1)]
    model.test_cfg.crop_size = (32, 32)
    predict_from_views(model, sample)
    assert (sample.pred_ms.data[0] == total.argmax(0)).float().mean() > 0.999


# ----------------------------------------------------------------------------------------------------------------- as a whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ade20k(tmp_path_factory.mktemp("ade") / "set", 4, 3)


@pytest.mark.parametrize(("by", "config"), [("mae-160k", VIT), ("beit", PLUS), ("setr", VIT), ("setr", dataclasses.replace(PLUS, relative_bias="block"))])
def test_each_protocol_trains_and_scores_any_vit(by: str, config: ViTConfig, folder: Path, tmp_path: Path) -> None:
    evaluator = plugins.build("evals", f"ade20k@{by}")
    evaluator = dataclasses.replace(evaluator, channels=8, crop=48)
    recipe = evaluator.recipe(SMOKE, config)
    assert recipe is not None and evaluator.skip(config) is None
    recipe = dataclasses.replace(recipe, batch=2, iterations=2, warmup=0)
    lent = Session(tmp_path, 5, torch.device("cpu"), torch.float32, {"ade20k": folder})
    outcome: Outcome = evaluator.run(checkpoint(config), EvalContext(lent, SMOKE, recipe))
    assert set(outcome.metrics) == {column.name for column in evaluator.columns} and len(outcome.metrics) == (1 if by == "setr" else 2)
    assert all(0 <= score <= 100 for score in outcome.metrics.values()) and outcome.facts["deviations"] == []


def test_the_table_says_what_was_rounded_and_what_happened(smoke_data: Path) -> None:
    """A patch of 14 divides neither 512 nor 640; SETR's values are known for ViT-B only, which is said before anything runs."""
    from harness.plan import Planner
    from harness.request import Request

    def plan(name: str) -> Any:
        return Planner(Request(("mae",), (name,), protocol="paper", backbone="vit-h14", data=str(smoke_data))).plan()

    (cell,) = plan("ade20k").cells
    assert "crops of 518 pixels: the patch of 14 does not divide 512" in cell.about["deviations"]
    with pytest.raises(UserError, match=r"ade20k@setr on .* has no recipe .* there is one for vit-b16; variants that have one here: ade20k@mae$"):
        plan("ade20k@setr")
    saved, evaluator = checkpoint(VIT), ADE20K(by="beit")
    assert evaluator.deviations(saved, paper, 0) == ["normalised as in pre-training, BEiT's segmentation code always with ImageNet's mean and std"]
    assert evaluator.deviations(dataclasses.replace(saved, mean=IMAGENET_MEAN, std=IMAGENET_STD), paper, 0) == []


def test_deviations_found_while_running_are_in_the_record(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from harness.provenance import Usage, make_record

    session = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, skipped_images={"a.jpg": "cannot be read"})
    job = {"kind": "evaluate", "name": "x", "key": "k", "identity": {"seed": 0, "version": 2}, "about": {}, "parents": {}}
    parts = {"metrics": {}, "outcomes": None, "facts": {"deviations": ["one image at a time"]}}
    record = make_record(job, session, {"threads": 1, "gemm": "highest"}, Usage(tmp_path), parts)
    assert record["deviations_found"] == ["1 unreadable images skipped", "one image at a time"]
