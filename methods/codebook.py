"""A start for a dVAE from one batch of its images, so that a minute of training is enough (ours, for small budgets; DALL-E starts at random)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.dalle import STRIDE, Decoder, Encoder

CARRIED = 6  # channels that carry colour through all groups: red, green, blue and their negatives, as a ReLU follows


@torch.no_grad()
def start_from_images(encoder: Encoder, decoder: Decoder, pixels: Tensor, spread: float) -> None:
    """Initialise the codebook from a batch of mapped pixels (B, 3, H, W), as is usual for vector quantisers.

    As DALL-E initialises, one code wins everywhere and codes hardly differ for the decoder; a short run never gets out of that, DALL-E has
    three million updates for it. Here codes are coarse contents (2 x 2 colours) of random positions of the batch, logits are minus squared
    distances to them, read linearly from the encoder's features, and the decoder starts from the codes' colours and a random projection of
    them and ends in the least-squares fit to the pixels. Six channels of both networks carry colour from the start; all else stays random.

    Args:
        spread: mean deviation of a code's logit over the positions of the batch; the larger, the surer is each position of its code.
    """
    enc: Any = encoder.blocks
    dec: Any = decoder.blocks
    if min(enc.input.out_channels, dec.input.out_channels, dec.output.conv.in_channels) < CARRIED:
        raise ValueError(f"a start from images needs at least {CARRIED} channels in every layer")
    for network in (encoder, decoder):
        for name, layer in network.named_modules():
            if name.endswith("id_path") and isinstance(layer, nn.Conv2d):
                layer.weight[:CARRIED] = torch.eye(layer.in_channels, device=pixels.device)[:CARRIED, :, None, None]
    enc.input.weight[:CARRIED] = 0
    for channel in range(CARRIED):
        sign = 1.0 if channel < 3 else -1.0
        enc.input.weight[channel, channel % 3, 2:5, 2:5] = 4 * sign / 9  # about the logit of the smoothed pixel
        enc.input.bias[channel] = -2 * sign
    logit, features = torch.logit(pixels), F.relu(enc[:-1](pixels))
    coarse = F.pixel_unshuffle(F.avg_pool2d(logit, STRIDE // 2), 2)  # (B, 12, h, w), colour by colour
    fit = least_squares(features, coarse)  # (12, C + 1)
    points = features.permute(0, 2, 3, 1).flatten(0, 2) @ fit[:, :-1].T + fit[:, -1]  # (positions, 12)
    count = enc.output.conv.out_channels
    order = torch.randperm(len(points), device=points.device).repeat(-(-count // len(points)))
    codes = points[order[:count]]  # (V, 12)
    gain = spread / (points @ codes.T).std(dim=0).mean().clamp(min=1e-6)
    enc.output.conv.weight.copy_((gain * codes @ fit[:, :-1])[:, :, None, None])
    enc.output.conv.bias.copy_(gain * (codes @ fit[:, -1] - codes.pow(2).sum(dim=1) / 2))
    projection = torch.randn(dec.input.out_channels, codes.shape[1], device=codes.device) / codes.norm(dim=1).mean()
    colour = codes.reshape(count, 3, 4).mean(dim=2)  # (V, 3)
    dec.input.weight.copy_((projection @ codes.T)[:, :, None, None])
    dec.input.weight[:CARRIED] = torch.cat([colour, -colour], dim=1).T[:, :, None, None]
    tokens = F.one_hot(encoder(pixels).argmax(dim=1), count).permute(0, 3, 1, 2).float()
    final = F.relu(dec[:-1](tokens))
    fit = least_squares(final, logit)  # (3, width + 1)
    dec.output.conv.weight.zero_()
    dec.output.conv.weight[:3] = fit[:, :-1, None, None]
    dec.output.conv.bias[:3] = fit[:, -1]
    dec.output.conv.bias[3:] = (dec.output.conv(final)[:, :3] - logit).abs().mean(dim=(0, 2, 3)).clamp(min=1e-3).log()


def least_squares(inputs: Tensor, targets: Tensor) -> Tensor:
    """Weights (T, C + 1), the last column a bias, that best give maps (B, T, h, w) from maps (B, C, h, w) place by place; a light ridge."""
    x = inputs.permute(0, 2, 3, 1).flatten(0, 2).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    y = targets.permute(0, 2, 3, 1).flatten(0, 2).double()
    square = x.T @ x
    ridge = 1e-4 * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
    return torch.linalg.solve(square + ridge, x.T @ y).T.float()
