"""Classification with the shared ViT: read-out and loss with mixup. Fine-tuning, probing and the supervised method use it."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.augment import Normalize
from harness.batches import BatchNorm
from harness.spec import Augment, JobFailed
from harness.vit import ViT

FINE_TUNE_STD = 2e-5  # MAE: trunc_normal std 2e-5 (recipes A2); BEiT: std 0.02 x init_scale 0.001 (A7), the same
PROBE_STD = 0.01  # MAE's linear probe (A3)
Pooling = Literal["cls", "mean", "plain-mean"]


def single(x: Tensor) -> Tensor:
    """At least single precision: what was computed in half precision is scored and summed in float32, a model in float64 stays there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Classifier(nn.Module):
    """A ViT with a linear read-out. Images are uint8 or float (B, 3, H, W) with values 0..255 and are normalised inside.

    Args:
        vit: the lent ViT, kept as `vit`, so that layer decay sees its parameters.
        classes: class names, or their number where nobody will compare names.
        mean, std: what images are normalised with: those of the pre-training.
        pooling: "cls" reads the class token after the final norm; "mean" the mean of the patch tokens before it, through a fresh
            LayerNorm `fc_norm`: the final norm is then not used and not trained, as in MAE's and BEiT's fine-tuning (recipes A2, A7);
            "plain-mean" the same mean without any norm, as in BEiT's linear probe (A7).
        augment: mixup, cutmix and smoothing of the training loss.
        head_std: of the truncated normal that the head's weights start from.
        probe: the ViT stays frozen and in eval mode.
        batch_norm: a BatchNorm without affine parameters before the head (recipes A3); by default that of a probe.
    """

    def __init__(
        self, vit: ViT, classes: Sequence[str] | int, *, mean: Sequence[float], std: Sequence[float], pooling: Pooling = "mean",
        augment: Augment | None = None, head_std: float = 0.02, probe: bool = False, batch_norm: bool | None = None,
    ) -> None:
        super().__init__()
        self.classes = tuple(f"{i}" for i in range(classes)) if isinstance(classes, int) else tuple(classes)
        if len(self.classes) < 2:
            raise JobFailed(f"a classifier needs two classes or more, the data has {len(self.classes)}")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be {', '.join(get_args(Pooling))}, not {pooling!r}")
        self.vit, self.pooling, self.probe, self.augment = vit, pooling, probe, augment or Augment()
        self.normalize = Normalize((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
        width = vit.config.width
        self.fc_norm = nn.LayerNorm(width, eps=1e-6) if pooling == "mean" else nn.Identity()
        self.batch_norm = BatchNorm(width, affine=False, eps=1e-6) if (probe if batch_norm is None else batch_norm) else nn.Identity()
        self.head = nn.Linear(width, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)
        if pooling != "cls":
            vit.norm.requires_grad_(False)
        if probe:
            vit.requires_grad_(False)
        self._mixup: Any = None
        if self.augment.mixup > 0 or self.augment.cutmix > 0:
            from timm.data.mixup import Mixup

            make: Any = Mixup  # timm has no types
            self._mixup = make(
                mixup_alpha=self.augment.mixup, cutmix_alpha=self.augment.cutmix, prob=self.augment.mixup_prob,
                switch_prob=self.augment.mixup_switch_prob, label_smoothing=self.augment.smoothing, num_classes=len(self.classes),
            )

    def train(self, mode: bool = True) -> Classifier:
        """A probed ViT stays in eval mode."""
        super().train(mode)
        if self.probe:
            self.vit.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """What the read-out reads, float (B, D), of images with values 0..255."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.probe):
            return self._pooled(self.normalize(images))

    def _pooled(self, images: Tensor) -> Tensor:
        """Pooled tokens (B, D) of normalised images."""
        grid = (images.shape[-2] // self.vit.config.patch, images.shape[-1] // self.vit.config.patch)
        x = self.vit.run_blocks(self.vit.place(self.vit.patches(images), grid=grid), grid=grid)[-1]  # (B, 1 + N, D)
        pooled: Tensor = self.vit.norm(x[:, 0]) if self.pooling == "cls" else self.fc_norm(x[:, 1:].mean(dim=1))  # fc_norm: nothing for plain-mean
        return single(pooled)

    def read(self, features: Tensor) -> Tensor:
        """Class scores (B, classes), float, of features (B, D)."""
        scores: Tensor = self.head(self.batch_norm(features))
        return single(scores)

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (B, classes) of images with values 0..255."""
        return self.read(self.features(images))

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """Loss and batch accuracy (0..1, against the unmixed labels) of {"image": (B, 3, H, W), "label": int64 (B,)}.

        Mixup draws from numpy's global generator, which `harness.train.fit` seeds for each step.
        """
        label = batch["label"]
        if self._mixup is None or not self.training:
            scores = self.logits(batch["image"])
            loss = F.cross_entropy(scores, label, label_smoothing=self.augment.smoothing if self.training else 0.0)
        else:
            images, target = self._mix(self.normalize(batch["image"]), label)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.probe):
                pooled = self._pooled(images)
            scores = self.read(pooled)
            loss = F.cross_entropy(scores, target)
        return {"loss": loss, "top1": (scores.argmax(1) == label).float().mean()}

    def _mix(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images and soft targets (B, classes); timm's Mixup pairs first with last and wants an even batch, an odd one's last is left plain."""
        even = len(images) // 2 * 2
        if even == len(images):
            mixed: tuple[Tensor, Tensor] = self._mixup(images, label)
            return mixed
        smoothing, count = self.augment.smoothing, len(self.classes)
        plain = F.one_hot(label[even:], count).float() * (1 - smoothing) + smoothing / count
        if even == 0:
            return images, plain
        first, target = self._mixup(images[:even].clone(), label[:even])
        return torch.cat([first, images[even:]]), torch.cat([target, plain])

    def classifier(self) -> dict[str, Any]:
        """The read-out as tensors and plain values, kept beside the ViT's weights; `restore` is the inverse. A subclass adds "class", its "module:Name"."""
        state = {k: v.detach().cpu().clone() for k, v in self.state_dict().items() if not k.startswith("vit.")}
        return {"classes": list(self.classes), "pooling": self.pooling, "probe": self.probe, "state": state}

    @classmethod
    def restore(cls, vit: ViT, saved: Mapping[str, Any], mean: Sequence[float], std: Sequence[float], augment: Augment | None = None) -> Classifier:
        """The trained model from its ViT and what `classifier` gave; `augment` is for training on.

        Raises:
            JobFailed: the saved read-out does not fit the ViT, or is none of this class.
        """
        try:
            kind: type[Classifier] = pkgutil.resolve_name(saved["class"]) if "class" in saved else cls
            model = kind(vit, saved["classes"], mean=mean, std=std, pooling=saved["pooling"], probe=saved["probe"], augment=augment)
            missing, unexpected = model.load_state_dict(dict(saved["state"]), strict=False)
        except (AttributeError, ImportError, KeyError, RuntimeError, ValueError) as error:
            raise JobFailed(f"the checkpoint's classifier cannot be used ({' '.join(str(error).split())[:120]})") from error
        if unexpected or any(not k.startswith("vit.") for k in missing):
            raise JobFailed("the checkpoint's classifier has other parameters than a read-out of this version")
        return model
