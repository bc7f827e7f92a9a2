"""`--methods weights:...`: a checkpoint as a row; what it is decides the key, not where it lies; bad input is one line and starts nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from checkpoints import arguments, images, timm_beit, timm_vit, transformer

from harness import plugins
from harness.cli import main
from harness.jobs import ordered
from harness.plan import Planner
from harness.plugins import TrainContext
from harness.request import Request
from harness.spec import JobFailed, UserError, ViTConfig
from harness.vit import ViT, resize_bias, resize_positions
from results.reference.names import AS_READ
from weights.method import Weights, differences, fingerprint

SMOKE = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}  # the smoke protocol's backbone
BACKBONE = ViTConfig((64, 64), 8, 96, 4, 3)
Harness = Callable[..., CompletedProcess[str]]


def saved(path: Path, **changes: Any) -> Any:
    """A timm ViT whose weights are in a file as MAE's code writes it."""
    model = timm_vit(**{**SMOKE, **changes})
    torch.save({"model": model.state_dict(), "args": arguments(model="vit")}, path)
    return model


def lent(method: Weights, vit: ViTConfig = BACKBONE) -> ViT:
    """The ViT of a job after the method's objective."""
    made = ViT(vit)
    files = {role: Path(a.file or "") for role, a in method.assets(None, vit).items()}  # type: ignore[arg-type]
    assert method.objective(made, TrainContext(vit, None, 0, files)) is None  # type: ignore[arg-type]
    return made


def test_a_checkpoint_is_a_row(harness: Harness, smoke_data: Path, tmp_path: Path) -> None:
    """The line of the design, in processes of their own; the record says what was loaded, and moving the file changes nothing."""
    model = saved(tmp_path / "a.pth")
    line = ("run", "--evals", "linear", "--protocol", "smoke", "--data", str(smoke_data), "--set", "linear.recipe.epochs=1")
    done = harness(*line, "--methods", "weights:a.pth")
    assert done.returncode == 0, done.stderr
    assert "| weights:a.pth" in done.stdout and "number of heads not in the file: 3" in done.stdout
    record = json.loads(next(tmp_path.glob("runs/pretrain-weights-vit-*/record.json")).read_text())
    assert record["images_seen"] is None and record["facts"]["style"] == "vit"
    vit = ViT(BACKBONE)
    vit.load_state_dict(model.state_dict())
    assert record["facts"]["fingerprint"]["mean_abs"] == pytest.approx(fingerprint(vit)["mean_abs"], rel=1e-5)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "a.pth", tmp_path / "elsewhere" / "b.pth")
    again = harness(*line, "--methods", "weights:elsewhere/b.pth", "--dry-run")
    assert again.stdout.count("cached") == 2, again.stdout + again.stderr


def test_the_key_is_the_content(tmp_path: Path) -> None:
    saved(tmp_path / "one.pth")
    shutil.copy(tmp_path / "one.pth", tmp_path / "copy@home.pth")
    state = saved(tmp_path / "other.pth").state_dict()
    torch.save({"model": {**state, "cls_token": state["cls_token"] + 1}}, tmp_path / "other.pth")

    def key(name: str) -> str:
        plan = Planner(Request((f"weights:{tmp_path / name}",), ("linear",), "smoke")).plan()
        return next(n.key for n in ordered(plan.nodes) if n.kind == "pretrain")

    assert key("one.pth") == key("copy@home.pth") != key("other.pth")


@torch.no_grad()
def test_what_the_backbone_can_hold_exactly_is_loaded(tmp_path: Path) -> None:
    """A table without k bias, another image size by interpolation, which is said; features stay the source's."""
    x = images(64)
    model = timm_beit(**SMOKE, use_abs_pos_emb=True, init_values=0.1)
    torch.save(model.state_dict(), tmp_path / "beit.pth")
    method = Weights.from_argument(str(tmp_path / "beit.pth"))
    scaled = dataclasses.replace(BACKBONE, layer_scale=1e-5)
    published = method.architecture(BACKBONE, True)
    assert (published.layer_scale is None, published.key_bias, published.size) == (False, False, (64, 64)) and method.architecture(BACKBONE, False) == BACKBONE
    assert method.skip(published) is None and method.skip(scaled) is None
    torch.testing.assert_close(lent(method, scaled).tokens(x), model.forward_features(x), atol=2e-5, rtol=1e-5)
    small = saved(tmp_path / "small.pth", img_size=32)
    method = Weights.from_argument(str(tmp_path / "small.pth"))
    assert "position tables interpolated from 4x4 to 8x8 patches (32x32 to 64x64 pixels)" in method.notes(BACKBONE)
    torch.testing.assert_close(lent(method).pos_embed, resize_positions(small.pos_embed, (4, 4), (8, 8)))


@torch.no_grad()
@pytest.mark.parametrize("bias", ["shared", "block"])
def test_a_relative_bias_of_another_image_size_is_brought_over(bias: str, tmp_path: Path) -> None:
    """As BEiT's own code does it (golden/beit_finetune has its numbers); the record and the footnotes say so, and one patch on a side is refused."""
    model = timm_beit(**{**SMOKE, "img_size": 96}, use_shared_rel_pos_bias=bias == "shared", use_rel_pos_bias=bias == "block")
    torch.save(model.state_dict(), tmp_path / "beit.pth")
    method = Weights.from_argument(str(tmp_path / "beit.pth"))
    target = method.architecture(BACKBONE, True)
    assert (target.size, target.positions, target.relative_bias, method.skip(target)) == ((64, 64), "none", bias, None)
    made = lent(method, target)
    theirs = (model.rel_pos_bias if bias == "shared" else model.blocks[-1].attn).relative_position_bias_table
    torch.testing.assert_close(made.relative_bias[-1].table, resize_bias(theirs, (12, 12), (8, 8)))  # type: ignore[index]
    files = {role: Path(a.file or "") for role, a in method.assets(None, target).items()}  # type: ignore[arg-type]
    facts = dataclasses.replace(method, path="").facts(made, TrainContext(target, None, 0, files))  # type: ignore[arg-type]
    assert any(n.startswith(AS_READ) for n in facts["notes"])  # results/ knows these by their beginning
    for notes in (method.notes(target), facts["notes"]):
        assert "position tables interpolated from 12x12 to 8x8 patches (96x96 to 64x64 pixels)" in notes
    assert differences(target, dataclasses.replace(target, size=(8, 64)))[0].startswith("size 64x64")


def test_another_architecture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "deep.pth", depth=5)
    torch.save(timm_beit(**SMOKE, use_shared_rel_pos_bias=True).state_dict(), tmp_path / "bias.pth")
    for name, says in (("deep", "depth 5, the backbone has 4"), ("bias", "relative_bias shared, the backbone has none; layer_scale present")):
        words = ["run", "--methods", f"scratch,weights:{tmp_path / name}.pth", "--evals", "linear", "--protocol", "smoke", "--runs", str(tmp_path / "runs")]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert says in error and f"{name}.pth" in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_fingerprint_that_does_not_fit_fails_the_job(tmp_path: Path) -> None:
    saved(tmp_path / "a.pth")
    method = Weights.from_argument(str(tmp_path / "a.pth"))
    value = fingerprint(lent(method))["mean_abs"]
    lent(dataclasses.replace(method, fingerprint=value))
    with pytest.raises(JobFailed, match="fixed image"):
        lent(dataclasses.replace(method, fingerprint=value * 1.01))


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "pickle 2", "beside the weights", "in args", "folder", "as safetensors"])
def test_a_malicious_file_is_refused(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In each format, under each name: exit 2, one line, and the file that it would create is not created."""
    trace, file = tmp_path / "trace", tmp_path / "mae.pth"
    content: Any = {"model": timm_vit().state_dict(), "extra": Evil(trace)}
    alone = dict.fromkeys(("pickle", "pickle 2", "zip", "legacy"), Evil(trace))
    content = {"in args": {**content, "extra": arguments(run=Evil(trace))}, **alone}.get(how, content)
    if how in ("folder", "as safetensors"):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "config.json").write_text('{"model_type": "vit"}')
        file = tmp_path / "folder" / ("pytorch_model.bin" if how == "folder" else "model.safetensors")
    if how.startswith("pickle"):
        file.write_bytes(pickle.dumps(content, protocol=2 if how.endswith("2") else None))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how != "legacy")
    named = tmp_path / "folder" if file.parent.name == "folder" else file
    assert main(["run", "--methods", f"weights:{named}", "--evals", "linear", "--protocol", "smoke", "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert ("refused: it holds posix.system" if how != "as safetensors" else "no checkpoint") in error and error.count("\n") == 1 and not trace.exists()


def test_bad_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    transformer("ViTModel").save_pretrained(tmp_path / "hf")
    weights = (tmp_path / "hf" / "model.safetensors").read_bytes()
    (tmp_path / "hf" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "empty").mkdir()
    capsys.readouterr()  # transformers' progress bar
    picture = b"\x89PNG\r\n\x1a\n" + bytes(90)
    for name, body in (("cut.pth", whole[: len(whole) // 2]), ("text.pth", b"hello, world"), ("nothing.pth", b""), ("picture.pth", picture)):
        (tmp_path / name).write_bytes(body)
    for name, says in (
        ("cut.pth", "damaged"), ("text.pth", "no checkpoint"), ("nothing.pth", "no checkpoint"), ("picture.pth", "no checkpoint"), ("hf", "damaged"),
        ("absent.pth", "no such file"), ("empty", "no model.safetensors"),
    ):
        assert main(["run", "--methods", f"weights:{tmp_path / name}", "--evals", "linear", "--protocol", "smoke"]) == 2
        error = capsys.readouterr().err
        assert says in error and name in error and error.count("\n") == 1, error


def test_timm_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is downloaded once; one that timm has not, or that is no ViT, is refused before anything is downloaded."""
    import timm

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, asked, real = timm_vit(**SMOKE), [], timm.create_model
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}

    def create(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        if pretrained:
            asked.append(name)
            return model
        return timm_vit(**SMOKE) if name.startswith("vit_") else real(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create)
    for _ in range(2):
        method = plugins.build("methods", "weights:vit_base_patch16_224.mae")
        assert (method.mean, method.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and method.loaded().heads_from == "timm"
    assert asked == ["vit_base_patch16_224.mae"]
    with torch.no_grad():
        torch.testing.assert_close(lent(method).tokens(images(64)), model.forward_features(images(64)), atol=2e-5, rtol=1e-5)
    for name, says in (("resnet18", "ResNet is no ViT"), ("vit_base_patch16_225", "did you mean vit_base_patch16")):
        with pytest.raises(UserError, match=says):
            plugins.build("methods", f"weights:{name}")

    def offline(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        if pretrained:
            raise ConnectionError("no network")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="cannot be downloaded"):
        plugins.build("methods", "weights:vit_large_patch16_224.mae")
