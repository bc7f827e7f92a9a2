"""A fine-tuned file's own classifier: restored exactly from each kind of file, scored on ImageNet without training, refused where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import images, mm_keys, recorded, timm_beit, timm_vit, transformer
from known_answers import cases, golden
from PIL import Image
from torch import Tensor, nn

from harness.augment import EvalTransform
from harness.classifier import Classifier
from harness.cli import main
from harness.data import load_rgb
from harness.plan import Planner
from harness.request import Request
from harness.spec import IMAGENET_MEAN, IMAGENET_STD
from harness.vit import ViT
from weights.files import files_of
from weights.loading import read

SMOKE = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}  # the smoke protocol's backbone
SYNSETS = ("n01440764", "n01443537", "n15075141")  # the first, the second and the last of ImageNet's thousand


def logits(path: Path, x: Tensor, heads: int = 4) -> Tensor:
    """Class scores of the classifier in a file, of images that are normalised already."""
    import dataclasses

    loaded = read(files_of(path), tuple(x.shape[2:]))
    assert loaded.classifier is not None
    vit = ViT(dataclasses.replace(loaded.config, heads=heads))
    vit.load_state_dict(dict(loaded.state))
    classes = [str(i) for i in range(len(loaded.classifier["state"]["head.bias"]))]
    return Classifier.restore(vit, {**loaded.classifier, "classes": classes}, (0, 0, 0), (1 / 255,) * 3).eval().logits(x)


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_originals_classifiers_give_the_recorded_scores(tmp_path: Path) -> None:
    for name in ("mae_finetune", "beit_finetune"):
        arrays = golden(name)
        for run in cases(arrays, holds="state_names"):
            whole, names = recorded(arrays), [str(n) for n in arrays[f"{run}/state_names"]]
            torch.save({"model": {n: whole[n if n in whole else f"fc_{n}"] for n in names}}, tmp_path / "file.pth")
            same(logits(tmp_path / "file.pth", torch.from_numpy(arrays["images"]), int(arrays["config/heads"])), torch.from_numpy(arrays[f"{run}/logits"]))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_classifiers_of_timm_mmpretrain_and_transformers(pooling: str, tmp_path: Path) -> None:
    x, made = images(), {"num_classes": 7, "global_pool": pooling}
    vit, beit = timm_vit(**made), timm_beit(**made, use_rel_pos_bias=True)
    for number, (model, state) in enumerate(((vit, vit.state_dict()), (beit, beit.state_dict()), (vit, mm_keys(vit.state_dict())))):
        torch.save({"state_dict": state}, tmp_path / f"{number}.pth")
        same(logits(tmp_path / f"{number}.pth", x), model(x))
    kind = "ViTForImageClassification" if pooling == "token" else "BeitForImageClassification"
    theirs: nn.Module = transformer(kind, num_labels=7, **({"use_mean_pooling": True, "use_relative_position_bias": True} if pooling == "avg" else {}))
    theirs.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    same(logits(tmp_path / "hf", x), theirs(x).logits)


def test_what_ours_cannot_read_out_is_no_classifier(tmp_path: Path) -> None:
    """None at all, without a bias, of another width, or with a pooling that the configuration beside it has otherwise."""
    state = timm_vit(num_classes=7).state_dict()
    for name, wrong in (("none", timm_vit().state_dict()), ("no bias", {k: v for k, v in state.items() if k != "head.bias"}),
                        ("width", {**state, "head.weight": torch.ones(7, 50)})):
        torch.save(wrong, tmp_path / f"{name}.pth")
        assert read(files_of(tmp_path / f"{name}.pth")).classifier is None
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}
    for pool, norm, found in (("token", None, True), ("avg", False, False)):  # avg without fc_norm: the mean of normed tokens, with the very same keys
        folder = tmp_path / pool
        folder.mkdir()
        torch.save(timm_vit(num_classes=7, global_pool=pool, fc_norm=norm).state_dict(), folder / "pytorch_model.bin")
        body = {"architecture": "vit_base_patch16_224", "model_args": {**arguments, "global_pool": pool, "fc_norm": norm}}
        (folder / "config.json").write_text(json.dumps(body))
        assert (read(files_of(folder)).classifier is not None) == found


def pictures(root: Path) -> Path:
    """Noise of different colours in ImageNet's layout, under three of its synsets."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 1), ("val", 6)):
        for name in SYNSETS:
            (root / "imagenet" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(rng.uniform(0, 255, 3), 40, (80, 72, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / "imagenet" / split / name / f"{i}.png")
    (root / "imagenet-a").symlink_to(root / "imagenet" / "val")
    return root


def test_a_files_own_classifier_is_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole line, jobs and all: its score is that of the model which the file came from, nothing is trained, and what has no classifier is skipped."""
    model = timm_vit(**SMOKE, num_classes=1000)
    torch.save({"model": model.state_dict()}, tmp_path / "tuned.pth")
    torch.save({"model": timm_vit(**SMOKE).state_dict()}, tmp_path / "bare.pth")
    data, runs = pictures(tmp_path / "data"), tmp_path / "runs"
    names = ",".join(f"weights:{tmp_path / name}.pth" for name in ("tuned", "bare"))
    line = ["run", "--methods", names, "--evals", "head,imagenet-a@head", "--protocol", "smoke", "--data", str(data), "--runs", str(runs)]
    assert main([*line, "--launcher", "debug"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "bare.pth brings no classifier of its own, and head trains none" in text
    records = [json.loads(p.read_text()) for p in runs.glob("evaluate-*/record.json")]
    right = []
    for label, name in enumerate(SYNSETS):
        for file in sorted((data / "imagenet" / "val" / name).iterdir()):
            x = EvalTransform((64, 64), 0.875)(load_rgb(file))["image"][None] / 255
            x = (x - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
            with torch.no_grad():
                right.append(int(model(x)[0, [0, 1, 999]].argmax()) == label)
    assert 0 < sum(right) < len(right)
    assert sorted(r["about"]["eval"] for r in records) == ["head", "imagenet-a@head"]
    assert all(r["metrics"]["top-1"] == pytest.approx(100 * np.mean(right)) and r["facts"]["images_seen"] == 0 for r in records)
    assert all(r["facts"]["scored_images"] == 18 and r["facts"]["model"] == "the checkpoint's own" for r in records)


def test_a_size_of_its_own_brings_nothing_over(tmp_path: Path) -> None:
    """A file fine-tuned at a higher resolution is scored at that, when it is asked for."""
    file = tmp_path / "large.pth"
    torch.save(timm_vit(**{**SMOKE, "img_size": 96}, num_classes=1000).state_dict(), file)
    data = pictures(tmp_path / "data")

    def planned(*settings: str) -> Any:
        return Planner(Request((f"weights:{file}",), ("head",), "smoke", data=str(data), settings=settings)).plan().cells[0]

    small, native = planned(), planned(f"weights:{file}.size=96")
    assert any("position tables interpolated from 12x12 to 8x8" in d for d in small.about["deviations"])
    assert native.node.parents["checkpoint"].identity["vit"]["size"] == [96, 96] and not any("interpolated" in d for d in native.about["deviations"])
