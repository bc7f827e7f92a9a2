"""Checkpoints as MoCo v3, DINO and DeiT released them: names and what lies beside the weights as in their files, numbers of the recorded originals."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import COMMON, HEADS, images, shaken, timm_vit
from known_answers import config, golden, section
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from harness.classifier import Classifier
from harness.positions import sincos_positions
from harness.spec import IMAGENET_MEAN, UserError, ViTConfig
from harness.vit import ViT
from weights.architecture import build_timm, from_timm_model
from weights.files import files_of
from weights.loading import Loaded, read
from weights.method import Weights

MOCO, DINO = golden("mocov3_loss"), golden("dino_loss")


def loaded_vit(loaded: Loaded, heads: int) -> ViT:
    vit = ViT(dataclasses.replace(loaded.config, heads=heads))
    vit.load_state_dict(dict(loaded.state), strict=True)
    return vit.eval()


def moco_file(path: Path, **changes: Tensor) -> None:
    """main_moco.py's save_checkpoint: everything below DistributedDataParallel's "module.", the optimiser beside it."""
    state = {f"module.{k[6:]}": torch.from_numpy(v) for k, v in MOCO.items() if k.startswith("state/")}
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": {**state, **changes}, "optimizer": {"state": {}, "param_groups": [{"lr": 0.0}]},
                "scaler": {"scale": 65536.0}}, path)


def test_mocos_checkpoint_is_the_encoder_of_the_queries(tmp_path: Path) -> None:
    """Not the momentum encoder's, whose tensors are there too, and neither head."""
    file = tmp_path / "vit-b-300ep.pth.tar"
    moco_file(file)
    loaded = read(files_of(file), MOCO["x1"].shape[-2:])
    base = {k.removeprefix("state/base_encoder."): v for k, v in MOCO.items() if k.startswith("state/base_encoder.") and ".head." not in k}
    assert {k: v.tolist() for k, v in loaded.state.items()} == {k: v.tolist() for k, v in base.items()}
    assert (loaded.style, loaded.mean, loaded.classifier) == ("mocov3", IMAGENET_MEAN, None) and not loaded.notes
    assert any(k.startswith("momentum_encoder.") for k in loaded.left_out) and any(k.startswith("predictor.") for k in loaded.left_out)
    with torch.no_grad():
        q = loaded_vit(loaded, config(MOCO, "heads"))(torch.from_numpy(MOCO["x1"]))
        for i in (0, 3, 6):  # the original's projector and predictor on our features give the recorded queries
            q = norm(q @ torch.from_numpy(MOCO[f"state/base_encoder.head.{i}.weight"]).T, f"state/base_encoder.head.{i + 1}", relu=i < 6)
        for i in (0, 3):
            q = norm(q @ torch.from_numpy(MOCO[f"state/predictor.{i}.weight"]).T, f"state/predictor.{i + 1}", relu=i < 3)
    np.testing.assert_allclose(q.numpy(), MOCO["model/q1"], rtol=0, atol=1e-4)


def norm(x: Tensor, name: str, relu: bool) -> Tensor:
    """Batch norm with the batch's statistics, as in training."""
    weight, bias = (torch.from_numpy(MOCO[f"{name}.{k}"]) if f"{name}.{k}" in MOCO else None for k in ("weight", "bias"))
    x = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    return x.relu() if relu else x


def test_mocos_small_vit_has_twelve_heads_and_its_positions_are_known(tmp_path: Path) -> None:
    """As a DeiT-S it would give noise, and a position table taken for learned would be trained."""
    state = {f"module.base_encoder.{k}": v for k, v in timm_vit(embed_dim=384, num_heads=12, depth=1).state_dict().items()}
    state["module.base_encoder.pos_embed"] = sincos_positions(384, (4, 4), "sincos-moco")
    torch.save({"state_dict": state, "arch": "vit_small"}, tmp_path / "vit-s-300ep.pth.tar")
    loaded = read(files_of(tmp_path / "vit-s-300ep.pth.tar"))
    assert (loaded.config.heads, loaded.heads_from, loaded.config.positions) == (12, "MoCo v3's ViT-S", "sincos-moco")
    method, small = Weights.from_argument(str(tmp_path / "vit-s-300ep.pth.tar")), ViTConfig(size=(64, 64), width=384, depth=1, heads=6)
    lent = method.architecture(small, published=True)
    assert (lent.heads, lent.positions) == (12, "sincos-moco") and method.skip(dataclasses.replace(lent, patch=8, size=(32, 32))) is None
    with pytest.raises(UserError, match="heads 12, the backbone has 6"):  # one ViT for all: another number of heads is another ViT
        method.skip(dataclasses.replace(method.architecture(small, published=False), patch=8, size=(32, 32)))


def test_mocos_small_vit_is_known_by_its_positions_where_nothing_else_tells(tmp_path: Path) -> None:
    """linear-vit-s-300ep.pth.tar of main_lincls.py and what convert_to_deit.py writes have a plain ViT's names: with six heads they would give noise."""
    state = timm_vit(embed_dim=384, num_heads=12, depth=1, num_classes=7).state_dict()
    told = {"sincos-moco": (12, "MoCo v3's ViT-S"), "sincos-mae": (6, "published size")}
    for layout, expected in told.items():
        state["pos_embed"] = sincos_positions(384, (4, 4), layout)
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "arch": "vit_small", "best_acc1": 73.2}, tmp_path / f"{layout}.pth.tar")
        loaded = read(files_of(tmp_path / f"{layout}.pth.tar"))
        assert (loaded.style, loaded.config.positions, (loaded.config.heads, loaded.heads_from)) == ("vit", layout, expected)
        assert loaded.classifier is not None


def test_dinos_full_checkpoint_is_the_teacher(tmp_path: Path) -> None:
    """main_dino.py's checkpoint.pth holds both; the released backbone alone is the teacher's."""
    student, teacher = section(DINO, "student"), section(DINO, "teacher")
    torch.save({"student": {f"module.{k}": v for k, v in student.items()}, "teacher": teacher, "epoch": 400, "optimizer": {"state": {}},
                "args": Namespace(arch="vit_base", patch_size=16, lr=7.5e-4), "dino_loss": {"center": torch.zeros(1, 20)}}, tmp_path / "full.pth")
    backbone = {k.removeprefix("backbone."): v for k, v in teacher.items() if k.startswith("backbone.")}
    torch.save(backbone, tmp_path / "dino_vitbase16_pretrain.pth")
    full, alone = (read(files_of(tmp_path / name), DINO["crops/0"].shape[-2:]) for name in ("full.pth", "dino_vitbase16_pretrain.pth"))
    assert (full.style, full.mean, full.notes, alone.style) == ("dino", IMAGENET_MEAN, (), "vit")
    for loaded in (full, alone):
        assert set(loaded.state) == set(backbone) and all(torch.equal(loaded.state[k], v) for k, v in backbone.items())
    with torch.no_grad():
        features = loaded_vit(full, config(DINO, "heads"))(torch.from_numpy(DINO["crops/0"]))
        x = features
        for i in (0, 2, 4):
            x = x @ teacher[f"head.mlp.{i}.weight"].T + teacher[f"head.mlp.{i}.bias"]
            x = torch.nn.functional.gelu(x) if i < 4 else torch.nn.functional.normalize(x, dim=1)
        x = x @ torch.nn.functional.normalize(teacher["head.last_layer.weight_v"], dim=1).T
    np.testing.assert_allclose(x.numpy(), DINO["teacher_output"][: len(x)], rtol=1e-5, atol=2e-5)


def test_deits_checkpoint_brings_its_classifier(tmp_path: Path) -> None:
    """deit_base_patch16_224-b5f2ef4d.pth: {"model": ...} with a head."""
    model = timm_vit(num_classes=7)
    torch.save({"model": model.state_dict()}, tmp_path / "deit.pth")
    loaded = read(files_of(tmp_path / "deit.pth"))
    assert loaded.classifier is not None and loaded.classifier["pooling"] == "cls"
    with torch.no_grad():
        scores = loaded_vit(loaded, HEADS)(images()) @ loaded.classifier["state"]["head.weight"].T + loaded.classifier["state"]["head.bias"]
        torch.testing.assert_close(scores, model(images()), atol=2e-5, rtol=1e-5)


def test_deits_distilled_checkpoint_scores_with_both_heads(tmp_path: Path) -> None:
    """deit_base_distilled_patch16_224-df68dfff.pth: its classifier gets the second token, the ViT alone goes on without it and says so."""
    model: Any = shaken(VisionTransformerDistilled(**{**COMMON, "num_classes": 7}))
    torch.save({"model": model.state_dict()}, tmp_path / "distilled.pth")
    loaded = read(files_of(tmp_path / "distilled.pth"))
    assert "dist_token" in loaded.left_out and any("distillation token left out" in n for n in loaded.notes) and loaded.classifier is not None
    readout = Classifier.restore(loaded_vit(loaded, HEADS), {**loaded.classifier, "classes": list("abcdefg")}, loaded.mean, loaded.std).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        model.distilled_training = True  # timm gives both heads then
        both = model.train()(readout.normalize(pixels))
        expected = (both[0].softmax(1) + both[1].softmax(1)) / 2
        torch.testing.assert_close(readout.logits(pixels).exp(), expected, atol=1e-5, rtol=1e-4)
    for change in ({"dist_token": torch.zeros(1, 1, 47)}, {"head_dist.bias": None}):
        damaged = {k: v for k, v in {**model.state_dict(), **change}.items() if v is not None}
        torch.save({"model": damaged}, tmp_path / "damaged.pth")
        with pytest.raises(UserError, match=r"damaged\.pth: dist_token .* no whole distilled ViT"):
            read(files_of(tmp_path / "damaged.pth"))


def test_timms_distilled_vits_are_known_by_name() -> None:
    hints = from_timm_model(build_timm("deit_base_distilled_patch16_224", "-"), {}, "-")
    assert (hints.heads, hints.size, hints.pooling) == (12, (224, 224), "cls")


@pytest.mark.parametrize(("change", "says"), [
    ({"module.base_encoder.blocks.0.attn.q_norm.weight": torch.ones(3)}, "style mocov3 does not have: base_encoder.blocks.0.attn.q_norm.weight"),
    ({"module.base_encoder.norm.weight": torch.full((32,), float("nan"))}, "not finite"), ({"module.queue": torch.ones(3)}, "does not have: queue"),
])
def test_nothing_but_an_exact_checkpoint_is_loaded(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    moco_file(tmp_path / "moco.pth.tar", **change)
    with pytest.raises(UserError, match=says):
        read(files_of(tmp_path / "moco.pth.tar"))
