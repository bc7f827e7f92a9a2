"""`harness export`: timm and transformers load the folder and compute our features; what they cannot hold is refused; the card is the records'."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import timm
import torch
from checkpoints import images, shaken, timm_vit

from harness.checkpoint import Backbone
from harness.spec import UserError, ViTConfig
from harness.vit import ViT
from weights.export import export
from weights.files import files_of
from weights.loading import read

RECORD: dict[str, Any] = {
    "identity": {"plugin": {"class": "methods.mae:MAE", "mask_ratio": 0.75}, "recipe": {"class": "x:Recipe", "lr": 0.1, "sources": [["lr", "Table 8"]]},
                 "vit": {"size": [32, 32], "patch": 8, "width": 48, "depth": 2, "heads": 4}, "data": {"imagenet": "abc"}},
    "about": {"backbone": "vit-x", "protocol": "demo"}, "name": "mae", "key": "0" * 16, "seed": 3, "hardware": {"cpu": "a cpu", "device": "cpu"},
    "flops": 1e12, "images_seen": 6400, "device_hours": 0.5, "precision": "fp32", "packages": {"torch": "2"}, "git": {"commit": None, "dirty": None},
    "start": "2026-01-01T00:00:00", "deviations": ["mae.mask_ratio=0.6 (recipe: 0.75)"], "deviations_found": [],
}
CASES = {
    "plain": ViTConfig((32, 32), 8, 48, 2, 4), "not square": ViTConfig((32, 48), 8, 48, 2, 4, positions="sincos-mae"),
    "layer scale": ViTConfig((32, 32), 8, 48, 2, 4, layer_scale=0.1, key_bias=False),
    "shared": ViTConfig((32, 32), 8, 48, 2, 4, relative_bias="shared", layer_scale=0.1, key_bias=False),
    "block": ViTConfig((32, 32), 8, 48, 2, 4, relative_bias="block", key_bias=False),
    "block, not square": ViTConfig((32, 48), 8, 48, 2, 4, relative_bias="block", key_bias=False),
    "shared alone": ViTConfig((32, 32), 8, 48, 2, 4, positions="none", relative_bias="shared", layer_scale=0.1, key_bias=False),
    "block alone": ViTConfig((32, 32), 8, 48, 2, 4, positions="none", relative_bias="block", key_bias=False),
}
PAIRS = [(case, target) for case in CASES for target in ("timm", "hf") if (case, target) != ("block, not square", "hf")]


def made(folder: Path, config: ViTConfig) -> ViT:
    """A ViT in the folder of a run, its k bias zero where the config says so."""
    vit = shaken(ViT(config))
    if not config.key_bias:
        with torch.no_grad():
            for block in vit.blocks:
                block.attn.qkv.bias[config.width : 2 * config.width] = 0
    Backbone(config, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), vit.state_dict()).save(folder / "checkpoint" / "backbone.pt")
    return vit


@torch.no_grad()
@pytest.mark.parametrize("case,target", PAIRS)
def test_the_target_computes_our_features(case: str, target: str, tmp_path: Path) -> None:
    config = CASES[case]
    vit, out = made(tmp_path / "run", config), tmp_path / "out"
    export(tmp_path / "run", RECORD, [], target, out)
    x = torch.randn(2, 3, *config.size, generator=torch.Generator().manual_seed(1))
    if target == "timm":
        model: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        theirs, kind = model.forward_features(x), "Beit" if config.relative_bias != "none" else "VisionTransformer"
        assert tuple(model.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    else:
        import transformers

        kind = "ViTModel" if case in ("plain", "not square") else "BeitModel"
        model, report = getattr(transformers, kind).from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        theirs = model.eval()(x).last_hidden_state
        assert tuple(transformers.AutoImageProcessor.from_pretrained(out).image_mean) == (0.1, 0.2, 0.3)
    assert type(model).__name__ == kind
    torch.testing.assert_close(theirs, vit.tokens(x), atol=2e-5, rtol=1e-5)
    again = read(files_of(out))  # and what goes out comes in
    assert again.mean == (0.1, 0.2, 0.3) and set(again.state) == set(vit.state_dict())
    assert all(torch.equal(again.state[k], v) for k, v in vit.state_dict().items())
    assert (again.config.positions == "none") == (config.positions == "none") == case.endswith("alone")


@torch.no_grad()
def test_a_vit_without_any_positions_is_one_in_timm_too(tmp_path: Path) -> None:
    vit = made(tmp_path / "run", dataclasses.replace(CASES["plain"], positions="none"))
    export(tmp_path / "run", RECORD, [], "timm", tmp_path / "out")
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(model.forward_features(images()), vit.tokens(images()), atol=2e-5, rtol=1e-5)
    with pytest.raises(UserError, match="missing pos_embed"):  # a file that lacks its table must not be taken for one that needs none
        read(files_of(tmp_path / "out"))


def test_what_a_target_cannot_hold_is_refused(tmp_path: Path) -> None:
    for case, target, key_bias, says in (
        ("shared", "timm", True, "relative bias and a k bias"), ("shared", "hf", True, "relative bias and a k bias"),
        ("layer scale", "hf", True, "LayerScale and a k bias"), ("block, not square", "hf", False, "32x48 pixels"),
        ("block alone", "timm", True, "relative bias and a k bias"), ("without any positions", "hf", True, "no positions"),
    ):
        folder = tmp_path / case / target
        made(folder, dataclasses.replace(CASES.get(case, dataclasses.replace(CASES["plain"], positions="none")), key_bias=key_bias))
        with pytest.raises(UserError, match=says):
            export(folder, RECORD, [], target, folder / "out")
        assert not (folder / "out").exists()


def test_the_card_says_what_the_records_say(tmp_path: Path) -> None:
    made(tmp_path / "run", CASES["plain"])
    about = {"eval": "linear", "eval_seed": 1, "data": "generated data", "protocol": "demo", "caption": "not comparable"}
    export(tmp_path / "run", RECORD, [{"about": about, "metrics": {"top-1": 61.234}, "deviations": []}], "hf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("| mask_ratio | 0.75 |", "| lr | 0.1 |", "| source of lr | Table 8 |", "| imagenet | abc |", "| images seen | 6,400 |",
                 "| device-hours | 0.5 |", "| linear | top-1 | 61.23 | generated data | demo | 1 | none |",
                 "- mae.mask_ratio=0.6 (recipe: 0.75)", "not comparable."):
        assert line in card.split("\n"), line


def test_the_command(harness: Callable[..., CompletedProcess[str]], smoke_data: Path, tmp_path: Path) -> None:
    """From a run to a folder that timm loads, by the beginning of the key; wrong words are one line and exit 2."""
    model = timm_vit(img_size=64, embed_dim=96, depth=4, num_heads=3)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    line = ("run", "--methods", "weights:vit.pth", "--evals", "linear", "--protocol", "smoke", "--data", str(smoke_data))
    done = harness(*line, "--set", "linear.recipe.epochs=1")
    assert done.returncode == 0, done.stderr
    run, scored = (next((tmp_path / "runs").glob(f"{kind}-*")).name for kind in ("pretrain", "evaluate"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for words, says in (((run, "--out", "full"), "not empty"), (("0f0f0f0f", "--out", "new"), "no such run"), ((scored, "--out", "new"), f"export {run}")):
        wrong = harness("export", *words, "--to", "timm")
        assert wrong.returncode == 2 and says in wrong.stderr and wrong.stderr.count("\n") == 1, wrong.stderr
    done = harness("export", run.rsplit("-", 1)[-1][:8], "--to", "timm", "--out", "new")
    assert done.returncode == 0 and "local-dir:new" in done.stdout, done.stderr
    loaded = timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.forward_features(images(64)), model.forward_features(images(64)), atol=2e-5, rtol=1e-5)
    score = json.loads((tmp_path / "runs" / scored / "record.json").read_text())["metrics"]["top-1"]
    assert f"| linear | top-1 | {score:.2f} |" in (tmp_path / "new" / "README.md").read_text()
