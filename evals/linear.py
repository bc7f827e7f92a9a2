"""Linear probe: the ViT is frozen, a linear layer on its features is trained, top-1 on ImageNet's val. By the protocols of MAE, BEiT, MoCo v3, DINO, iGPT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from evals.probe_recipes import CENTRE, EVERY_BLOCK, dino_blocks, rivals
from harness.spec import Augment, Metric, Outcome, Protocol, Recipe, UserError, ViTConfig

if TYPE_CHECKING:
    from harness.checkpoint import Backbone
    from harness.classifier import Classifier
    from harness.data import ImageList
    from harness.plugins import EvalContext, Session

FROZEN = ("vit.*",)
MIDDLE = {"B/16": 9, "L/16": 14}  # the block whose output BEiT's probe reads, from 1 (BEiT-paper App. D; recipes A7)


@dataclass(frozen=True)
class Linear:
    """A linear probe.

    by "mae" (recipes A3): the class token after the final norm, a BatchNorm without affine parameters, LARS, 90 epochs. "beit" (A7): the mean of the patch
    tokens after a middle block, without any norm, AdamW, 50 epochs. "mocov3" (A13): the class token after the final norm, SGD, 90 epochs. "dino" (A14): the
    last class tokens, SGD, 100 epochs. "beit-repo", as BEiT's code does, "igpt" (A15) and "igpt-masked": on every block; one is chosen (`evals.layers`).
    Where the recipe's augmentation is off (`CENTRE`, the demo's choice) the features of the central crops are computed once and all epochs read them; else
    every epoch crops anew, by MAE's protocol with its sampler that does not retry.

    Attributes:
        holdout: fraction of train that is held out and scored instead of val, for tuning; 0 scores val.
        layer: block whose output is read, from 1, in BEiT's protocol; None: 9 of ViT-B, 14 of ViT-L, three fifths of the depth elsewhere (ours).
    """

    holdout: float = 0.0
    by: Literal["mae", "beit", "beit-repo", "mocov3", "dino", "igpt", "igpt-masked"] = "mae"
    layer: int | None = None

    version: ClassVar[int] = 1
    groups: ClassVar[tuple[str, ...]] = ("paper",)
    columns: ClassVar[tuple[Metric, ...]] = (Metric("top-1"),)
    summary: ClassVar[str] = "linear probe on ImageNet with a frozen ViT, top-1"
    source: ClassVar[str] = "MAE-repo main_linprobe.py; MAE-paper Table 10 (recipes A3)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {name: {"by": name} for name in ("beit", "mocov3", "dino", *EVERY_BLOCK)}
    variant_sources: ClassVar[Mapping[str, str]] = {
        "beit": "BEiT-paper App. D, Table 9", "beit-repo": "BEiT-repo run_linear_eval.py; the block is chosen on held-out training images",
        "igpt": "iGPT-paper 4; the block and the learning rate are chosen likewise; causal attention", "igpt-masked": "the same without the causal mask",
        "mocov3": "MoCo3-repo main_lincls.py", "dino": "DINO-repo eval_linear.py: 4 last class tokens of ViT-S, class token and mean of the patches of ViT-B",
    }

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout must be at least 0 and below 1, not {self.holdout}")
        if self.by != "mae" and self.by not in self.variants:
            raise UserError(f"by must be mae, {', '.join(self.variants)}, not {self.by!r}")
        if self.layer is not None and (self.by != "beit" or self.layer < 1):
            raise UserError("layer counts blocks from 1 and belongs to BEiT's protocol: use linear@beit, or leave it out")

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """ImageNet, or any set in its layout."""
        return ("imagenet",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """paper: MAE-paper Table 10 for ViT-B, L and H, or BEiT's for ViT-B and L. demo, smoke: the same optimiser, short (ours)."""
        if self.by != "mae":
            return self.beits(protocol.family, vit) if self.by.startswith("beit") else rivals(self.by, protocol.family, vit)
        if protocol.family == "paper":
            if vit.paper_size not in ("B/16", "L/16", "H/14"):
                return None
            return Recipe(
                batch=16384, lr=0.1, lr_batch=256, epochs=90, warmup=10, optimizer="lars", momentum=0.9, weight_decay=0.0, frozen=FROZEN,
                augment=Augment(crop_scale=(0.08, 1.0)), sources=(("all", "MAE-paper Table 10, MAE-repo main_linprobe.py (recipes A3)"),),
            )
        if protocol.family not in ("demo", "smoke"):
            return None
        demo = protocol.family == "demo"
        return Recipe(
            batch=512 if demo else 64, lr=0.1, lr_batch=256 if demo else 64, epochs=90 if demo else 20, warmup=10 if demo else 2, optimizer="lars",
            momentum=0.9, weight_decay=0.0, frozen=FROZEN, augment=CENTRE,
            sources=(
                ("optimizer, lr, epochs, warmup, schedule, weight_decay", "MAE-paper Table 10 (recipes A3); smoke's length is ours"),
                ("batch, augment", "ours: features of the central crops, computed once"),
            ),
        )

    def beits(self, family: str, vit: ViTConfig) -> Recipe | None:
        """BEiT-paper App. D: AdamW, lr 4e-3 at batch 1024, 50 epochs, weight decay 1e-4, random resized crops and flips. ViT-B and ViT-L. Or its code's."""
        if (family == "paper" and vit.paper_size not in MIDDLE) or family not in ("paper", "demo", "smoke"):
            return None
        if self.by == "beit-repo":
            return self.every_block(family)
        recipe = Recipe(
            batch=1024, lr=4e-3, epochs=50, weight_decay=1e-4, frozen=FROZEN, augment=Augment(crop_scale=(0.08, 1.0)),
            sources=(("all", "BEiT-paper App. D (recipes A7)"), ("augment.crop_scale, betas, warmup", "ours: torchvision's and torch's defaults, no warm-up")),
        )
        if family == "paper":
            return recipe
        sources = (*recipe.sources, ("batch, augment, layer", "ours: features of the central crops, computed once"), ("epochs", "smoke's length is ours"))
        return dataclasses.replace(recipe, batch=512 if family == "demo" else 64, epochs=50 if family == "demo" else 20, augment=CENTRE, sources=sources)

    def every_block(self, family: str) -> Recipe:
        """BEiT-repo run_linear_eval.py, its defaults (recipes A7): AdamW, lr 1e-3 x batch / 256, 100 epochs, all that is trained is decayed."""
        recipe = Recipe(
            batch=1024, lr=1e-3, lr_batch=256, epochs=100, weight_decay=1e-4, decay_vectors=True, frozen=FROZEN, augment=Augment(crop_scale=(0.08, 1.0)),
            sources=(
                ("all", "BEiT-repo run_linear_eval.py, its defaults (recipes A7)"), ("batch", "ours: its 128 a GPU, on eight"),
                ("schedule, augment", "ours: the rate falls with each step, not each epoch; crops are resized bicubic, not bilinear"),
                ("layer", "ours: the best on a fiftieth of train, held out, at the end; the code's is the best on val of all blocks and epochs"),
            ),
        )
        if family == "paper":
            return recipe
        return dataclasses.replace(recipe, batch=64, lr=4e-3, lr_batch=None, epochs=None, iterations=120 if family == "demo" else 20, augment=CENTRE,
                                   sources=(("batch, lr, length, augment", "ours: a budget of seconds, central crops"), *recipe.sources))

    def skip(self, vit: ViTConfig) -> str | None:
        """A layer that the ViT does not have."""
        return f"layer {self.layer} of a ViT of {vit.depth} blocks" if self.layer is not None and self.layer > vit.depth else None

    def on_features(self, recipe: Recipe | None) -> bool:
        """Whether images are not augmented, so that the ViT has to see each once only. Averaged weights (EMA) are `fit`'s."""
        a = Augment() if recipe is None else recipe.augment
        drawn = a.color_jitter or a.rand_augment or a.erasing or a.mixup or a.cutmix or self.by == "beit-repo" or (recipe and recipe.ema)
        return not drawn and (a.crop_scale, a.crop_ratio, a.flip) == (CENTRE.crop_scale, CENTRE.crop_ratio, CENTRE.flip)

    def distributed(self, recipe: Recipe | None) -> bool:
        """Training on features is a matter of seconds, for one process."""
        return not self.on_features(recipe)

    def probe(self, checkpoint: Backbone, classes: tuple[str, ...], augment: Augment) -> Classifier:
        """The frozen ViT, cut after the layer that is read, with its head. BEiT's head start is not published: MAE's is taken."""
        from harness.classifier import PROBE_STD, Classifier

        if self.by == "dino":
            from evals.layers import LastBlocks
            return LastBlocks(checkpoint.build(), classes, checkpoint.mean, checkpoint.std, augment, *dino_blocks(checkpoint.config))
        vit, beit = checkpoint.build(), self.by == "beit"
        if beit:
            vit.blocks = vit.blocks[: self.layer or MIDDLE.get(vit.config.paper_size) or max(1, round(0.6 * vit.config.depth))]
        return Classifier(
            vit, classes, mean=checkpoint.mean, std=checkpoint.std, pooling="plain-mean" if beit else "cls", augment=augment, head_std=PROBE_STD,
            probe=True, batch_norm=self.by == "mae",
        )

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        """Train the probe and score it.

        Raises:
            JobFailed: data or images are broken; the loss is not finite.
        """
        from evals.layers import run as probe_layers
        from evals.scoring import labelled_images, predict, top1
        from harness.augment import EvalTransform, TrainTransform
        from harness.randomness import seed_all
        from harness.train import fit

        if self.by in EVERY_BLOCK:
            return probe_layers(checkpoint, context, self.holdout, self.by, self.on_features(context.recipe))
        session, recipe, size = context.session, context.recipe, checkpoint.config.size
        assert recipe is not None
        train, val = labelled_images("imagenet", session, self.holdout)
        evaluate = EvalTransform(size, 0.875 if max(size) <= 224 else 1.0)  # recipes A3
        seed_all(session.seed, "head")
        probe = self.probe(checkpoint, train.classes, recipe.augment)
        if self.on_features(recipe):
            facts = train_on_features(probe, train, evaluate, recipe, session)
        else:
            facts = fit(probe, train, TrainTransform(size, recipe.augment, retry=self.by != "mae"), recipe, session)
        return top1(predict(probe, val, evaluate, session), val, session, facts)


def collect(probe: Any, images: ImageList, transform: Any, session: Session, name: str = "features") -> Any:
    """Features (n, D), or (n, blocks, D), and places (n,) of all images that can be read, computed once and kept in the job's checkpoint folder."""
    import torch

    from evals.scoring import image_batches
    from harness.checkpoint import write_atomically

    path = Path(session.dir) / "checkpoint" / "features" / f"{name}.pt"  # gone with the training states when the job is done
    probe.to(session.device).eval()
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        return saved["features"], saved["places"]
    rows, kept = [], []
    with torch.no_grad(), torch.autocast(session.device.type, session.dtype, enabled=session.dtype != torch.float32):
        for indices, batch in image_batches(images, transform, session, 64, name):
            rows.append(probe.features(batch).cpu())
            kept += indices
    x, places = torch.cat(rows), torch.tensor(kept)
    write_atomically(path, lambda stream: torch.save({"features": x, "places": places}, stream))
    return x, places


def features(probe: Any, images: ImageList, transform: Any, session: Session) -> Any:
    """Features (see `collect`) and labels (n,) of all images that can be read."""
    import torch

    assert images.labels is not None
    x, places = collect(probe, images, transform, session)
    return x, torch.from_numpy(images.labels)[places]


def train_on_features(probe: Any, images: ImageList, transform: Any, recipe: Recipe, session: Session) -> dict[str, Any]:
    """`harness.train.fit` for what has no augmentation: the ViT runs once over the images, the epochs over its features. Seconds; not saved midway.

    Raises:
        JobFailed: the loss is not finite.
    """
    import torch
    import torch.nn.functional as F

    from harness.metrics import Metrics, count_flops
    from harness.optim import apply_schedule, build_optimizer, clip_gradients, parameter_groups
    from harness.randomness import generator
    from harness.samples import steps_of
    from harness.spec import JobFailed

    x, label = (t.to(session.device) for t in features(probe, images, transform, session))
    per_epoch, total = steps_of(recipe, len(x))
    optimizer = build_optimizer(parameter_groups(probe, recipe, len(probe.vit.blocks)), recipe)
    trained = [p for p in probe.parameters() if p.requires_grad]
    metrics, loss = Metrics(session.dir / "metrics.jsonl", "probe", 0), torch.zeros(())
    probe.train()
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.from_numpy(generator(session.seed, "order", epoch).permutation(len(x))).to(session.device)
        chosen = order[torch.arange(place * recipe.batch, (place + 1) * recipe.batch, device=session.device) % len(x)]
        apply_schedule(optimizer, recipe, step, total)
        scores = probe.read(x[chosen])  # (B, classes), or (B, heads, classes): each head is trained as if alone
        heads = scores[0].numel() // scores.shape[-1]
        loss = heads * F.cross_entropy(scores.flatten(0, -2), label[chosen].repeat_interleave(heads), label_smoothing=recipe.augment.smoothing)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        clip_gradients(trained, recipe)
        optimizer.step()
        if step % max(1, total // 50) == 0 or step == total - 1:
            metrics.add(step + 1, {"loss": float(loss.detach()), "lr": optimizer.param_groups[0]["lr"]})
    if not torch.isfinite(loss):
        raise JobFailed(f"linear probe: loss is {float(loss.detach())} after {total} steps (lr {recipe.peak_lr:.3g}): lower lr with --set linear.recipe.lr=...")
    one = torch.zeros(1, 3, *probe.vit.config.size, dtype=torch.uint8, device=session.device)
    counted: dict[str, Any] = {"flops_per_step": None}
    with torch.no_grad(), count_flops(counted):
        probe.eval().features(one)
    flops = counted["flops_per_step"] * len(x)
    return {"steps": total, "images_seen": len(x), "flops": flops, "loss": float(loss.detach()), "epochs_on_features": total / per_epoch}
