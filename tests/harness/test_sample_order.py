"""Which image comes when: repeated augmentation in the order of DeiT's sampler, and every image once without it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_answers import cases, golden
from PIL import Image
from torch import Tensor, nn

import harness.samples
from harness.data import ImageList
from harness.plugins import Session
from harness.samples import Samples, loader, steps_of, workers_for
from harness.spec import Augment, Recipe
from harness.train import fit

ARRAYS = golden("deit_ra_sampler")
DEIT_BATCH = 256  # DeiT counts an epoch in whole batches of 256 images, whatever the batch is


def settings(case: str) -> tuple[int, int, int]:
    """Images, ranks and repeats of a case "n600_ranks4_repeats3"."""
    count, ranks, repeats = (int("".join(c for c in part if c.isdigit())) for part in case.split("_"))
    return count, ranks, repeats


class Fixed:
    """A generator whose permutation is the recorded one."""

    def __init__(self, permutation: np.ndarray) -> None:
        self.recorded = permutation

    def permutation(self, count: int) -> np.ndarray:
        assert count == len(self.recorded)
        return self.recorded


def images_of(count: int, folder: Path = Path("nowhere")) -> ImageList:
    return ImageList(folder, [f"{i}.png" for i in range(count)], np.arange(count), tuple(str(i) for i in range(count)))


@pytest.mark.parametrize(("case", "epoch"), [(case, epoch) for case in cases(ARRAYS) for epoch in cases(ARRAYS, f"{case}/")])
def test_repeated_augmentation_is_deits(case: str, epoch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of an image stand side by side, so that its crops go to neighbouring ranks; ranks take turns through our order of an epoch."""
    count, ranks, repeats = settings(case)
    recorded = ARRAYS[f"{case}/{epoch}/indices_by_rank"]
    permutation = ARRAYS.get(f"{case}/{epoch}/permutation", np.arange(count))
    monkeypatch.setattr(harness.samples, "generator", lambda *parts: Fixed(permutation))
    places = count // DEIT_BATCH * DEIT_BATCH  # none for fewer images: DeiT's epoch is empty then, ours repeats them to fill a batch
    assert steps_of(Recipe(batch=DEIT_BATCH, lr=1.0, epochs=1), count)[0] == max(1, places // DEIT_BATCH)
    samples = Samples(images_of(count), dict, 0, places, False, repeats)
    ours = np.array([samples.file_at(place) for place in range(places // ranks * ranks)]).reshape(-1, ranks).T
    np.testing.assert_array_equal(ours, recorded)
    each, total, selected = ARRAYS[f"{case}/lengths_samples_total_selected"].tolist()
    assert recorded.shape == (ranks, selected) and each * ranks == total >= count * repeats


def test_epochs_differ_and_without_repeats_each_image_comes_once() -> None:
    samples, repeated = (Samples(images_of(12), dict, 3, 12, False, repeats) for repeats in (1, 3))
    first, second = ([samples.file_at(place) for place in range(start, start + 12)] for start in (0, 12))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert sorted(Counter(repeated.file_at(place) for place in range(12)).values()) == [3] * 4


def test_unreadable_images_in_a_row_are_all_reported(tmp_path: Path) -> None:
    for name in ("0.png", "3.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").write_bytes(b"")
    images = ImageList(tmp_path, [f"{i}.png" for i in range(4)], None, ())
    skipped: dict[str, str] = {}

    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
            return {"loss": self.weight * batch["x"].sum()}

    session = Session(tmp_path / "job", 0, torch.device("cpu"), torch.float32, {}, on_bad_image="skip", skipped_images=skipped)
    (tmp_path / "job").mkdir()
    fit(Nothing(), images, lambda image, rng: {"x": torch.ones(1)}, Recipe(batch=4, lr=0.1, iterations=1), session)
    assert set(skipped) == {"1.png", "2.png"}


def test_recipes_repeats_reach_the_training(tmp_path: Path) -> None:
    """The field of the recipe decides what `fit` trains on; every copy has a crop of its own."""
    seen: list[tuple[int, float]] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
            seen.extend(zip(batch["label"].tolist(), batch["draw"].tolist(), strict=True))
            return {"loss": self.weight.square().sum()}

    for i in range(8):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    session = Session(tmp_path, 7, torch.device("cpu"), torch.float32, {})
    recipe = Recipe(batch=8, lr=0.1, epochs=1, augment=Augment(repeats=2))

    def transform(image: Any, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"draw": torch.tensor(rng.random())}

    fit(Watch(), images_of(8, tmp_path), transform, recipe, session)
    labels = [label for label, _ in seen]
    assert labels[::2] == labels[1::2] and len(set(labels)) == 4 and len({draw for _, draw in seen}) == 8


@pytest.mark.parametrize(("load", "step", "cores", "gpu", "workers"), [
    (1.0, 0.5, 16, True, 3), (0.1, 0.5, 16, True, 1), (1.0, 0.1, 16, True, 14), (1.0, 0.01, 16, True, 16), (1.0, 1.0, 1, True, 1),
    (1.0, 1.0, 1, False, 0), (0.12, 0.88, 2, False, 0), (1.0, 0.1, 2, False, 0), (1.0, 0.4, 2, False, 0), (1.0, 1.0, 4, False, 1), (1.0, 0.1, 4, False, 3),
    (0.05, 1.0, 16, False, 0),
])
def test_workers_are_as_many_as_two_measured_times_ask_for(load: float, step: float, cores: int, gpu: bool, workers: int) -> None:
    """A GPU that waits for images is the dearest mistake, so one process more than the ratio asks for; a CPU's own step must not lose more than is won."""
    assert workers_for(load, step, cores, gpu) == workers


def test_measuring_workers_changes_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """It happens during the first steps; what each step is given stays a function of its place, and HARNESS_WORKERS is obeyed without any measuring."""
    images = ImageList(Path("nowhere"), [str(i) for i in range(7)], None, (), pixels=np.arange(7, dtype=np.uint8).repeat(12).reshape(7, 2, 2, 3))
    samples, said = Samples(images, lambda image, rng: {"image": torch.tensor([image.getpixel((0, 0))[0], rng.integers(1000)])}, 3, 20, False), list[str]()
    batches, threads = [range(i, i + 2) for i in range(0, 400, 2)], torch.get_num_threads()
    asked = list[tuple[float, float, int, bool]]()
    monkeypatch.setattr(harness.samples, "workers_for", lambda *times: asked.append(times) or 2)
    torch.set_num_threads(2)
    try:
        made = [batch["image"].tolist() for batch in loader(samples, batches, 0, False, said.append)]
        monkeypatch.setenv("HARNESS_WORKERS", "0")
        told = [batch["image"].tolist() for batch in loader(samples, batches, 0, False, said.append)]
    finally:
        torch.set_num_threads(threads)
    (load, step, cores, gpu), = asked
    assert made == told and load > 0 < step and (cores, gpu) == (2, False)
    assert len(said) == 1 and said[0].startswith("loader: 2 processes, of 2 cores: a batch of 2 takes ")
