"""The one Vision Transformer of every comparison: timm's, with a seam between embedding, placing and encoding.

Methods act in the seam (drop patches, put mask tokens in, mask attention); evaluators read `features`. Parameter names are
timm's, so that a state dict loads strictly into `timm.models.vision_transformer.VisionTransformer`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.positions import EXTRA, offsets, relative_index, resize_bias, resize_positions, sincos_positions
from harness.spec import ViTConfig


class RelativeBias(nn.Module):
    """Learned relative position bias of BEiT: a table ((2H-1)(2W-1)+3, heads), zero at the start, gathered to (1, heads, 1+N, 1+N)."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(math.prod(offsets(grid)) + EXTRA, heads))
        self.register_buffer("index", relative_index(grid), persistent=False)

    def forward(self, keep: Tensor | None = None) -> Tensor:
        """Additive attention mask (1 or B, heads, n, n); `keep` (B, K) picks the rows and columns of the kept patches and of the class token."""
        index: Tensor = self.index  # type: ignore[assignment]
        bias = self.table[index.reshape(-1)].reshape(*index.shape, -1).permute(2, 0, 1)[None]
        if keep is None:
            return bias
        rows = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], dim=1)  # (B, 1+K)
        return bias[0].permute(1, 2, 0)[rows[:, :, None], rows[:, None, :]].permute(0, 3, 1, 2)


class ViT(VisionTransformer):
    """The shared backbone. Input images are (B, 3, H, W), normalised; H and W multiples of the patch.

    Args:
        config: architecture.
        drop_path: stochastic depth rate of the last block, rising linearly from 0 in the first.
    """

    blocks: Any  # timm declares these too loosely for a type checker
    patch_embed: Any
    pos_embed: Any
    cls_token: Any
    norm: Any

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__(
            img_size=config.size, patch_size=config.patch, num_classes=0, global_pool="token", embed_dim=config.width,
            depth=config.depth, num_heads=config.heads, mlp_ratio=config.mlp_ratio, init_values=config.layer_scale,
            drop_path_rate=drop_path, pos_embed="none" if config.positions == "none" else "learn",
        )
        self.config = config
        with torch.no_grad():
            self.cls_token.mul_(0.02 / 1e-6)  # timm of today starts it at 1e-6; timm 0.3.2, with which MAE, BEiT and DeiT were trained, at 0.02
            if config.positions.startswith("sincos"):
                self.pos_embed.copy_(sincos_positions(config.width, config.grid, config.positions))
        shared = config.relative_bias == "shared"
        count = {"none": 0, "shared": 1, "block": config.depth}[config.relative_bias]
        self.relative_bias = nn.ModuleList(RelativeBias(config.grid, config.heads) for _ in range(count)) if count else None
        self.bias_of_block = [0 if shared else i for i in range(config.depth)]
        if not config.key_bias:
            for block in self.blocks:
                bias, width = block.attn.qkv.bias, config.width
                with torch.no_grad():
                    bias[width : 2 * width].zero_()
                bias.register_hook(lambda g, w=width: torch.cat([g[:w], torch.zeros_like(g[w : 2 * w]), g[2 * w :]]))

    def patches(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Patch embeddings (B, N, D) without positions, row by row. With `keep` (B, K), only those patches are embedded: (B, K, D)."""
        if images.shape[-1] % self.config.patch or images.shape[-2] % self.config.patch:
            raise ValueError(f"image of {images.shape[-2]}x{images.shape[-1]} is no multiple of the patch {self.config.patch}")
        proj = self.patch_embed.proj
        if keep is None:
            x: Tensor = proj(images).flatten(2).transpose(1, 2)
            return x
        p = self.config.patch
        b, c, h, w = images.shape
        pixels = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)
        pixels = pixels.gather(1, keep[:, :, None].expand(-1, -1, pixels.shape[-1]))
        return F.linear(pixels, proj.weight.reshape(proj.weight.shape[0], -1), proj.bias)

    def positions(self, grid: tuple[int, int] | None = None) -> Tensor | None:
        """Position table (1, 1 + N, D) for a grid, None if there is none; another grid than the configured one is interpolated (bicubic)."""
        table: Tensor | None = self.pos_embed
        if table is None or grid is None or grid == self.config.grid:
            return table
        if self.config.positions.startswith("sincos") and not table.requires_grad:
            return sincos_positions(self.config.width, grid, self.config.positions).to(table)
        return resize_positions(table, self.config.grid, grid)

    def place(self, x: Tensor, keep: Tensor | None = None, grid: tuple[int, int] | None = None) -> Tensor:
        """Add positions to patch embeddings (B, N or K, D) and put the class token in front: (B, 1 + N or K, D)."""
        table = self.positions(grid)
        if table is None:
            return torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        body = table[:, 1:]
        if keep is not None:
            body = body.expand(x.shape[0], -1, -1).gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))
        cls = (self.cls_token + table[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls.to(x.dtype), x + body], dim=1)

    def run_blocks(
        self, x: Tensor, keep: Tensor | None = None, causal: bool = False, grid: tuple[int, int] | None = None
    ) -> list[Tensor]:
        """Outputs of all blocks, each (B, 1 + N, D), before the final norm."""
        if self.relative_bias is not None and grid is not None and grid != self.config.grid:
            raise ValueError("a ViT with relative bias takes images of its own size only: derive a config for the new size")
        outputs, biases = [], {}
        for i, block in enumerate(self.blocks):
            mask = None
            if self.relative_bias is not None:
                j = self.bias_of_block[i]
                if j not in biases:
                    biases[j] = self.relative_bias[j](keep)
                mask = biases[j]
                if causal:
                    n = x.shape[1]
                    mask = mask.masked_fill(torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
            once_more = self.grad_checkpointing and torch.is_grad_enabled()  # timm's flag: a block is computed again in the backward pass, to save memory
            run = partial(checkpoint, block, use_reentrant=False) if once_more else block
            x = run(x, attn_mask=mask, is_causal=causal and mask is None)
            outputs.append(x)
        return outputs

    def encode(self, x: Tensor, keep: Tensor | None = None, causal: bool = False, grid: tuple[int, int] | None = None) -> Tensor:
        """All blocks and the final norm: (B, n, D) -> (B, n, D)."""
        out: Tensor = self.norm(self.run_blocks(x, keep, causal, grid)[-1])
        return out

    def tokens(self, images: Tensor) -> Tensor:
        """Class and patch tokens after the final norm, (B, 1 + N, D), for any image size."""
        grid = (images.shape[-2] // self.config.patch, images.shape[-1] // self.config.patch)
        return self.encode(self.place(self.patches(images), grid=grid), grid=grid)

    def features(self, images: Tensor, taps: Sequence[int], norm: bool = False) -> list[Tensor]:
        """Patch tokens after the blocks `taps` (0-based) as maps, a list of (B, D, H/P, W/P), for any image size.

        No norm is applied unless `norm`: the final norm then goes over each map (recipes A9: UperNet's taps are not normed).
        """
        grid = (images.shape[-2] // self.config.patch, images.shape[-1] // self.config.patch)
        outputs = self.run_blocks(self.place(self.patches(images), grid=grid), grid=grid)
        maps = []
        for tap in taps:
            x = self.norm(outputs[tap]) if norm else outputs[tap]
            maps.append(x[:, 1:].transpose(1, 2).reshape(x.shape[0], -1, *grid))
        return maps

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Features of the class token after the final norm, (B, D), as timm's forward with no classifier gives."""
        return self.tokens(x)[:, 0]


def choose_attention(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Explicit attention on a CPU where the fused kernel is slow: in bf16 its backward (1.45 times the images/s), and its many small oneDNN products."""
    if device.type == "cpu" and (dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"):
        for part in module.modules():
            if hasattr(part, "fused_attn"):
                setattr(part, "fused_attn", False)  # noqa: B010  # a module's attributes are tensors to a type checker


def compile_blocks(module: nn.Module, backend: str) -> None:
    """Let torch.compile make kernels of each transformer block by itself: static shapes, no graph breaks. Parameters keep their names."""
    for part in module.modules():
        if isinstance(part, Block):
            part.compile(backend=backend, fullgraph=True, dynamic=False)


def init_mae(vit: nn.Module) -> None:
    """MAE's initialisation (recipes A1): Xavier-uniform Linear weights with zero bias, patch projection as a matrix, tokens normal 0.02."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if isinstance(vit, ViT):
        weight = vit.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.normal_(vit.cls_token, std=0.02)
        if vit.config.positions == "learned":
            nn.init.normal_(vit.pos_embed, std=0.02)


def init_beit(vit: ViT, std: float = 0.02, transfer: bool = False) -> None:
    """BEiT's initialisation (recipes A6): normal 0.02 cut at one standard deviation, output projections of block l divided by sqrt(2 l).

    With `transfer`, as its fine-tuning model starts before a checkpoint is loaded: cut at 2.0, which cuts nothing, and the patch projection
    as torch has it.
    """
    cut = 2.0 if transfer else std

    def draw(parameter: Tensor) -> None:
        nn.init.trunc_normal_(parameter, std=std, a=-cut, b=cut)

    for module in vit.modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and not transfer):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    draw(vit.cls_token)
    if vit.config.positions == "learned":
        draw(vit.pos_embed)
    with torch.no_grad():
        for depth, block in enumerate(vit.blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2.0 * depth))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * depth))


def load_backbone(state: dict[str, Any], config: ViTConfig, target: ViTConfig | None = None, drop_path: float = 0.0) -> ViT:
    """A ViT with the weights of a checkpoint, loaded strictly.

    Args:
        state, config: weights and the architecture that they were trained with.
        target: architecture wanted; may differ from `config` in `size` (positions and relative biases are interpolated) and in
            `relative_bias`, none -> block (added at transfer, zero) or shared -> block (the table is copied into every block).
        drop_path: stochastic depth of the new model.

    Raises:
        ValueError: the two architectures differ in anything else, or keys or shapes do not match.
    """
    target = target or config
    vit, state = ViT(target, drop_path), dict(state)
    fixed = ("patch", "width", "depth", "heads", "mlp_ratio", "layer_scale")
    different = [f for f in fixed if getattr(config, f) != getattr(target, f)]
    if different or (config.positions == "none") != (target.positions == "none"):
        raise ValueError(f"the checkpoint's ViT has another {', '.join(different or ['positions'])} than the one wanted")
    if config.positions != "none":
        state["pos_embed"] = resize_positions(state["pos_embed"], config.grid, target.grid)
    tables = {key: resize_bias(state.pop(key), config.grid, target.grid) for key in list(state) if key.startswith("relative_bias.")}
    if target.relative_bias != config.relative_bias:
        if (config.relative_bias, target.relative_bias) not in {("none", "block"), ("shared", "block")}:
            raise ValueError(f"relative bias {config.relative_bias} cannot become {target.relative_bias}")
        own = {key: value for key, value in vit.state_dict().items() if key.startswith("relative_bias.")}
        tables = {key: tables.get("relative_bias.0.table", value).clone() for key, value in own.items()}
    vit.load_state_dict({**state, **tables}, strict=True)
    return vit
