"""`--methods weights:PATH_OR_NAME`: somebody else's checkpoint, or a timm model, as a row of the table. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Asset, JobFailed, Overrides, Recipe, UserError, ViTConfig

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from harness.plugins import TrainContext
    from harness.spec import Protocol
    from harness.vit import ViT
    from weights.loading import Loaded

SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".ckpt", ".safetensors")
PUBLISHED = "published size"  # the number of heads is that of the published models of this width: likely, and not in the file
TOLERANCE = 1e-3  # of a fingerprint: another machine's arithmetic stays far below


@dataclass(frozen=True)
class Weights:
    """A checkpoint of MAE, BEiT, MoCo v3, DINO, DeiT, timm, Hugging Face or mmpretrain, loaded into the lent ViT.

    Attributes:
        mean, std: what its input was normalised with; taken from the file, or what the code that made it defaults to.
        heads: number of attention heads, where the file does not tell and the width is none of the published ones.
        size: side of the images in pixels that the ViT is built for, such as the 384 that a file was fine-tuned at; None: the backbone's.
        fingerprint: mean absolute output on a fixed image, as an earlier record has it (facts.fingerprint.mean_abs); another one fails the
            job. None: it is recorded only.
        path: where it lies. No part of the identity: the sha256 of the files is.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    heads: int | None = None
    size: int | None = None
    fingerprint: float | None = None
    path: str = field(default="", compare=False, metadata={"identity": False})

    version: ClassVar[int] = 2
    trains: ClassVar[bool] = False
    seedless: ClassVar[bool] = True
    summary: ClassVar[str] = "a checkpoint as it is (weights:FILE, weights:FOLDER or weights:TIMM_NAME): MAE, BEiT, MoCo v3, DINO, DeiT, timm, ..."
    source: ClassVar[str] = "key names of each: weights/keys.py"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def from_argument(cls, text: str) -> Weights:
        """The method of a file, a folder or the name of a timm model (downloaded once if it is not in the cache).

        Raises:
            UserError: nothing is there, or it is no checkpoint of a ViT in exactly one of the known styles.
        """
        from weights.files import files_of
        from weights.loading import summary
        from weights.timm_models import fetch

        if not text:
            raise UserError("--methods weights: needs a file, a folder or the name of a timm model, as in weights:mae_pretrain_vit_base.pth")
        named = not Path(text).exists() and "/" not in text and Path(text).suffix not in SUFFIXES
        path = (fetch(text) if named else Path(text)).resolve()
        loaded = summary(files_of(path))
        return cls(loaded.mean, loaded.std, path=str(path))

    @property
    def parent(self) -> None:
        return None

    @property
    def leaves_classifier(self) -> bool:
        """Whether the file has a classifier that can be scored as it is."""
        return self.loaded().classifier is not None

    @property
    def label(self) -> str:
        """Names the run's folders by what the file holds, not by where it lies: a moved file is not evaluated again."""
        from weights.files import files_of, sha256

        return f"weights-{self.loaded().style}-{sha256(next(iter(files_of(Path(self.path)).values())))[:8]}"

    def loaded(self) -> Loaded:
        """What the checkpoint is, without its tensors."""
        from weights.files import files_of
        from weights.loading import summary

        return summary(files_of(Path(self.path)))

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """None: nothing is trained."""
        return ()

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """None under any protocol: nothing is trained (see `trains`)."""
        return None

    def assets(self, protocol: Protocol, vit: ViTConfig) -> Mapping[str, Asset]:
        """The checkpoint's files: their sha256 is in the key."""
        from weights.files import files_of, sha256

        return {role: Asset(file=str(path), sha256=sha256(path)) for role, path in files_of(Path(self.path)).items()}

    def transform(self, vit: ViTConfig, recipe: Recipe) -> Callable[[Image, np.random.Generator], dict[str, Tensor]]:
        from harness.augment import TrainTransform

        return TrainTransform(vit.size, recipe.augment)

    def transfer(self, evaluator: str, protocol: Protocol, vit: ViTConfig) -> Overrides:
        """None: the evaluator's own recipe. Which paper's values would suit is not in the file."""
        return Overrides()

    def skip(self, vit: ViTConfig) -> str | None:
        """None.

        Raises:
            UserError: the backbone of this comparison is another one than the checkpoint's. It was named on the command line, so nothing is started.
        """
        different = differences(self.fitted(self.loaded(), vit), vit)
        if different:
            raise UserError(f"--methods weights:{self.path}: not the backbone of this comparison: {'; '.join(different)}: choose a --protocol and --backbone "
                            f"that have the checkpoint's")
        return None

    def notes(self, vit: ViTConfig) -> tuple[str, ...]:
        """What had to be assumed or changed, for the table's footnotes."""
        return self.notes_on(self.loaded(), vit)

    def notes_on(self, loaded: Loaded, vit: ViTConfig) -> tuple[str, ...]:
        """The same of a checkpoint that is read already: in its job a method knows no path."""
        found, notes = self.fitted(loaded, vit), [f"as read: {note}" for note in loaded.notes]
        if not loaded.heads_from and self.heads is None:
            notes.append(f"number of heads not in the file: {vit.heads}, as the backbone's")
        elif loaded.heads_from == PUBLISHED and found.width == 384 and self.heads is None:
            notes.append(f"number of heads not in the file: {found.heads}, as DeiT's and DINO's ViT-S; MoCo v3's has 12")
        if found.size != vit.size:
            pixels = f"{shown(found.size)} to {shown(vit.size)} pixels"
            notes.append(f"position tables interpolated from {shown(found.grid)} to {shown(vit.grid)} patches ({pixels})")
        return tuple(notes)

    def architecture(self, vit: ViTConfig, published: bool) -> ViTConfig:
        """The backbone of a protocol where each method has its ViT as published: with the checkpoint's positions, biases and LayerScale, and MoCo v3's heads.
        Its image size is the backbone's, for which there are recipes, unless `size` is set."""
        if self.size is not None:
            vit = replace(vit, size=(self.size, self.size))
        if not published:
            return vit
        loaded = self.loaded()
        found = loaded.config
        heads = found.heads if loaded.style == "mocov3" and found.width == vit.width else vit.heads  # its ViT-S differs from all others' (recipes A13)
        return replace(vit, heads=heads, positions=found.positions, relative_bias=found.relative_bias, layer_scale=found.layer_scale, key_bias=found.key_bias)

    def fitted(self, loaded: Loaded, vit: ViTConfig) -> ViTConfig:
        """The checkpoint's architecture, with the number of heads from the file, from the user, or from the backbone."""
        if loaded.heads_from not in ("", PUBLISHED) and self.heads not in (None, loaded.config.heads):
            raise UserError(f"--set weights:{self.path}.heads={self.heads}: the checkpoint has {loaded.config.heads} ({loaded.heads_from}): leave it out")
        heads = self.heads or (loaded.config.heads if loaded.heads_from else vit.heads)
        if loaded.config.width % heads:
            return replace(loaded.config, heads=1)  # differs from the backbone's in width anyway
        return replace(loaded.config, heads=heads)

    def objective(self, vit: ViT | None, context: TrainContext) -> None:
        """Loads the lent ViT in place, strictly; there is no loss.

        Raises:
            UserError: the files are not those of an exact checkpoint.
            JobFailed: it does not fit the ViT, or computes something else than the fingerprint says.
        """
        from harness.vit import load_backbone
        from weights.loading import read

        assert vit is not None
        loaded = read(context.assets)
        source = self.fitted(loaded, vit.config)
        if different := differences(source, vit.config):
            raise JobFailed(f"the checkpoint is not the lent ViT: {'; '.join(different)}")
        source = replace(source, layer_scale=vit.config.layer_scale)  # its initial value: no part of trained weights
        vit.load_state_dict(load_backbone(dict(loaded.state), source, vit.config).state_dict(), strict=True)
        value = fingerprint(vit)["mean_abs"]
        if self.fingerprint is not None and abs(value - self.fingerprint) > TOLERANCE * abs(self.fingerprint):
            raise JobFailed(f"the loaded ViT gives {value:.6g} on the fixed image, its fingerprint is {self.fingerprint:.6g}: other weights, or read otherwise")

    def classifier(self, context: TrainContext) -> dict[str, Any] | None:
        """The file's own classifier. A thousand classes are called by ImageNet-1K's synsets in their order, any others by numbers."""
        from timm.data import ImageNetInfo

        from weights.loading import read

        found = read(context.assets).classifier
        if found is None:
            return None
        count, synsets = len(found["state"]["head.bias"]), ImageNetInfo("imagenet-1k").label_names()
        return {**found, "classes": synsets if count == len(synsets) else [str(i) for i in range(count)]}

    def facts(self, vit: ViT, context: TrainContext) -> dict[str, Any]:
        """For the record. What the checkpoint's training has cost is not known here."""
        from weights.loading import read

        loaded = read(context.assets)
        return {
            "images_seen": None, "flops": None, "style": loaded.style, "heads_from": loaded.heads_from or ("the user" if self.heads else "the backbone"),
            "left_out": list(loaded.left_out),
            "notes": list(self.notes_on(loaded, vit.config)), "fingerprint": fingerprint(vit),
        }


def shown(size: tuple[int, int]) -> str:
    """Height x width."""
    return f"{size[0]}x{size[1]}"


def differences(source: ViTConfig, target: ViTConfig) -> list[str]:
    """Why weights of one architecture cannot stand in another: all fields but those that the target can hold exactly.

    A fixed sine-cosine table is a learned one with these values; a k bias of zero is a k bias; the initial value of LayerScale is no part of trained
    weights; another image size means interpolated tables of positions, of which a relative one needs two patches on each side.
    """
    found = []
    resizable = source.relative_bias == "none" or min(*source.grid, *target.grid) > 1
    for name in (f.name for f in fields(ViTConfig)):
        ours, theirs = getattr(target, name), getattr(source, name)
        if name == "layer_scale":
            ours, theirs = (("none" if v is None else "present") for v in (ours, theirs))
        holds = {"size": resizable, "positions": ours == "learned" and theirs != "none", "key_bias": bool(ours)}.get(name, False)
        if ours != theirs and not holds:
            found.append(f"{name} {theirs if name != 'size' else shown(theirs)}, the backbone has {ours if name != 'size' else shown(ours)}")
    return found


def fingerprint(vit: ViT) -> dict[str, Any]:
    """Numbers by which a loaded ViT is recognised: mean absolute value and deviation of its output on a fixed image, and the class token's first values."""
    import torch

    height, width = vit.config.size
    image = torch.sin(torch.arange(3 * height * width, dtype=torch.float64) * 0.0137).reshape(1, 3, height, width).to(vit.cls_token.dtype)
    training = vit.training
    with torch.no_grad():
        tokens = vit.eval().tokens(image)
    vit.train(training)
    return {"mean_abs": tokens.abs().mean().item(), "deviation": tokens.std().item(), "class_token": tokens[0, 0, :4].tolist()}
