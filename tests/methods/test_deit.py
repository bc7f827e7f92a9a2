"""DeiT's distillation token: the model is timm's distilled ViT, the loss the paper's, and what evaluators get of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from harness import plugins
from harness.augment import Normalize
from harness.classifier import Classifier
from harness.plan import Planner
from harness.plugins import TrainContext
from harness.request import Request
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Augment, JobFailed, Recipe, UserError, ViTConfig
from harness.vit import ViT
from methods.convnet import load_teacher
from methods.deit import DeiT, DistilledClassifier
from protocols.paper import BACKBONES, paper

TINY = ViTConfig(size=(32, 32), patch=8, width=48, depth=2, heads=4)
STATISTICS: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


class Told(nn.Module):
    """A teacher that remembers what it was shown and says one class."""

    num_classes = 5

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return F.one_hot(torch.full((len(images),), 3), 5).float()


def images(count: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def model(**more: Any) -> DistilledClassifier:
    torch.manual_seed(0)
    return DistilledClassifier(ViT(TINY), 5, **STATISTICS, **more)


def test_the_model_is_timms_distilled_vit() -> None:
    """A token in another place, or without its position, would still train."""
    ours = model().eval()
    theirs: Any = VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=5)
    theirs.distilled_training = True
    state = {k: v for k, v in ours.vit.state_dict().items() if k != "pos_embed"}
    table, token, position = ours.vit.pos_embed, ours.token, ours.token_position
    state |= {"pos_embed": torch.cat([table[:, :1], position, table[:, 1:]], dim=1), "dist_token": token}
    state |= {f"{t}.{k}": getattr(m, k) for t, m in (("head", ours.head), ("head_dist", ours.teacher_head)) for k in ("weight", "bias")}
    theirs.load_state_dict(state)
    x = ours.normalize(images())
    with torch.no_grad():
        expected = theirs.train()(x)  # timm gives both heads in training mode; there is no dropout
        for a, b in zip(ours.heads(ours._pooled(x)), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        scores = ours.logits(images())
    torch.testing.assert_close(scores.exp(), (expected[0].softmax(1) + expected[1].softmax(1)) / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_half_the_loss_is_the_teachers_label_of_what_the_student_sees(mixup: float) -> None:
    """DeiT-paper equation 3. Labels of unmixed images would contradict the mixed ones that are trained on."""
    student, teacher = model(augment=Augment(mixup=mixup, smoothing=0.1)).train(), Told()
    student.learn_from(teacher, 0.5)
    seen: list[Tensor] = []
    tokens = student._pooled
    student._pooled = lambda x: seen.append(x) or tokens(x)  # type: ignore[assignment, func-returns-value]
    np.random.seed(0)
    label = torch.tensor([0, 1, 2, 4])
    out = student({"image": images(), "label": label})
    assert torch.equal(seen[0], teacher.seen) and torch.equal(seen[0], student.normalize(images())) == (not mixup)
    first, second = student.heads(tokens(seen[0]))
    np.random.seed(0)
    target = student._mix(student.normalize(images()), label)[1] if mixup else F.one_hot(label, 5) * 0.9 + 0.1 / 5
    expected = (-(target * first.log_softmax(1)).sum(1).mean() - second.log_softmax(1)[:, 3].mean()) / 2
    torch.testing.assert_close(out["loss"], expected)
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (student.token, student.token_position, student.teacher_head.weight, student.head.weight))


def test_a_teacher_sees_images_normalised_as_its_own_training_had_them() -> None:
    """One of timm's "augreg" networks given ImageNet's statistics would label other images than those that it knows; nothing would say so."""
    student, teacher = model().train(), Told()
    teacher.default_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.125)}
    student.learn_from(teacher, 0.5)
    student({"image": images(), "label": torch.tensor([0, 1, 2, 4])})
    torch.testing.assert_close(teacher.seen, Normalize((0.5, 0.4, 0.3), (0.5, 0.25, 0.125))(images()), atol=1e-5, rtol=1e-5)


def test_the_read_out_comes_back_with_its_token_and_without_the_teacher() -> None:
    """A class-token read-out restored from it would score another model; a teacher among the weights would be in every saved state."""
    student = model().eval()
    student.learn_from(Told(), 0.5)
    saved = student.classifier()
    assert set(saved["state"]) == {"token", "token_position", *(f"{h}.{k}" for h in ("head", "teacher_head") for k in ("weight", "bias"))}
    back = Classifier.restore(student.vit, saved, **STATISTICS)
    assert isinstance(back, DistilledClassifier) and torch.equal(back.eval().logits(images()), student.logits(images()))
    back.train()({"image": images(), "label": torch.tensor([0, 1, 2, 4])})["loss"].backward()  # fine-tuned on: both heads by the true labels
    with pytest.raises(JobFailed, match="cannot be used"):
        Classifier.restore(student.vit, {**saved, "class": "methods.deit:Gone"}, **STATISTICS)


def teacher_file(path: Path, classes: int = 5) -> Path:
    """As DeiT's is: {"model": tensors}, without a word about the architecture."""
    torch.save({"model": timm.create_model("test_resnet", num_classes=classes).state_dict()}, path)
    return path


def test_a_teacher_is_a_file_and_timms_name_for_it(tmp_path: Path) -> None:
    file, context = teacher_file(tmp_path / "t.pth"), TrainContext(TINY, Recipe(batch=1, lr=1.0, epochs=1), 1, classes=tuple("abcde"))
    method = DeiT(distilled=True, teacher="test_resnet")
    objective = method.objective(ViT(TINY), dataclasses.replace(context, assets={"teacher": file}))
    assert isinstance(objective, DistilledClassifier) and not objective._teacher[0].training and objective.share == 0.5
    with pytest.raises(UserError, match=r"t\.pth: not the weights of timm's regnety_160"):
        load_teacher(file)
    for content in ({"model": 3}, {"model": {"head.fc.bias": torch.zeros(())}}, [torch.zeros(3)]):
        torch.save(content, tmp_path / "no.pth")
        with pytest.raises(UserError, match=r"no\.pth: not the weights of timm's test_resnet"):
            load_teacher(tmp_path / "no.pth", "test_resnet")
    with pytest.raises(UserError, match="timm has no model 'regnet'"):
        load_teacher(file, "regnet")
    with pytest.raises(UserError, match="knows 7 classes, the training images have 5"):
        method.objective(ViT(TINY), dataclasses.replace(context, assets={"teacher": teacher_file(tmp_path / "7.pth", 7)}))


def test_where_the_teacher_comes_from_is_known_when_planning(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            (tmp_path / "imagenet" / split / name).mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8)).save(tmp_path / "imagenet" / split / name / "a.png")

    def planner(*settings: str, protocol: str = "paper") -> Planner:
        return Planner(Request(("deit@distilled",), ("imagenet",), protocol, data=str(tmp_path), settings=settings))

    released = planner()
    released.plan()
    (told,) = released.missing.values()
    assert "deit/regnety_160-a5fe301d.pth: no such file: needed as teacher; download it from https://dl.fbaipublicfiles.com/deit/" in told
    for settings, told in (
        (("deit@distilled.teacher=test_resnet",), "name its weights too"), (("deit@distilled.teacher_file=",), "teacher_file is empty: name a file"),
        (("deit@distilled.teacher=regnet", f"deit@distilled.teacher_file={tmp_path / 'gone.pth'}"), "timm has no model 'regnet'"),
        (("deit@distilled.by=mae",), "not a value of type"), (("deit@distilled.distilled=false", "deit@distilled.share=0.4"), "deit has no teacher"),
    ):
        with pytest.raises(UserError, match=told):
            planner(*settings).plan()
    own = planner(f"deit@distilled.teacher_file={tmp_path / 'mine.pth'}")
    own.plan()
    assert "mine.pth: no such file: needed as teacher; name another" in next(iter(own.missing.values()))
    keys = set()
    for name in ("a.pth", "b.pth"):
        file = teacher_file(tmp_path / name)
        (cell,) = planner("deit@distilled.teacher=test_resnet", f"deit@distilled.teacher_file={file}").plan().cells
        assert cell.node is not None and cell.node.identity["use_head"] and any("distillation token" in d for d in cell.about["deviations"])
        keys.add(cell.node.parents["checkpoint"].identity["files"]["teacher"])
    made = planner(protocol="demo").plan()
    assert [n.about["title"] for n in made.nodes][:2] == ["teacher convnet", "pretrain deit@distilled"] and len(keys) == 2


def test_recipe_is_deits() -> None:
    plain, distilled = (plugins.build("methods", n).recipe(paper, BACKBONES["vit-b16"]) for n in ("deit", "deit@distilled"))
    assert distilled == dataclasses.replace(plain, no_decay=(*plain.no_decay, "token_position")) and plain.epochs == 300
    assert DeiT(distilled=True).skip(dataclasses.replace(TINY, relative_bias="shared")) and not DeiT(distilled=True).skip(TINY)
    with pytest.raises(UserError, match="pooling must be cls"):
        DeiT(distilled=True, pooling="mean")
