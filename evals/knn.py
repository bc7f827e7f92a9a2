"""k-NN: the nearest training images vote, nothing is trained. DINO's protocol (DINO-repo eval_knn.py; recipes A14)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from harness.spec import Interrupted, Metric, Outcome, Protocol, Recipe, UserError, ViTConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from harness.checkpoint import Backbone
    from harness.plugins import EvalContext, Golden


@dataclass(frozen=True)
class KNN:
    """Weighted vote of the nearest neighbours by cosine similarity of the class token after the final norm, central crops.

    Attributes:
        k: how many neighbours vote.
        temperature: a neighbour's vote is exp(similarity / temperature).
        holdout: fraction of train that is held out and scored instead of val, for tuning; 0 scores val.
    """

    k: int = 20
    temperature: float = 0.07
    holdout: float = 0.0

    version: ClassVar[int] = 1
    trains: ClassVar[bool] = False
    columns: ClassVar[tuple[Metric, ...]] = (Metric("top-1"),)
    summary: ClassVar[str] = "k-NN on ImageNet with frozen features (k 20, temperature 0.07), top-1"
    source: ClassVar[str] = "DINO-repo eval_knn.py, DINO-paper 3.2 (recipes A14)"

    def __post_init__(self) -> None:
        if self.k < 1 or not self.temperature > 0:
            raise UserError(f"k must be at least 1 and temperature positive, not {self.k} and {self.temperature}")
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout must be at least 0 and below 1, not {self.holdout}")

    def datasets(self, protocol: Protocol) -> tuple[str, ...]:
        """ImageNet, or any set in its layout."""
        return ("imagenet",)

    def recipe(self, protocol: Protocol, vit: ViTConfig) -> Recipe | None:
        """Nothing is trained."""
        return None

    def skip(self, vit: ViTConfig) -> str | None:
        """Runs on every ViT."""
        return None

    def golden(self, folder: Path) -> tuple[Golden, ...]:
        """Known answers, see `evals.known_images`."""
        from evals.known_images import neighbours

        return neighbours(self, folder)

    def run(self, checkpoint: Backbone, context: EvalContext) -> Outcome:
        """Compute the features of both splits once, then vote.

        Raises:
            JobFailed: data or images are broken.
        """
        import numpy as np
        import torch

        from evals.linear import collect
        from evals.scoring import labelled_images, top1
        from harness.augment import EvalTransform
        from harness.classifier import Classifier

        session, size = context.session, checkpoint.config.size
        train, val = labelled_images("imagenet", session, self.holdout)
        transform = EvalTransform(size, 0.875 if max(size) <= 224 else 1.0)
        model = Classifier(checkpoint.build(), train.classes, mean=checkpoint.mean, std=checkpoint.std, pooling="cls", probe=True)
        bank, kept = collect(model, train, transform, session, "train features")
        queries, places = collect(model, val, transform, session, "val features")
        assert train.labels is not None
        bank, label = bank.to(session.device), torch.from_numpy(train.labels)[kept].to(session.device)
        predicted = np.full(len(val), -1, dtype=np.int64)
        for begin in range(0, len(queries), 256):
            if session.should_stop():
                raise Interrupted(f"vote: stopped at image {begin} of {len(queries)}")
            part = slice(begin, begin + 256)
            predicted[places[part].numpy()] = vote(queries[part].to(session.device), bank, label, len(train.classes), self.k, self.temperature).cpu().numpy()
        return top1(predicted, val, session, {"images_seen": len(kept), "flops": 0.0, "neighbours": min(self.k, len(bank))})


def vote(queries: Tensor, bank: Tensor, label: Tensor, classes: int, k: int, temperature: float) -> Any:
    """Class of each query, int64 (B,), from features (B, D), those of the labelled images (n, D) and their labels (n,)."""
    import torch
    import torch.nn.functional as F

    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T  # (B, n)
    nearest, where = similarity.topk(min(k, len(bank)), dim=1)
    votes = torch.zeros(len(queries), classes, device=queries.device)
    return votes.scatter_add_(1, label[where], (nearest / temperature).exp()).argmax(1)
