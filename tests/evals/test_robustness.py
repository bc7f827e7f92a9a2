"""Robustness evaluators: classes matched by name, the arg-max among those of the test set, all 75 sets of ImageNet-C, nothing trained again."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evals.robustness import CentralCrop, ImageNetA, ImageNetC, ImageNetSketch
from evals.robustness_metrics import ALEXNET_ERROR
from harness.augment import EvalTransform
from harness.checkpoint import Backbone
from harness.classifier import Classifier
from harness.data import data_set, load_rgb
from harness.plan import Planner
from harness.plugins import EvalContext, Session
from harness.randomness import seed_all
from harness.request import Request
from harness.spec import Interrupted, JobFailed, Protocol, UserError, ViTConfig
from harness.vit import ViT, init_mae

CONFIG = ViTConfig(size=(16, 16), patch=8, width=16, depth=1, heads=2)
TINY = Protocol("tiny", "smoke", "for tests", {"tiny": CONFIG}, "tiny")
CLASSES = ("n01", "n02", "n03", "n04")


def fine_tuned(classes: tuple[str, ...] = CLASSES) -> Backbone:
    """A checkpoint with a head that prefers n01 for everything and else goes by the image."""
    seed_all("backbone")
    vit = ViT(CONFIG)
    init_mae(vit)
    base = Backbone(CONFIG, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), vit.state_dict())
    model = Classifier(base.build(), classes, mean=base.mean, std=base.std, head_std=1.0)
    with torch.no_grad():
        model.head.bias[0] = 100.0
    return dataclasses.replace(base, classifier=model.classifier())


def session(folder: Path, name: str, data: Path, stop_after: int | None = None) -> Session:
    looks = [0]

    def should_stop() -> bool:
        looks[0] += 1
        return stop_after is not None and looks[0] >= stop_after

    folder.mkdir(exist_ok=True)
    return Session(folder, 7, torch.device("cpu"), torch.float32, {name: data}, should_stop=should_stop)


def pictures(folder: Path, classes: tuple[str, ...], count: int, side: int = 16, seed: int = 0) -> Path:
    """Noise of different colours in class folders."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(rng.normal(rng.uniform(0, 255, 3), 40, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_the_arg_max_is_taken_among_the_classes_of_the_set(tmp_path: Path) -> None:
    """Over all classes this model answers n01 always and would score nothing; sets number their classes from their own folders."""
    data, checkpoint = pictures(tmp_path / "data", ("n02", "n04"), 10), fine_tuned()
    outcome = ImageNetA().run(checkpoint, EvalContext(session(tmp_path / "job", "imagenet-a", data), TINY, None))
    model = Classifier.restore(checkpoint.build(), checkpoint.classifier, checkpoint.mean, checkpoint.std).eval()  # type: ignore[arg-type]
    right = []
    for label, name in ((1, "n02"), (3, "n04")):
        for file in sorted((data / name).iterdir()):
            with torch.no_grad():
                scores = model.logits(EvalTransform((16, 16))(load_rgb(file))["image"][None])[0]
            assert int(scores.argmax()) == 0
            right.append(bool((scores[1] > scores[3]) == (label == 1)))
    with np.load(outcome.outcomes) as saved:
        assert saved["correct"].tolist() == right
    assert outcome.metrics["top-1"] == 100 * np.mean(right) and outcome.facts["classes"] == 2 and outcome.facts["images_seen"] == 0


def test_a_class_that_the_classifier_does_not_know_is_named(tmp_path: Path) -> None:
    """Classes by other names would be compared with the wrong ones."""
    data = pictures(tmp_path / "data", ("n02", "n09"), 1)
    with pytest.raises(JobFailed, match="'n09' is no class of the classifier"):
        ImageNetSketch().run(fine_tuned(), EvalContext(session(tmp_path / "job", "imagenet-sketch", data), TINY, None))
    with pytest.raises(JobFailed, match="no classifier"):
        ImageNetSketch().run(dataclasses.replace(fine_tuned(), classifier=None), EvalContext(session(tmp_path / "job", "imagenet-sketch", data), TINY, None))


def test_mce_over_all_corruptions_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """75 sets of 50,000 images take hours: what is scored is not scored again; n01 is right for half of the images of each."""
    assert [s.split("/")[0] for s in data_set("imagenet-c").splits[::5]] == list(ALEXNET_ERROR)
    first = pictures(tmp_path / "one", ("n01", "n03"), 2)
    data = tmp_path / "data"
    for name in data_set("imagenet-c").splits:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).symlink_to(first)
    with pytest.raises(Interrupted):
        ImageNetC().run(fine_tuned(), EvalContext(session(tmp_path / "job", "imagenet-c", data, 40), TINY, None))
    done = list((tmp_path / "job" / "checkpoint" / "scored").iterdir())
    assert len(done) == 39
    stamps = {p: p.stat().st_mtime_ns for p in done}
    outcome = ImageNetC().run(fine_tuned(), EvalContext(session(tmp_path / "job", "imagenet-c", data), TINY, None))
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    assert outcome.metrics["mCE"] == pytest.approx(100 * np.mean([0.5 / e for e in ALEXNET_ERROR.values()]))
    assert outcome.facts["mean_error"] == 50 and outcome.facts["scored_images"] == 300 and not ImageNetC.columns[0].higher_is_better


WORKER = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from evals.robustness import ImageNetA, ImageNetC
from harness.plugins import EvalContext
from test_robustness import TINY, fine_tuned, session
place, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{place}/group", rank=rank, world_size=2)
for evaluator, name in ((ImageNetA(), "imagenet-a"), (ImageNetC(), "imagenet-c")):
    print(evaluator.run(fine_tuned(), EvalContext(session(place / f"two-{name}", name, place / name), TINY, None)).metrics)
"""


def test_two_processes_score_what_one_does(tmp_path: Path) -> None:
    """Sets of fifteen images, one of ImageNet-C scored before: the outcomes are those of one process, image by image, and both tell the same score."""
    noise = pictures(tmp_path / "imagenet-a", ("n02", "n03", "n04"), 5)
    for name in data_set("imagenet-c").splits:
        (tmp_path / "imagenet-c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "imagenet-c" / name).symlink_to(noise)
    alone = []
    for evaluator, name in ((ImageNetA(), "imagenet-a"), (ImageNetC(), "imagenet-c")):
        alone.append(evaluator.run(fine_tuned(), EvalContext(session(tmp_path / f"one-{name}", name, tmp_path / name), TINY, None)))
    kept = tmp_path / "two-imagenet-c" / "checkpoint" / "scored"
    kept.mkdir(parents=True)
    (kept / "fog-3.npy").write_bytes((tmp_path / "one-imagenet-c" / "checkpoint" / "scored" / "fog-3.npy").read_bytes())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])}
    jobs = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(rank)], env=environment, stdout=-1, stderr=-1, text=True) for rank in (0, 1)]
    for job in jobs:
        said, errors = job.communicate(timeout=300)
        assert job.returncode == 0 and said.splitlines() == [str(outcome.metrics) for outcome in alone], errors
    for name in ("imagenet-a", "imagenet-c"):
        with np.load(tmp_path / f"one-{name}" / "outcomes.npz") as one, np.load(tmp_path / f"two-{name}" / "outcomes.npz") as two:
            assert one.files == two.files and all(np.array_equal(one[key], two[key]) for key in one.files)
    assert 0 < alone[0].metrics["top-1"] < 100


def test_corrupted_images_are_cropped_and_not_resized(tmp_path: Path) -> None:
    """Resizing to 256 and cropping 224, as for clean images, blurs the noise away."""
    image = Image.fromarray(np.arange(20 * 18 * 3, dtype=np.uint32).reshape(20, 18, 3).astype(np.uint8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(CentralCrop((16, 16))(image)["image"], pixels[:, 2:18, 1:17])
    assert torch.equal(CentralCrop((20, 18))(image)["image"], pixels)
    assert CentralCrop((32, 32))(image)["image"].shape == (3, 32, 32)


def test_the_graph_scores_the_fine_tuned_model(smoke_data: Path, tmp_path: Path) -> None:
    """pretrain -> imagenet -> robustness: the fine-tuning is shared, and its --set values reach it."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "imagenet").symlink_to(smoke_data / "imagenet")
    for name in ("imagenet-a", "imagenet-r"):
        pictures(root / name, ("disc", "star"), 1)

    def plan(*evals: str, **more: object) -> object:
        return Planner(Request(("mae",), evals, "smoke", data=str(root), **more)).plan()  # type: ignore[arg-type]

    both = plan("imagenet", "imagenet-a", "imagenet-r")
    assert [n.name for n in both.nodes] == ["mae", "imagenet-mae", "imagenet-a-mae", "imagenet-r-mae"]  # type: ignore[attr-defined]
    scored = both.nodes[2]  # type: ignore[attr-defined]
    assert scored.parents["checkpoint"] is both.nodes[1] and scored.identity["recipe"] is None  # type: ignore[attr-defined]
    alone = plan("imagenet-a", settings=("imagenet.recipe.lr=0.01",))
    assert [n.name for n in alone.nodes] == ["mae", "imagenet-mae", "imagenet-a-mae"]  # type: ignore[attr-defined]
    assert alone.nodes[2].key != scored.key and "imagenet.recipe.lr=0.01" in alone.cells[0].about["deviations"][0]  # type: ignore[attr-defined]
    other = plan("imagenet-a", settings=("imagenet.size=32",))
    assert other.cells[0].about["ground"] != both.cells[1].about["ground"]  # type: ignore[attr-defined]  # another evaluation of the same name
    seeds = plan("imagenet-a", eval_seeds=(0, 1))
    assert len({c.node.key for c in seeds.cells}) == 2  # type: ignore[attr-defined]
    own = Planner(Request(("supervised",), ("imagenet-a",), "smoke", data=str(root), eval_seeds=(0, 1))).plan()
    assert len({c.node.key for c in own.cells if c.node}) == 1  # nothing is fine-tuned, so its seed changes nothing
    left = Planner(Request(("supervised", "mae"), ("head",), "smoke", data=str(root))).plan()
    assert [n.name for n in left.nodes] == ["supervised", "head-supervised"] and left.cells[1].node is None
    assert left.cells[1].skipped == "mae brings no classifier of its own, and head trains none"
    with pytest.raises(UserError, match="imagenet-sketch: no such folder"):
        plan("imagenet-sketch")
