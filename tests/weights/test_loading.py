"""Checkpoints in: every style gives the features of the model that it came from, and nothing but exact checkpoints is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import arguments, images, mm_keys, recorded, timm_beit, timm_vit, transformer
from known_answers import cases, golden
from torch import Tensor

from harness.spec import IMAGENET_MEAN, UserError, ViTConfig
from harness.vit import ViT
from weights.files import files_of
from weights.loading import Loaded, read
from weights.method import Weights


def vit_of(loaded: Loaded, heads: int | None = None) -> ViT:
    """Our ViT with the weights, strictly."""
    vit = ViT(loaded.config if heads is None else dataclasses.replace(loaded.config, heads=heads))
    vit.load_state_dict(dict(loaded.state), strict=True)
    return vit.eval()


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "layer scale", "mean pooling with head"])
@pytest.mark.parametrize("names", ["timm", "mmpretrain"])
def test_timm_and_mmpretrain_vits(kind: str, names: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"plain": {}, "layer scale": {"init_values": 0.1}, "mean pooling with head": {"num_classes": 7, "global_pool": "avg"}}[kind]
    model = timm_vit(**changes)
    state = model.state_dict()
    torch.save({"meta": {}, "state_dict": mm_keys(state)} if names == "mmpretrain" else state, tmp_path / "vit.pth")
    loaded = read(files_of(tmp_path / "vit.pth"))
    vit, x = vit_of(loaded, heads=4), images()
    assert (loaded.config.size, loaded.config.patch, loaded.config.depth, loaded.heads_from) == ((32, 32), 8, 2, "")
    if kind == "mean pooling with head":
        same(vit.run_blocks(vit.place(vit.patches(x)))[-1], model.forward_features(x))  # whose norm is none: fc_norm comes after the pooling
        assert any("mean pooling" in n for n in loaded.notes) and loaded.left_out
    else:
        same(vit.tokens(x), model.forward_features(x))


@torch.no_grad()
@pytest.mark.parametrize("bias", ["shared", "block", "none"])
@pytest.mark.parametrize("names", ["timm", "mmpretrain"])
def test_timm_and_mmpretrain_beits(names: str, bias: str, tmp_path: Path) -> None:
    model = timm_beit(use_shared_rel_pos_bias=bias == "shared", use_rel_pos_bias=bias == "block", use_abs_pos_emb=bias != "shared")
    state = model.state_dict()
    index = {"backbone.layers.0.attn.relative_position_index": torch.zeros(17, 17)}  # stored by mmpretrain, computed by us
    torch.save({"state_dict": {**mm_keys(state), **index}} if names == "mmpretrain" else state, tmp_path / "beit.pth")
    loaded = read(files_of(tmp_path / "beit.pth"))
    assert (loaded.style, loaded.left_out) == (("mmpretrain", tuple(index)) if names == "mmpretrain" else ("beit", ()))
    assert (loaded.config.relative_bias, loaded.config.key_bias, loaded.config.layer_scale is not None) == (bias, False, True)
    assert (loaded.config.positions, "pos_embed" in loaded.state) == (("none", False) if bias == "shared" else ("learned", True))
    same(vit_of(loaded, heads=4).tokens(images()), model.forward_features(images()))


@torch.no_grad()
@pytest.mark.parametrize("kind,changes", [
    ("ViTModel", {}), ("ViTForImageClassification", {}), ("ViTMAEModel", {}), ("ViTMAEForPreTraining", {}),
    ("BeitModel", {"use_shared_relative_position_bias": True}), ("BeitModel", {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}),
    ("BeitForMaskedImageModeling", {"use_shared_relative_position_bias": True, "use_mean_pooling": True}),
    ("BeitForImageClassification", {"use_relative_position_bias": True, "use_mean_pooling": True}),
])
def test_hugging_face_folders(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model: Any = transformer(kind, **changes)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    loaded = read(files_of(tmp_path))
    assert (loaded.mean, loaded.std, loaded.config.heads, loaded.heads_from != "") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 4, True)
    x, vit = images(), vit_of(loaded)
    ours = vit.tokens(x)
    body = model.base_model
    if kind.startswith("ViTMAE"):
        same(ours, body(x, noise=torch.arange(16).float().expand(2, -1)).last_hidden_state)  # nothing masked, patches in their order
        assert loaded.config.positions == "sincos-mae"
    elif kind == "BeitForMaskedImageModeling":
        same(ours, model.layernorm(body(x).last_hidden_state))
    elif kind == "BeitForImageClassification":
        same(vit.run_blocks(vit.place(vit.patches(x)))[-1], body(x).last_hidden_state)
    else:
        same(ours, body(x).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_with_its_weights_in_pieces(safe: bool, tmp_path: Path) -> None:
    """As large models are saved: every piece is needed, holds what the index says, and lies in the folder."""
    from safetensors.torch import load_file

    model: Any = transformer("ViTModel", hidden_size=48)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    if not safe:  # as older folders have it
        for piece in tmp_path.glob("*.safetensors"):
            torch.save(load_file(piece), piece.with_suffix(".bin"))
            piece.unlink()
        body["weight_map"] = {k: v.replace(".safetensors", ".bin") for k, v in body["weight_map"].items()}
        index.unlink()
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps(body))
    files = files_of(tmp_path)
    assert list(files)[:2] == ["weights-1", "weights-2"] and {"index", "config"} < set(files)
    same(vit_of(read(files)).tokens(images()), model(images()).last_hidden_state)

    def refused(says: str, **weight_map: str) -> None:
        index.write_text(json.dumps({"weight_map": {**body["weight_map"], **{k.replace("__", "."): v for k, v in weight_map.items()}}}))
        with pytest.raises(UserError, match=says) as caught:
            read(files_of(tmp_path))
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)

    other = next(name for name in sorted(body["weight_map"].values()) if name != body["weight_map"]["layernorm.weight"])
    refused("its tensors are not those that .* says: layernorm.weight", layernorm__weight=other)
    refused("a file outside the folder", layernorm__weight="../other.safetensors")
    files["weights-2"].rename(tmp_path / "elsewhere")
    refused(f"no {files['weights-2'].name} in it, of the")
    index.write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        files_of(tmp_path)


@torch.no_grad()
def test_official_mae_pretraining(tmp_path: Path) -> None:
    """Keys as in MAE's release, with decoder and `args`: the visible patches' latent is the recorded one."""
    arrays = golden("mae_pretrain")
    torch.save({"model": recorded(arrays), "epoch": 799, "args": arguments(model="mae_vit_base_patch16")}, tmp_path / "mae.pth")
    loaded = read(files_of(tmp_path / "mae.pth"), arrays["imgs"].shape[2:])
    assert (loaded.style, loaded.config.positions, loaded.mean) == ("mae-pretrain", "sincos-mae", IMAGENET_MEAN)
    assert "mask_token" in loaded.left_out and any(k.startswith("decoder_blocks.") for k in loaded.left_out)
    vit = vit_of(loaded, heads=int(arrays["config/heads"]))
    keep = torch.from_numpy(arrays["noise"]).argsort(dim=1)[:, : int(arrays["len_keep"])]
    x = torch.from_numpy(arrays["imgs"])
    same(vit.encode(vit.place(vit.patches(x, keep), keep), keep), torch.from_numpy(arrays["latent"]))


FILES = {name: golden(name) for name in ("mae_finetune", "beit_finetune", "beit_pretrain")}
RUNS = [(name, run) for name, arrays in FILES.items() for run in cases(arrays, holds="state_names")]


@torch.no_grad()
@pytest.mark.parametrize("name,run", [r for r in RUNS if r[0] != "beit_pretrain"])
def test_official_fine_tuned(name: str, run: str, tmp_path: Path) -> None:
    """With class token and final norm, or with mean pooling and fc_norm, per-block or shared bias: the recorded logits."""
    arrays = FILES[name]
    whole, names = recorded(arrays), [str(n) for n in arrays[f"{run}/state_names"]]
    state = {n: whole[n if n in whole else f"fc_{n}"] for n in names}  # MAE's class-token model has the same numbers as norm
    torch.save({"model": state}, tmp_path / "file.pth")
    loaded = read(files_of(tmp_path / "file.pth"), arrays["images"].shape[2:])
    vit = vit_of(loaded, heads=int(arrays["config/heads"]))
    tokens = vit.run_blocks(vit.place(vit.patches(torch.from_numpy(arrays["images"]))))[-1]
    if "fc_norm.weight" in state:
        pooled = torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), tokens.shape[-1:], state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    else:
        pooled = vit.norm(tokens)[:, 0]
    same(pooled @ state["head.weight"].T + state["head.bias"], torch.from_numpy(arrays[f"{run}/logits"]))
    assert {"head.weight", "head.bias"} <= set(loaded.left_out)
    if name == "beit_finetune":
        assert loaded.mean == (0.5, 0.5, 0.5) and any("mean and std" in n for n in loaded.notes)


@torch.no_grad()
@pytest.mark.parametrize("run", [run for name, run in RUNS if name == "beit_pretrain"])
def test_official_beit_pretraining(run: str, tmp_path: Path) -> None:
    """Shared relative bias, LayerScale, q and v bias: the recorded logits of all patches."""
    arrays = FILES["beit_pretrain"]
    state = recorded(arrays, f"{run}/state_names")
    torch.save({"model": state, "args": arguments(model="beit_base_patch16_224_8k_vocab", imagenet_default_mean_and_std=True)}, tmp_path / "beit.pth")
    loaded = read(files_of(tmp_path / "beit.pth"), arrays["images"].shape[2:])
    bias = "shared" if any(k.startswith("rel_pos_bias") for k in state) else "none"
    assert (loaded.style, loaded.config.relative_bias, loaded.mean) == ("beit", bias, IMAGENET_MEAN)
    vit = vit_of(loaded, heads=int(arrays["config/heads"]))
    x = vit.patches(torch.from_numpy(arrays["images"]))
    x = torch.where(torch.from_numpy(arrays["bool_masked_pos"]).bool().flatten(1)[:, :, None], state["mask_token"], x)
    logits = vit.encode(vit.place(x))[:, 1:] @ state["lm_head.weight"].T + state["lm_head.bias"]
    same(logits, torch.from_numpy(arrays[f"{run}/logits_all"]))


@torch.no_grad()
@pytest.mark.parametrize("style", ["mae", "beit"])
def test_a_grid_that_is_no_square_is_read_when_its_size_is_told(style: str, tmp_path: Path) -> None:
    """2 x 4 patches have as many positions as 4 x 2: a guess would mix the rows up, so without the size the file is refused."""
    model = timm_vit(img_size=(16, 32)) if style == "mae" else timm_beit(img_size=(16, 32), use_rel_pos_bias=True)
    torch.save({"model": model.state_dict()}, tmp_path / "wide.pth")
    with pytest.raises(UserError, match="no grid of patches with a class token fits"):
        read(files_of(tmp_path / "wide.pth"))
    loaded = read(files_of(tmp_path / "wide.pth"), (16, 32))
    wide = images()[:, :, :16]
    same(vit_of(loaded, heads=4).tokens(wide), model.forward_features(wide))
    with pytest.raises(UserError, match="no grid of patches"):
        read(files_of(tmp_path / "wide.pth"), (16, 16))


def test_published_sizes_tell_the_heads(tmp_path: Path) -> None:
    """MAE's releases have no config: their number of heads is that of the published ViT of this width."""
    state = timm_vit(embed_dim=384, num_heads=6, depth=1).state_dict()
    torch.save({"model": state}, tmp_path / "deit.pth")
    assert (lambda c: (c.config.heads, c.heads_from))(read(files_of(tmp_path / "deit.pth"))) == (6, "published size")


def test_where_two_published_models_share_a_width_the_heads_are_told_and_can_be_set(tmp_path: Path) -> None:
    """DeiT's ViT-S has 6 heads, MoCo v3's 12, and no tensor shows it: read with the wrong number, the features are noise."""
    torch.save({"model": timm_vit(embed_dim=384, num_heads=12, depth=1).state_dict()}, tmp_path / "moco.pth")
    method, small = Weights.from_argument(str(tmp_path / "moco.pth")), ViTConfig((32, 32), 8, 384, 1, 12)
    assert "number of heads not in the file: 6, as DeiT's and DINO's ViT-S; MoCo v3's has 12" in method.notes(small)
    chosen = dataclasses.replace(method, heads=12)
    assert chosen.fitted(chosen.loaded(), small).heads == 12 and not any("heads" in note for note in chosen.notes(small))


def wrong(state: dict[str, Tensor], how: str) -> Any:
    """A damaged or foreign state dict."""
    first = "blocks.1.mlp.fc1.weight"
    changed: dict[str, Any] = {
        "missing": {k: v for k, v in state.items() if k != first}, "unexpected": {**state, "blocks.0.attn.q_norm.weight": torch.ones(3)},
        "shape": {**state, first: state[first][:-1]}, "not finite": {**state, first: state[first] * float("nan")},
        "gap": {k.replace("blocks.1", "blocks.2"): v for k, v in state.items()}, "no cls position": {**state, "pos_embed": state["pos_embed"][:, 1:]},
        "convnet": {"conv1.weight": torch.ones(3), "layer1.0.bn1.weight": torch.ones(3)}, "numbers": {"model": 3, "epoch": 1}, "list": [1, 2],
        "distilled": {**state, "dist_token": torch.ones(1, 1, 48)},
    }
    return changed[how]


@pytest.mark.parametrize("how,says", [
    ("missing", r"missing blocks\.1\.mlp\.fc1\.weight"), ("unexpected", r"blocks\.0\.attn\.q_norm\.weight"),
    ("shape", r"fc1\.weight \(191, 48\) instead of \(192, 48\)"),
    ("not finite", "not finite"), ("gap", r"missing blocks\.1"), ("no cls position", "15 positions"), ("convnet", "no ViT of a known kind"),
    ("numbers", "no tensor"), ("list", "a list"), ("distilled", "15 positions"),  # a second token without a position
])
def test_anything_but_an_exact_checkpoint_is_refused(how: str, says: str, tmp_path: Path) -> None:
    torch.save(wrong(dict(timm_vit().state_dict()), how), tmp_path / "bad.pth")
    with pytest.raises(UserError, match=says) as caught:
        read(files_of(tmp_path / "bad.pth"))
    assert str(tmp_path / "bad.pth") in str(caught.value) and "\n" not in str(caught.value)


def test_other_configurations_are_refused(tmp_path: Path) -> None:
    """The same keys can compute something else."""
    transformer("ViTModel").save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    for change, says in (({"hidden_act": "quick_gelu"}, "quick_gelu"), ({"layer_norm_eps": 1e-5}, "eps"), ({"model_type": "dinov2"}, "dinov2"),
                         ({"image_size": 64}, "16 positions")):
        (tmp_path / "config.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(UserError, match=says):
            read(files_of(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        read(files_of(tmp_path))


def test_our_vit_loads_what_it_says() -> None:
    """`Loaded` names keys as the ViT does: a renamed parameter there must be noticed here."""
    assert {"cls_token", "pos_embed", "relative_bias.0.table"} <= set(ViT(ViTConfig((32, 32), 8, 48, 1, 4, relative_bias="shared")).state_dict())
