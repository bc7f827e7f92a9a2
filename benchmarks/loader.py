"""Images a core can load: our loader against torchvision's ImageFolder with MAE's transform (R7) and against BEiT's two views as unilm makes them (R8).

Rivals. R7: torchvision's ImageFolder and DataLoader with RandomResizedCrop(224, (0.2, 1), bicubic), flip, ToTensor, Normalize (recipes A1). R8: the same
loader with ColorJitter(0.4, 0.4, 0.4), flip, one box at 224 bicubic and at 112 Lanczos, ToTensor, Normalize and map_pixels (recipes A6), written from these
facts, its masks patch by patch as BEiT's generator makes them (masking_generator.py). The rivals' workers normalise; ours give uint8, which the device
normalises: the ratio is shown without that, as on a GPU, and with it on the same core.

Gate: boxes equal torchvision's for the same seeds, decoded values equal PIL's, every crop within 0.05 grey levels of PIL's.
Figures are processor seconds, its loader process included, so that other work on the machine counts less; rounds are interleaved. `--parts` chooses:
speed; stages (what an image's time goes to); fine-tuning (what RandAugment, erasing, mixup and cutmix add); index (start-up and memory over an epoch
of 1.28 million entries, which are simulated: the names are made up, and reading one gives an image that is in memory).

Images are 500 x 375: contact sheets of `--photos FOLDER`, or of scenes drawn by protocols/scenes.py, in JPEG 97 (0.5 bytes a pixel; ImageNet has 0.6) and 90.

    .venv/bin/python benchmarks/loader.py [--photos FOLDER] [--parts speed,stages,fine-tuning,index] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import gc
import io
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch
from PIL import Image
from report import keep, middle
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as tvf

from data_sets import labelled
from harness.augment import Normalize, TrainTransform, crop_resize, random_resized_crop_box, to_tensor
from harness.classifier import Classifier
from harness.data import ImageList, load_rgb, read_images
from harness.pictures import decode_jpeg, resize, values_of
from harness.randomness import generator
from harness.samples import Samples, loader
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Augment, Recipe, ViTConfig
from harness.vit import ViT
from methods.beit import BEiT
from methods.mae import MAE
from methods.masking import BlockMask, block_mask
from methods.views import jittered, recoloured, sample_of
from protocols import scenes

HEIGHT, WIDTH, TILE = 375, 500, (96, 72)
BATCH, FILES, IMAGES = 64, 192, 768
BICUBIC, LANCZOS = tv.InterpolationMode.BICUBIC, tv.InterpolationMode.LANCZOS
MAE_AUGMENT, BEIT_AUGMENT = Augment(crop_scale=(0.2, 1.0)), Augment(crop_scale=(0.08, 1.0), color_jitter=(0.4, 0.4, 0.4))
ENTRIES = 1_281_167  # of ImageNet's train


# ---------------------------------------------------------------------------------------------------------------- images


def sheets(photos: Path | None) -> Iterator[Image.Image]:
    """Endless pictures of 500 x 375 with the detail of photographs at that size: contact sheets of small ones."""
    files = sorted(photos.rglob("*.jpg")) if photos is not None else []
    if photos is not None and not files:
        sys.exit(f"{photos}: no JPEG files")
    rng = generator("sheets")
    drawn = [] if files else [Image.fromarray(scenes.scene(rng, 144, 192, 4).image) for _ in range(40)]
    columns, rows = -(-WIDTH // TILE[0]), -(-HEIGHT // TILE[1])
    while True:
        sheet = Image.new("RGB", (columns * TILE[0], rows * TILE[1]))
        for k in range(columns * rows):
            one = Image.open(files[rng.integers(len(files))]).convert("RGB") if files else drawn[rng.integers(len(drawn))]
            sheet.paste(one.resize(TILE, Image.Resampling.BICUBIC), (k % columns * TILE[0], k // columns * TILE[1]))
        yield sheet.crop((0, 0, WIDTH, HEIGHT))


def make_folder(root: Path, photos: Path | None, quality: int) -> float:
    """ImageNet's layout with the images of a measurement; their mean size in kB."""
    made = sheets(photos)
    sizes = []
    for i in range(IMAGES):
        path = root / "train" / f"class{i % 4}" / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < FILES:
            next(made).save(path, quality=quality)
        else:
            path.hardlink_to(root / "train" / f"class{i % 4}" / f"{i % FILES:04}.jpg")
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes) / 1000


# ------------------------------------------------------------------------------------------------------------------ gate


class TorchDraws:
    """A generator that draws as torchvision does."""

    def uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, end: int) -> int:
        return int(torch.randint(0, end, size=(1,)).item())


def gate(root: Path) -> dict[str, float]:
    """Exit unless boxes and pixels are the rival's; returns what was compared."""
    rule: Any = TorchDraws()
    for seed in range(2000):
        torch.manual_seed(seed)
        ours = random_resized_crop_box(rule, HEIGHT, WIDTH, (0.2, 1.0), (3 / 4, 4 / 3))
        torch.manual_seed(seed)
        theirs = tv.RandomResizedCrop.get_params(torch.zeros(3, HEIGHT, WIDTH), [0.2, 1.0], [3 / 4, 4 / 3])
        if ours != tuple(theirs):
            sys.exit(f"not the same boxes: seed {seed}, {ours}, {theirs}")
    worst = {"224 bicubic": 0.0, "112 lanczos": 0.0}
    masks = [[block_mask(generator(seed), kind(14, 14, 75, 16)) for seed in range(200)] for kind in (BlockMask, PatchByPatch)]
    if not np.array_equal(*masks):
        sys.exit("not the same masks")
    for seed, path in enumerate(sorted(root.rglob("*.jpg"))):
        image, plain = load_rgb(path), Image.open(path).convert("RGB")
        if not np.array_equal(values_of(image).permute(1, 2, 0).numpy(), np.asarray(plain)):
            sys.exit(f"not the values of PIL: {path.name}")
        box = random_resized_crop_box(generator(seed), HEIGHT, WIDTH, (0.08, 1.0), (3 / 4, 4 / 3))
        for name, size, mode in (("224 bicubic", 224, BICUBIC), ("112 lanczos", 112, LANCZOS)):
            theirs = tvf.pil_to_tensor(tvf.resized_crop(plain, *box, [size, size], mode))
            ours = to_tensor(crop_resize(image, box, (size, size), Image.Resampling[mode.name]))
            worst[name] = max(worst[name], float((ours.float() - theirs.float()).abs().mean()))
    if max(worst.values()) > 0.05:
        sys.exit(f"not within 0.05 grey levels of PIL: {worst}")
    return {"boxes_equal": 2000, **{f"worst_crop_grey_levels_{k}": v for k, v in worst.items()}}


# ----------------------------------------------------------------------------------------------------------------- rivals


class PatchByPatch(BlockMask):
    """The same masks at the cost of BEiT's code, which looks at and sets a patch at a time."""

    def __call__(self, rng: random.Random) -> np.ndarray:
        mask, count = np.zeros((self.height, self.width), dtype=bool), 0
        while count < self.target:
            added = self._rectangle(mask, min(self.target - count, self.target), rng)
            if added == 0:
                break
            count += added
        return mask

    def _rectangle(self, mask: np.ndarray, limit: int, rng: random.Random) -> int:
        for _ in range(10):
            area, ratio = rng.uniform(self.minimum, limit), math.exp(rng.uniform(math.log(self.aspect), -math.log(self.aspect)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h >= self.height or w >= self.width:
                continue
            top, left, added = rng.randint(0, self.height - h), rng.randint(0, self.width - w), 0
            if not 0 < h * w - mask[top : top + h, left : left + w].sum() <= limit:
                continue
            for row in range(top, top + h):
                for column in range(left, left + w):
                    if mask[row, column] == 0:
                        mask[row, column], added = 1, added + 1
            return added
        return 0


class TwoViews:
    """BEiT's views in unilm's order: jitter, flip, one box resized twice."""

    def __init__(self) -> None:
        self.before = tv.Compose([tv.ColorJitter(0.4, 0.4, 0.4), tv.RandomHorizontalFlip(0.5)])
        self.image = tv.Compose([tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        self.token = tv.Compose([tv.ToTensor(), lambda x: 0.8 * x + 0.1])
        self.rng = generator("masks")

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
        """(3, 224, 224), (3, 112, 112), (196,)."""
        image = self.before(image)
        box = tv.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        first, second = tvf.resized_crop(image, *box, [224, 224], BICUBIC), tvf.resized_crop(image, *box, [112, 112], LANCZOS)
        return self.image(first), self.token(second), torch.from_numpy(block_mask(self.rng, PatchByPatch(14, 14, 75, 16)))


def rival(root: Path, transform: Callable[[Image.Image], Any], workers: int) -> None:
    """An epoch of torchvision's folder."""
    for _ in DataLoader(ImageFolder(str(root / "train"), transform), BATCH, shuffle=True, num_workers=workers, drop_last=True):
        pass


def ours(root: Path, method: Any, augment: Augment, workers: int, normalised: bool) -> None:
    """An epoch of ours; `normalised`, and BEiT's views jittered, here, as the objectives do it on the device."""
    images = read_images("imagenet", "train", root)
    samples = Samples(images, method.transform(ViTConfig(), Recipe(batch=BATCH, lr=1.0, epochs=1, augment=augment)), 0, len(images), False)
    normalise = Normalize(IMAGENET_MEAN, IMAGENET_STD)
    for batch in loader(samples, [range(i, i + BATCH) for i in range(0, IMAGES, BATCH)], workers, False):
        if normalised:
            made = recoloured(batch)
            normalise(made["image"])
            if "tokenizer_image" in made:
                made["tokenizer_image"].float().mul_(0.8 / 255).add_(0.1)


def seconds(work: Callable[[], None]) -> float:
    """Processor seconds of a piece of work and of the processes that it has waited for."""
    start, before = time.process_time(), os.times()
    work()
    return time.process_time() - start + sum(os.times()[2:4]) - sum(before[2:4])


def compare(rounds: int, theirs: Callable[[], None], mine: Callable[[], None], normalised: Callable[[], None]) -> dict[str, Any]:
    """Interleaved rounds after one of each: images/s of a core and their ratio."""
    took = [[seconds(work) for work in (theirs, mine, normalised)] for _ in range(rounds + 1)][1:]
    plain, also = ([t[0] / t[i] for t in took] for i in (1, 2))
    speeds = {name: IMAGES / statistics.median(t[i] for t in took) for i, name in ((1, "ours"), (0, "rival"), (2, "ours normalised"))}
    return {**middle(plain, "ratio"), "rounds": plain, "images_per_s": speeds, "ratio_normalised": {**middle(also), "rounds": also}}


def told(ratio: float, spread: list[float]) -> str:
    """A ratio in words."""
    return f"ratio {ratio:.2f} ({spread[0]:.2f} to {spread[1]:.2f})"


def speed(photos: Path | None, rounds: int) -> list[dict[str, Any]]:
    """R7 and R8 at two qualities, in this process and with a loader process."""
    mae = tv.Compose([tv.RandomResizedCrop(224, (0.2, 1.0), interpolation=BICUBIC), tv.RandomHorizontalFlip(), tv.ToTensor(),
                      tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    rows = []
    for quality in (97, 90):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            size, gates = make_folder(root, photos, quality), gate(root)
            for name, theirs, method, augment, who, goal in (
                ("R7 MAE", mae, MAE(), MAE_AUGMENT, "torchvision's ImageFolder", ">= 2.0"),
                ("R8 BEiT two views", TwoViews(), BEiT(), BEIT_AUGMENT, "unilm's pipeline", ">= 3.5"),
            ):
                for workers in (0, 1) if quality == 97 else (0,):
                    row = compare(rounds, partial(rival, root, theirs, workers), *(partial(ours, root, method, augment, workers, n) for n in (False, True)))
                    title = f"{name}, JPEG quality {quality}, {'with a loader process' if workers else 'in one process'}"
                    rows.append({"name": title, **row, "goal": goal, "rival": who, "kB": size, "details": {"workers": workers, **gates}})
                    also, images = row["ratio_normalised"], ", ".join(f"{k} {v:.0f}" for k, v in row["images_per_s"].items())
                    print(f"{title} ({size:.0f} kB), images/s a core: {images}; {told(row['ratio'], row['spread'])}; "
                          f"normalised {told(also['median'], also['spread'])}", flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------------------- stages


def microseconds(rounds: int, cases: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Processor microseconds of each in every round, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            found[name].append(1e6 * seconds(lambda case=case: [case() for _ in range(200)]) / 200)  # type: ignore[misc]
    return {name: times[1:] for name, times in found.items()}


def row_of(part: str, name: str, taken: list[float], **more: Any) -> dict[str, Any]:
    """A row of microseconds for an image, printed."""
    row = {"name": f"{part}: {name}", **middle(taken, "value"), "unit": "microseconds", "rounds": len(taken), **more}
    print("; ".join([f"{row['name']}: {row['value']:.0f} microseconds", *(f"{k} {v}" for k, v in more.items())]), flush=True)
    return row


def stages(photos: Path | None, rounds: int) -> list[dict[str, Any]]:
    """What the time of an image goes to, and PIL's way beside it. Scaled decoding (half the sides while still above 224) is shown with its distance."""
    import simplejpeg

    stream = io.BytesIO()
    next(sheets(photos)).save(stream, "JPEG", quality=97)
    data, box = stream.getvalue(), (40, 60, 290, 330)
    top, left, h, w = box
    plain, picture = Image.open(io.BytesIO(data)).convert("RGB"), decode_jpeg(data)
    assert picture is not None
    values, rng = picture.values, generator("stages")
    crop = values[:, top : top + h, left : left + w]
    left = [jittered(picture, generator(i), (0.4, 0.4, 0.4), later=True)[1] for i in range(BATCH)]
    views = {"image": resize(crop, (224, 224)), "tokenizer_image": resize(crop, (112, 112), Image.Resampling.LANCZOS)}
    batch = default_collate([sample_of(views, i % 2 == 0, one) for i, one in enumerate(left)])
    jitter_rng = generator("jitter")
    times = microseconds(rounds, {
        "decode": lambda: decode_jpeg(data), "decode, rival": lambda: Image.open(io.BytesIO(data)).load(),
        "224 bicubic": lambda: resize(crop, (224, 224)), "224 bicubic, rival": lambda: crop_pil(plain, box, 224, Image.Resampling.BICUBIC),
        "112 Lanczos": lambda: resize(crop, (112, 112), Image.Resampling.LANCZOS),
        "112 Lanczos, rival": lambda: crop_pil(plain, box, 112, Image.Resampling.LANCZOS),
        "jitter, what the loader has of it": lambda: jittered(picture, jitter_rng, (0.4, 0.4, 0.4), later=True),
        "jitter, what the loader has of it, rival": lambda: tv.ColorJitter(0.4, 0.4, 0.4)(plain),
        "generator, box": lambda: random_resized_crop_box(generator(0, "sample", 1, 2), HEIGHT, WIDTH, (0.2, 1.0), (3 / 4, 4 / 3)),
        "block mask": lambda: block_mask(rng, BlockMask(14, 14, 75, 16)),
        "decode, halved by DCT": lambda: simplejpeg.decode_jpeg(data, min_height=HEIGHT // 2, min_width=WIDTH // 2),
    })
    halved = torch.from_numpy(simplejpeg.decode_jpeg(data, min_height=HEIGHT // 2, min_width=WIDTH // 2)).permute(2, 0, 1)
    away = float((resize(halved, (112, 112)).float() - resize(values, (112, 112)).float()).abs().mean())
    rivals = {"decode": "PIL", "224 bicubic": "PIL", "112 Lanczos": "PIL", "jitter, what the loader has of it": "torchvision, all of it"}
    more = {name: {"rival": who, "rival_microseconds": statistics.median(times.pop(f"{name}, rival"))} for name, who in rivals.items()}
    more["decode, halved by DCT"] = {"grey_levels_away_at_112": away}
    times["jitter and flip of both views on the device, here this core"] = [1e6 * seconds(lambda: recoloured(batch)) / BATCH for _ in range(rounds + 1)][1:]
    return [row_of("stage", name, taken, **more.get(name, {})) for name, taken in times.items()]


def crop_pil(image: Image.Image, box: tuple[int, int, int, int], size: int, resample: Image.Resampling) -> Image.Image:
    """The box of an image at a size, by PIL."""
    top, left, h, w = box
    return image.crop((left, top, left + w, top + h)).resize((size, size), resample)


def fine_tuning(photos: Path | None, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of an image: crop and flip alone, with erasing, with RandAugment; mixup and cutmix of a batch of 64 on the device (here this core)."""
    stream = io.BytesIO()
    next(sheets(photos)).save(stream, "JPEG", quality=97)
    data = stream.getvalue()
    plain = {"crop_scale": (0.08, 1.0)}
    kinds = {"decode, crop, flip": {}, "and erasing 0.25": {"erasing": 0.25}, "and RandAugment": {"rand_augment": "rand-m9-mstd0.5-inc1"},
             "all": {"erasing": 0.25, "rand_augment": "rand-m9-mstd0.5-inc1"}}
    made = {name: TrainTransform((224, 224), Augment(**plain, **more)) for name, more in kinds.items()}  # type: ignore[arg-type]
    turn = iter(range(10**9))

    def one(transform: TrainTransform) -> Any:
        return transform(load_rgb(Path("one.jpg"), data=data), generator(0, next(turn)))

    times = microseconds(rounds, {name: lambda t=t: one(t) for name, t in made.items()})  # type: ignore[misc]
    vit = ViT(ViTConfig(width=64, depth=1, heads=2))
    mixing = Classifier(vit, 1000, mean=IMAGENET_MEAN, std=IMAGENET_STD, augment=Augment(mixup=0.8, cutmix=1.0, smoothing=0.1))
    images, label = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8), torch.zeros(BATCH, dtype=torch.int64)
    assert mixing._mixup is not None
    per = [1e6 * seconds(lambda: mixing._mixup(mixing.normalize(images), label)) / BATCH for _ in range(rounds + 1)][1:]
    times["mixup or cutmix, with normalisation, in the batch"] = per
    return [row_of("fine-tuning", name, taken) for name, taken in times.items()]


# ------------------------------------------------------------------------------------------------------------------ index


class InMemory(ImageList):
    """An index whose files are all the same small image: what is measured is the index."""

    def load(self, index: int) -> Any:
        """Looks the name up, as reading would."""
        assert self.files[index]
        return None


def made_up(entries: int) -> list[str]:
    """Names as a walk through ImageNet's folders gives them."""
    per = -(-entries // 1000)
    return [f"n{10_000_000 + c:08}/n{10_000_000 + c:08}_{i:05}.JPEG" for c in range(1000) for i in range(per)][:entries]


def shared(kind: str, entries: int) -> dict[str, Any]:
    """Seconds to the first batch, and the memory that is each process's own along one epoch with two loader processes, in MB."""
    held = [made_up(entries)]
    start = time.monotonic()
    labelled.images_below, labelled.class_names = (lambda folder: held.pop()), (lambda folder: tuple(f"n{10_000_000 + c:08}" for c in range(1000)))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train").mkdir()
        found = read_images("imagenet", "train", Path(folder))
    images = InMemory(**{f.name: getattr(found, f.name) for f in fields(found)})
    if kind == "list":
        object.__setattr__(images, "files", [str(name) for name in images.files])
    del found
    samples = Samples(images, lambda image, rng: {"image": torch.zeros(1)}, 0, entries, False)
    stream = loader(samples, [range(i, min(i + 512, entries)) for i in range(0, entries, 512)], 2, False)
    next(stream)
    ready, own = time.monotonic() - start, []
    gc.collect()
    for number, _ in enumerate(stream, start=1):
        if number % max(1, entries // 512 // 10) == 0:
            children = psutil.Process().children(recursive=True)
            own.append([round(p.memory_full_info().uss / 2**20, 1) for p in (psutil.Process(), *children)])
    print(f"{entries} entries as {kind}: first batch after {ready:.2f} s; own memory of the loader processes {own[0][1:]} MB after a tenth of an epoch, "
          f"{own[-2][1:]} after nine", flush=True)
    return {"name": f"index of {entries:,} entries as a {kind}, two loader processes: to the first batch", "value": ready, "unit": "s", "rounds": 1,
            "goal": "< 5 s", "own_MB_of_main_and_loader_processes": {"first": own[0], "last": own[-1]}, "details": {"own_MB": own}}


def index(photos: Path | None, rounds: int) -> list[dict[str, Any]]:
    """Growth with the entries, and what a list of strings did at the largest; each in a process of its own, as memory that was used once stays."""
    rows = []
    for kind, entries in (("buffer", 10_000), ("buffer", 100_000), ("buffer", ENTRIES), ("list", ENTRIES)):
        receive, send = torch.multiprocessing.Pipe(duplex=False)
        if os.fork() == 0:
            send.send(shared(kind, entries))
            os._exit(0)
        rows.append(receive.recv())
        os.wait()
    return rows


PARTS = {"speed": speed, "stages": stages, "fine-tuning": fine_tuning, "index": index}


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description="the loader against its rivals")
    parser.add_argument("--photos", type=Path, help="folder of JPEG files; by default scenes are drawn")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = args.parts.split(",")
    rows = [row for part in parts for row in PARTS[part](args.photos, args.rounds)]
    if args.out:
        images = "contact sheets of photographs" if args.photos else "contact sheets of drawn scenes"
        keep("-".join(["loader", *(parts if len(parts) < len(PARTS) else ())]), rows, args.out, images=images)


if __name__ == "__main__":
    main()
