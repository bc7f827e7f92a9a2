"""DINO's head, its loss over crops, and positions stretched to small crops (DINO-repo vision_transformer.py, main_dino.py; recipes A14)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Three layers with GELU, unit length, then the cosine to each of `prototypes` directions: a weight-normed layer whose gains stay at 1, or are trained."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int, gains: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = nn.Parameter(nn.Linear(bottleneck, prototypes, bias=False).weight.detach())
        self.last_gains = nn.Parameter(torch.ones(prototypes, 1)) if gains else None

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """(n, D) -> (n, K). With `frozen` the last layer gets no gradient, so that the optimiser passes it over, weight decay included."""
        directions = F.normalize(self.last_layer, dim=1)
        directions = directions if self.last_gains is None else self.last_gains * directions
        return F.linear(F.normalize(self.mlp(x), dim=1), directions.detach() if frozen else directions)


def distill(student: Tensor, teacher: Tensor, centre: Tensor, student_temperature: float, temperature: float, images: int) -> tuple[Tensor, Tensor]:
    """Cross entropy of each crop with each large crop of the same image but itself, and the teacher's probabilities.

    Args:
        student: scores (V x B, K) of V crops, crop after crop, the large ones first.
        teacher: scores (2 x B, K) of the large ones.
        centre: taken from the teacher's scores (1, K).
        images: B.

    Returns:
        mean over the 2 (V - 1) pairs and the images; probabilities (2 x B, K).
    """
    wanted = F.softmax((teacher - centre) / temperature, dim=1)
    said = F.log_softmax(student / student_temperature, dim=1).unflatten(0, (-1, images))  # (V, B, K)
    others = said.sum(dim=0) - said[:2]
    loss = -(wanted.unflatten(0, (2, images)) * others).sum(dim=2).mean(dim=1).sum() / (2 * (len(said) - 1))
    return loss, wanted


def stretch(grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """Bicubic interpolation from one grid of positions to a smaller one as a matrix (h w, H W), float64.

    DINO asks for a factor of (h + 0.1) / H where the sizes are h and H, and that factor, not h / H, places the samples. As a product of matrices
    the backward pass is the same in each run; that of torch's interpolation is not on a GPU.
    """
    count, factors = grid[0] * grid[1], ((small[0] + 0.1) / grid[0], (small[1] + 0.1) / grid[1])
    one_each = torch.eye(count, dtype=torch.float64).reshape(1, count, *grid)
    return F.interpolate(one_each, scale_factor=factors, mode="bicubic").flatten(2)[0].T.contiguous()
