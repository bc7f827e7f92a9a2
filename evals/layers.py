"""Linear probes on several blocks: on each, by BEiT's run_linear_eval.py (recipes A7) or iGPT's protocol (A15); on the last ones together, by DINO's (A14)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.scoring import labelled_images, score, top1
from harness.augment import EvalTransform, Normalize, TrainTransform
from harness.classifier import PROBE_STD, Classifier, single
from harness.randomness import seed_all
from harness.train import fit

if TYPE_CHECKING:
    from harness.checkpoint import Backbone
    from harness.plugins import EvalContext
    from harness.spec import Augment, Outcome
    from harness.vit import ViT

HELD = 0.02  # of the training images: 25,623 of ImageNet's
FEW, HELD_OF_FEW = 50_000, 0.1  # of fewer training images, where learning rates are chosen too
RATES = (1.0, 1 / 3, 0.1, 1 / 30, 0.01, 1 / 300)  # of iGPT's highest, 30: 30, 10, 3, ... (recipes A15)


class LayerProbes(nn.Module):
    """A frozen ViT and a linear head on the output of each block: the class token and the mean of the patch tokens side by side, before any final norm.

    The heads share a pass and nothing else: the loss is the sum of theirs, so that each is trained as if alone. `rates` are parts of the recipe's learning
    rate, with a head for each: scores times sqrt(rate) make SGD move what multiplies the features by rate times as much.

    Args:
        vit: the ViT, which stays in eval mode.
        classes: number of classes.
        mean, std: what images are normalised with: those of the pre-training.
    """

    rates: tuple[float, ...] = (1.0,)
    parts = 2  # widths of the ViT that a head reads
    gains: Tensor

    def __init__(self, vit: ViT, classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.normalize = Normalize((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
        heads = [nn.Linear(self.parts * vit.config.width, len(self.rates) * classes) for _ in vit.blocks]
        for head in heads:
            nn.init.trunc_normal_(head.weight, std=PROBE_STD)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)  # of a block, those of all rates in one
        self.register_buffer("gains", torch.tensor(self.rates)[:, None].sqrt(), persistent=False)

    def train(self, mode: bool = True) -> LayerProbes:
        """The ViT stays in eval mode."""
        super().train(mode)
        self.vit.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Of each block, (B, blocks, 2 D), of images (B, 3, H, W) with values 0..255."""
        outputs = self.vit.run_blocks(self.vit.place(self.vit.patches(self.normalize(images))))
        return torch.stack([single(torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1)) for x in outputs], dim=1)

    def read(self, features: Tensor) -> Tensor:
        """Class scores of each head, float (B, blocks x rates, classes), the rates of a block side by side, of features (B, blocks, ...)."""
        scores = [single(head(x)).unflatten(1, (len(self.rates), -1)) for head, x in zip(self.heads, features.unbind(dim=1), strict=True)]
        return (torch.stack(scores, dim=1) * self.gains).flatten(1, 2)

    def logits(self, images: Tensor) -> Tensor:
        """Class scores of each head (see `read`) of images with values 0..255."""
        return self.read(self.features(images))

    def forward(self, batch: Mapping[str, Tensor], progress: float = 0.0) -> dict[str, Tensor]:
        """{"image": (B, 3, H, W), "label": int64 (B,)} -> the sum of the heads' mean losses, and the best one's accuracy in this batch."""
        scores, label = self.logits(batch["image"]), batch["label"]
        losses = [F.cross_entropy(scores[:, i], label) for i in range(scores.shape[1])]
        return {"loss": torch.stack(losses).sum(), "top1": (scores.argmax(-1) == label[:, None]).float().mean(0).max()}


class MeanProbes(LayerProbes):
    """iGPT's read-out: the mean of the patch tokens that a block gives, after the norm that comes next in the ViT; six learning rates (recipes A15).

    What is averaged is said by iGPT-repo src/model.py, of its last layer: all places after the norm. Ours: without the start token, which sees no image.
    """

    rates, parts, causal = RATES, 1, False

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Of each block, (B, blocks, D), of images (B, 3, H, W) with values 0..255."""
        outputs = self.vit.run_blocks(self.vit.place(self.vit.patches(self.normalize(images))), causal=self.causal)
        norms = [*(block.norm1 for block in self.vit.blocks[1:]), self.vit.norm]
        return torch.stack([single(norm(x)[:, 1:].mean(dim=1)) for norm, x in zip(norms, outputs, strict=True)], dim=1)


class CausalProbes(MeanProbes):
    """The same with attention to the patches before alone, as iGPT was pre-trained."""

    causal = True


PROBES: Mapping[str, type[LayerProbes]] = {"beit-repo": LayerProbes, "igpt": CausalProbes, "igpt-masked": MeanProbes}  # by `evals.linear.Linear.by`


class LastBlocks(Classifier):
    """A frozen ViT with DINO's read-out: a linear layer on the class tokens of the last `blocks` blocks, each after the final norm, side by side.

    Args:
        blocks: how many.
        patches: the mean of the last block's patch tokens, after the norm, stands behind them.
        others: see `harness.classifier.Classifier`.
    """

    def __init__(
        self, vit: ViT, classes: tuple[str, ...], mean: Sequence[float], std: Sequence[float], augment: Augment, blocks: int, patches: bool
    ) -> None:
        super().__init__(vit, classes, mean=mean, std=std, augment=augment, pooling="cls", probe=True, batch_norm=False)
        self.blocks, self.patches = blocks, patches
        self.head = nn.Linear(vit.config.width * (blocks + patches), len(self.classes))
        nn.init.normal_(self.head.weight, std=PROBE_STD)
        nn.init.zeros_(self.head.bias)

    def _pooled(self, images: Tensor) -> Tensor:
        last = [self.vit.norm(x) for x in self.vit.run_blocks(self.vit.place(self.vit.patches(images)))[-self.blocks :]]
        return single(torch.cat([x[:, 0] for x in last] + [last[-1][:, 1:].mean(dim=1)] * self.patches, dim=1))


def run(checkpoint: Backbone, context: EvalContext, holdout: float, by: str, on_features: bool) -> Outcome:
    """Train the probes on train but for the images held out, choose a head by those, score it on val. For the arguments see `evals.linear.Linear`.

    Facts beside those of `fit`: layer, from 1, and lr; held_out_images; held_out_by_layer and top1_by_layer, 0..100 for each block at its best rate.

    Raises:
        JobFailed: data or images are broken; the loss is not finite.
    """
    from evals.linear import train_on_features

    session, recipe, size, probes = context.session, context.recipe, checkpoint.config.size, PROBES[by]
    assert recipe is not None
    train, val = labelled_images("imagenet", session, holdout)
    rest, held = train.split(HELD_OF_FEW if len(probes.rates) > 1 and len(train) < FEW else HELD)
    evaluate = EvalTransform(size, 0.875 if max(size) <= 224 else 1.0)  # run_linear_eval.py: 256 to 224, bicubic
    seed_all(session.seed, "head")
    model: Any = probes(checkpoint.build(), len(train.classes), checkpoint.mean, checkpoint.std)  # Any: of a Classifier, `score` calls logits alone
    if on_features:
        facts = train_on_features(model, rest, evaluate, recipe, session)
    else:
        facts = fit(model, rest, TrainTransform(size, recipe.augment), recipe, session)
    predicted, accuracy = [], []
    for stage, images in (("choose", held), ("predict", val)):
        assert images.labels is not None
        classes = np.full((len(images), len(model.heads) * len(probes.rates)), -1, dtype=np.int64)  # -1: skipped as unreadable, which counts as wrong
        places, rows = score(model, images, evaluate, session, stage=stage, read=lambda scores: scores.argmax(-1))
        classes[places] = rows
        predicted.append(classes)
        accuracy.append(100.0 * (classes == images.labels[:, None]).mean(axis=0))
    by_layer = accuracy[0].reshape(-1, len(probes.rates))  # of equals the first: the earliest block, the highest rate
    heads = by_layer.argmax(axis=1) + np.arange(len(by_layer)) * len(probes.rates)
    best = int(by_layer.max(axis=1).argmax())
    chosen = {
        "layer": best + 1, "lr": recipe.peak_lr * probes.rates[heads[best] % len(probes.rates)], "held_out_images": len(held),
        "held_out_by_layer": accuracy[0][heads].tolist(), "top1_by_layer": accuracy[1][heads].tolist(),
    }
    return top1(predicted[1][:, heads[best]], val, session, {**facts, **chosen})
