"""What a training step leaves out must not show: equal loss and gradients, shapes that never change, blocks that compile without a break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from harness.augment import Normalize
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, ViTConfig
from harness.vit import ViT, compile_blocks
from methods.beit import BEiTObjective
from methods.dalle import Tokenizer
from methods.mae import MAEObjective
from methods.targets import Tokens

SMALL = ViTConfig(size=(32, 32), patch=8, width=16, depth=2, heads=2)
Batch = dict[str, Tensor]


def gradients(objective: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of all parameters by name."""
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def mae() -> tuple[MAEObjective, Batch]:
    """A small MAE with a batch."""
    torch.manual_seed(0)
    objective = MAEObjective(ViT(SMALL), 0.75, (16, 2, 2), True, Normalize(IMAGENET_MEAN, IMAGENET_STD))
    return objective, {"image": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), "noise": torch.rand(4, 16)}


def beit() -> tuple[BEiTObjective, Batch]:
    """A small BEiT with a shared relative bias; its masks hide 6, 2, 1 and 0 of 16 patches."""
    torch.manual_seed(0)
    config = ViTConfig(size=(32, 32), patch=8, width=16, depth=2, heads=2, positions="none", relative_bias="shared")
    objective = BEiTObjective(ViT(config), Tokens(Tokenizer(8, 32, 1)), 6, Normalize(IMAGENET_MEAN, IMAGENET_STD))
    mask = torch.zeros(4, 16, dtype=torch.bool)
    for row, hidden in enumerate(([0, 3, 4, 9, 10, 15], [7, 8], [5], [])):
        mask[row, hidden] = True
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    return objective, {"image": images, "tokenizer_image": images, "mask": mask}


def plain_mae(o: MAEObjective, batch: Batch) -> Tensor:
    """The paper's figure, step by step: all patches embedded, tokens put back in their places, all patches predicted, the visible ones not counted."""
    images, vit = o.normalize(batch["image"]), o.vit
    order = batch["noise"].argsort(dim=1)
    keep, restore = order[:, : o.kept], order.argsort(dim=1)
    x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
    x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for block in vit.blocks:
        x = block(x)
    x = o.decoder_embed(vit.norm(x))
    shuffled = torch.cat([x[:, 1:], o.mask_token.expand(len(x), restore.shape[1] - o.kept, -1)], dim=1)
    x = torch.cat([x[:, :1], shuffled.gather(1, restore[:, :, None].expand(-1, -1, x.shape[-1]))], dim=1) + o.decoder_positions
    for block in o.decoder_blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    prediction = o.decoder_pred(o.decoder_norm(x))[:, 1:]
    target = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(prediction.shape)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (prediction - target).square().mean(-1)[restore >= o.kept].mean()


def plain_beit(o: BEiTObjective, batch: Batch) -> Tensor:
    """Logits of all patches, of which boolean indexing takes those hidden."""
    assert isinstance(o.targets, Tokens)
    mask = batch["mask"]
    logits = o.head(o.encode(o.normalize(batch["image"]), mask))
    tokens = o.targets.tokenizer.encoder(0.8 * batch["tokenizer_image"].float() / 255 + 0.1).argmax(dim=1).flatten(1)
    return nn.functional.cross_entropy(logits[mask], tokens[mask])


@pytest.mark.parametrize(("build", "plain"), [(mae, plain_mae), (beit, plain_beit)])
def test_loss_and_gradients_are_those_of_the_plain_formulation(build: Callable[[], tuple[nn.Module, Batch]], plain: Callable[..., Tensor]) -> None:
    """A shortcut that drops something the loss reads would be another method."""
    objective, batch = build()
    objective.double()
    ours, theirs = objective(batch)["loss"], plain(objective, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # the images are normalised in fp32
    want = gradients(objective, theirs)
    found = gradients(objective, ours)
    assert set(found) == set(want)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's tracer looks at it, and hides the warning itself
@pytest.mark.parametrize("build", [mae, beit])
def test_blocks_compile_once_and_whole(build: Callable[[], tuple[nn.Module, Batch]]) -> None:
    """A graph break or a shape that changes from batch to batch would cost a GPU what compiling wins."""
    from torch._dynamo.utils import counters

    objective, batch = build()
    want = gradients(objective, objective(batch)["loss"])
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(objective, "eager")
    found = gradients(objective, objective(batch)["loss"])
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 3 and not counters["graph_break"]  # encoder, decoder, its last block
    other = {**batch, **({"noise": 1 - batch["noise"]} if "noise" in batch else {"mask": ~batch["mask"].roll(1, 0) & (torch.arange(16) < 6)})}
    objective(other)["loss"].backward()
    assert counters["stats"]["unique_graphs"] == graphs
    assert all(torch.equal(found[name], want[name]) for name in want) and set(objective.state_dict()) == set(build()[0].state_dict())


def test_tokens_of_masked_places_and_of_halved_branches_are_those_of_the_whole_network() -> None:
    """BEiT's labels: at most one in a thousand may change where branches are computed in fp16, and none where only masked places are."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(32, 256, 2)
    images = nn.functional.interpolate(torch.rand(64, 3, 16, 16) * 255, (64, 64), mode="bicubic").clamp(0, 255).to(torch.uint8)
    mapped, head = 0.8 * images.float() / 255 + 0.1, tokenizer.encoder.blocks.output.conv
    logits = tokenizer.encoder(mapped)
    deviation, mean = torch.std_mean(logits, dim=(0, 2, 3))  # all codes in use, as training has it
    head.weight.copy_(head.weight / deviation[:, None, None, None])
    head.bias.copy_((head.bias - mean) / deviation)
    tokens = tokenizer.encoder(mapped).argmax(dim=1).flatten(1)
    index = torch.rand(64, 64).argsort(dim=1)[:, :24]
    assert len(tokens.unique()) > 50 and torch.equal(tokenizer(images), tokens) and torch.equal(tokenizer(images, index), tokens.gather(1, index))
    halved = tokenizer.halve()(images)
    assert (halved == tokens).float().mean() >= 0.999
    assert (tokenizer.half().encoder(mapped.half()).argmax(dim=1).flatten(1) == tokens).float().mean() < 0.999  # all in fp16
