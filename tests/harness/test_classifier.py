"""The read-out, its loss, exact prediction, and what evaluators have in common."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from evals.scoring import labelled_images, predict, top1
from harness.augment import EvalTransform
from harness.classifier import Classifier
from harness.data import BadImage, ImageList, load_rgb
from harness.plugins import Progress, Session
from harness.randomness import seed_all
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Augment, Interrupted, JobFailed, UserError, ViTConfig
from harness.vit import ViT

CONFIG = ViTConfig(size=(16, 16), patch=8, width=16, depth=2, heads=2)
CLASSES = ("ant", "bee", "cat")


def model(**settings: object) -> Classifier:
    """A small classifier, the same each time."""
    seed_all("model")
    return Classifier(ViT(CONFIG), CLASSES, mean=IMAGENET_MEAN, std=IMAGENET_STD, **settings)  # type: ignore[arg-type]


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return {"image": images, "label": torch.arange(count) % 3}


def session(folder: Path, **settings: object) -> Session:
    """A CPU session."""
    return Session(folder, 7, torch.device("cpu"), torch.float32, settings.pop("folders", {}), **settings)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A class folder: 3 classes x 4 images in train, x 3 in val, of other sizes and modes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for name in CLASSES:
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (20 + i, 24) if i == 1 else (20 + i, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / name / f"{i}.png")
    return tmp_path / "set"


def test_mean_pooling_is_maes() -> None:
    """Mean of the patch tokens before the final norm, then fc_norm; the final norm gets no gradient (recipes A2)."""
    m, images = model(pooling="mean").eval(), batch()["image"]
    x = m.vit.run_blocks(m.vit.place(m.vit.patches(m.normalize(images))))[-1]
    assert torch.allclose(m.logits(images), m.head(m.fc_norm(x[:, 1:].mean(1))), atol=1e-6) and m.fc_norm.eps == 1e-6
    m.train()(batch())["loss"].backward()
    assert m.vit.norm.weight.grad is None and m.vit.cls_token.grad is not None and m.fc_norm.weight.grad is not None


def test_cls_pooling_is_the_vits_own_output() -> None:
    """What timm calls the features."""
    m, images = model(pooling="cls").eval(), batch()["image"]
    assert torch.allclose(m.features(images), m.vit(m.normalize(images)), atol=1e-6)
    m.train()(batch())["loss"].backward()
    assert all(p.grad is not None for p in m.parameters())


def test_probe_trains_the_head_alone() -> None:
    """A moving ViT, or dropped paths in it, would make the probe a fine-tuning."""
    m = model(pooling="cls", probe=True, head_std=0.01).train()
    assert m.training and not m.vit.training
    m(batch())["loss"].backward()
    assert {n for n, p in m.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert m.batch_norm.num_batches_tracked == 1 and not list(m.batch_norm.parameters()) and m.batch_norm.eps == 1e-6
    assert 0.003 < m.head.weight.std() < 0.02


def test_loss_without_mixing_is_cross_entropy() -> None:
    """Smoothing in training only; the accuracy is the batch's."""
    m = model(augment=Augment(smoothing=0.1))
    out, scores, label = m.train()(batch()), m.logits(batch()["image"]), batch()["label"]
    assert torch.allclose(out["loss"], F.cross_entropy(scores, label, label_smoothing=0.1)) and out["loss"].ndim == 0
    assert torch.allclose(out["top1"], (scores.argmax(1) == label).float().mean())
    assert torch.allclose(m.eval()(batch())["loss"], F.cross_entropy(scores, label))


@pytest.mark.parametrize("count", [1, 5, 6])
def test_mixing_is_keyed_by_the_global_seed_and_takes_any_batch(count: int) -> None:
    """`fit` seeds each step: a resumed job must mix alike. timm's Mixup refuses odd batches."""
    m = model(augment=Augment(mixup=0.8, cutmix=1.0, smoothing=0.1)).train()
    losses = []
    for seed in (1, 1, 2, 3):
        seed_all(seed)
        losses.append(float(m(batch(count), 0.5)["loss"].detach()))
    assert losses[0] == losses[1] and (count == 1 or len(set(losses)) > 1)
    before = batch(count)["image"]
    given = batch(count)
    m(given)
    assert torch.equal(given["image"], before)


def test_mixed_targets_sum_to_one() -> None:
    """A smoothed, mixed label is still a distribution."""
    m = model(augment=Augment(mixup=0.8, smoothing=0.1))
    for count in (1, 2, 5):
        data = batch(count)
        images, target = m._mix(m.normalize(data["image"]), data["label"])
        assert images.shape == data["image"].shape and torch.allclose(target.sum(1), torch.ones(count))


def test_saved_classifier_comes_back_as_it_was() -> None:
    """use_head scores what the pre-training made: through a file, by torch's safe loader."""
    for settings in ({"pooling": "cls"}, {"pooling": "mean"}, {"pooling": "cls", "probe": True}):
        m = model(**settings)
        m.train()(batch())
        stream = io.BytesIO()
        torch.save(m.classifier(), stream)
        stream.seek(0)
        saved = torch.load(stream, weights_only=True)
        vit = ViT(CONFIG)
        vit.load_state_dict(m.vit.state_dict())
        restored = Classifier.restore(vit, saved, IMAGENET_MEAN, IMAGENET_STD)
        assert restored.classes == CLASSES
        assert torch.equal(restored.eval().logits(batch()["image"]), m.eval().logits(batch()["image"]))


def test_classifier_of_another_width_is_refused() -> None:
    """One line instead of torch's page of sizes."""
    other = ViT(ViTConfig(size=(16, 16), patch=8, width=8, depth=2, heads=2))
    with pytest.raises(JobFailed, match="cannot be used") as error:
        Classifier.restore(other, model().classifier(), IMAGENET_MEAN, IMAGENET_STD)
    assert "\n" not in str(error.value)
    with pytest.raises(JobFailed):
        Classifier.restore(ViT(CONFIG), {"classes": ["a", "b"]}, IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("classes", [0, (), ("one",)])
def test_too_few_classes_are_refused(classes: object) -> None:
    """An empty class list would give a head without outputs and a NaN loss."""
    with pytest.raises(JobFailed, match="two classes or more"):
        Classifier(ViT(CONFIG), classes, mean=IMAGENET_MEAN, std=IMAGENET_STD)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_predict_reads_each_image_once(folder: Path, tmp_path: Path, workers: int) -> None:
    """A last batch dropped or padded would change the published number; order and workers must not matter."""
    m, transform = model(), EvalTransform((16, 16))
    _, val = labelled_images("imagefolder", session(tmp_path, folders={"imagefolder:x": folder}))
    reports: list[Progress] = []
    predicted = predict(m, val, transform, session(tmp_path, workers=workers, report=reports.append), batch=4)
    alone = [int(m.logits(transform(load_rgb(val.path(i)))["image"][None]).argmax()) for i in range(len(val))]
    assert predicted.dtype == np.int64 and predicted.tolist() == alone and len(val) == 9
    assert (reports[-1].step, reports[-1].steps) == (3, 3)


def test_predict_stops_when_asked(folder: Path, tmp_path: Path) -> None:
    """A job that cannot be stopped while it scores would be killed by the cluster."""
    _, val = labelled_images("imagefolder", session(tmp_path, folders={"imagefolder:x": folder}))
    with pytest.raises(Interrupted):
        predict(model(), val, EvalTransform((16, 16)), session(tmp_path, should_stop=lambda: True))


def test_unreadable_image_fails_or_counts_as_wrong(folder: Path, tmp_path: Path) -> None:
    """--on-bad-image: the path is named; a skipped image is counted, and never counted as correct."""
    (folder / "val" / "bee" / "1.png").write_bytes(b"no image")
    one = session(tmp_path, folders={"imagefolder:x": folder})
    _, val = labelled_images("imagefolder", one)
    with pytest.raises(BadImage, match=r"bee/1\.png"):
        predict(model(), val, EvalTransform((16, 16)), one)
    skipping = session(tmp_path, on_bad_image="skip")
    predicted = predict(model(), val, EvalTransform((16, 16)), skipping, batch=1)
    assert (predicted == -1).tolist() == [f == "bee/1.png" for f in val.files] and skipping.skipped_images == {"bee/1.png": "cannot be read"}


def test_top1_and_outcomes(tmp_path: Path) -> None:
    """The statistics of the table are computed from these files."""
    images = ImageList(tmp_path, ["a", "b", "c", "d"], np.array([0, 1, 2, 1]), CLASSES)
    outcome = top1(np.array([0, 1, 1, -1]), images, session(tmp_path), {"steps": 3})
    assert outcome.metrics == {"top-1": 50.0} and outcome.facts["scored_images"] == 4 and outcome.facts["steps"] == 3
    with np.load(outcome.outcomes) as saved:
        assert saved["correct"].tolist() == [True, True, False, False] and saved["correct"].dtype == bool and saved["label"].tolist() == [0, 1, 2, 1]


def test_holdout_leaves_val_alone(folder: Path, tmp_path: Path) -> None:
    """Tuning on val is what the protocol forbids."""
    place = session(tmp_path, folders={"imagefolder:x": folder})
    train, val = labelled_images("imagefolder", place)
    rest, held = labelled_images("imagefolder", place, 0.25)
    assert (len(train), len(val), len(rest), len(held)) == (12, 9, 9, 3)
    assert sorted([*rest.files, *held.files]) == sorted(train.files) and held.root == train.root and not set(rest.files) & set(held.files)


def test_data_that_does_not_fit_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise: an index error inside the loss, after minutes of training."""
    place = session(tmp_path, folders={"imagenet": folder})
    with pytest.raises(UserError, match="no folder for places365"):
        labelled_images("places365", place)
    good = {s: ImageList(folder, ["a", "b"], np.array([0, 2]), CLASSES) for s in ("train", "val")}

    def reading(**changed: ImageList) -> None:
        monkeypatch.setattr("evals.scoring.read_images", lambda name, split, where: {**good, **changed}[split])

    cases = [
        (JobFailed, "val has label 3, but there are 3 classes", {"val": ImageList(folder, ["a"], np.array([3]), CLASSES)}),
        (JobFailed, "train has label -1", {"train": ImageList(folder, ["a"], np.array([-1]), CLASSES)}),
        (UserError, "train has no labels", {"train": ImageList(folder, ["a"], None, ())}),
        (UserError, "val has no classes", {"val": ImageList(folder, ["a"], np.array([0]), ())}),
        (UserError, "no images in val", {"val": ImageList(folder, [], np.array([], dtype=np.int64), CLASSES)}),
        (JobFailed, "classes of val are not those of train", {"val": ImageList(folder, ["a"], np.array([0]), ("ant", "bee", "dog"))}),
    ]
    for kind, message, changed in cases:
        reading(**changed)
        with pytest.raises(kind, match=message) as error:
            labelled_images("imagenet", place)
        assert "\n" not in str(error.value)
    (folder / "val" / "dog").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "val" / "dog" / "0.png")
    monkeypatch.undo()
    with pytest.raises(UserError, match="'dog' is no class of train"):
        labelled_images("imagenet", place)
