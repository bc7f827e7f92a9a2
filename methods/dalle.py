"""The networks of DALL-E's discrete VAE (openai/DALL-E @ 5be4b23; recipes A16) at any width, and a trained encoder as a tokenizer."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.checkpoint import write_atomically
from harness.pickles import read_module
from harness.spec import JobFailed, UserError
from methods.masking import pick

FORMAT = 1
RELEASED = ("dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock", "dall_e.utils.Conv2d")
EPS = 0.1
STRIDE = 8  # pixels per token and side: three poolings


def map_pixels(x: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9], so that the logit of a pixel is finite."""
    return (1 - 2 * EPS) * x + EPS


def unmap_pixels(x: Tensor) -> Tensor:
    """The inverse of `map_pixels`, cut to [0, 1]."""
    return ((x - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """Convolution that keeps the size; weights normal with deviation 1 / sqrt(fan-in), bias 0."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(inputs * kernel**2))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x -> id(x) + gain * branch(x); the branch has four convolutions at a quarter of the width, each after a ReLU.

    Kernels are 3, 3, 3, 1 in the encoder and 1, 3, 3, 3 in the decoder; gain = 1 / (number of blocks)^2.
    """

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        hidden = outputs // 4
        widths = (inputs, hidden, hidden, hidden, outputs)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU(inplace=i > 0)  # what comes in is needed by the other path
            layers[f"conv_{i + 1}"] = conv(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        half = self.res_path.conv_1.weight.dtype == torch.half
        return self.id_path(x) + self.gain * self.res_path(x.half() if half else x)


def body(first: nn.Conv2d, widths: tuple[int, ...], kernels: tuple[int, ...], blocks: int, between: nn.Module, outputs: int) -> nn.Sequential:
    """First layer, groups of residual blocks with `between` after each but the last, ReLU, 1x1 convolution."""
    gain, inputs = 1 / (len(widths) * blocks) ** 2, first.out_channels
    layers: OrderedDict[str, nn.Module] = OrderedDict(input=first)
    for g, width in enumerate(widths, start=1):
        group: OrderedDict[str, nn.Module] = OrderedDict()
        for b in range(1, blocks + 1):
            group[f"block_{b}"] = ResidualBlock(inputs, width, kernels, gain)
            inputs = width
        if g < len(widths):
            group["rescale"] = between
        layers[f"group_{g}"] = nn.Sequential(group)
    layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv(inputs, outputs, 1)))
    return nn.Sequential(layers)


class Encoder(nn.Module):
    """Mapped pixels (B, 3, H, W) -> logits over the codebook (B, codes, H/8, W/8). The released model has width 256, 8192 codes, 2 blocks a group."""

    def __init__(self, width: int, codes: int, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = body(conv(3, width, 7), (width, 2 * width, 4 * width, 8 * width), (3, 3, 3, 1), blocks, nn.MaxPool2d(2), codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Decoder(nn.Module):
    """One-hot or relaxed codes (B, codes, h, w) -> (B, 6, 8h, 8w): location and log-scale of the logit of each mapped pixel value.

    `initial` is the width after the first layer (128 at the released width of 256).
    """

    def __init__(self, width: int, codes: int, blocks: int = 2, initial: int = 128) -> None:
        super().__init__()
        grow = nn.Upsample(scale_factor=2, mode="nearest")
        self.blocks = body(conv(codes, initial, 1), (8 * width, 4 * width, 2 * width, width), (1, 3, 3, 3), blocks, grow, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def logit_laplace(target: Tensor, output: Tensor) -> Tensor:
    """Negative log-likelihood per value of mapped pixels (B, 3, H, W) under the decoder's output (B, 6, H, W) (DALLE-paper A.3)."""
    location, log_scale = output.float().chunk(2, dim=1)
    jacobian = math.log(2) + torch.log(target * (1 - target))
    return (log_scale + jacobian + (torch.logit(target) - location).abs() * torch.exp(-log_scale)).mean()


class Tokenizer(nn.Module):
    """A trained encoder, frozen. uint8 images (B, 3, 8h, 8w) -> tokens int64 (B, h*w), row by row; with `index` (B, K) those of the places it names, (B, K)."""

    def __init__(self, width: int, codes: int, blocks: int) -> None:
        super().__init__()
        self.codes = codes
        self.encoder = Encoder(width, codes, blocks).to(memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    def halve(self) -> Tokenizer:
        """Cast the residual branches, nine tenths of the work, to fp16, once. What they are added to and the logits stay in fp32.

        On two tokenizers that were trained here (256 codes, 65,536 places) 99.995 % of the tokens are then those of fp32. With everything in fp16 it is
        99.5 % and 99.7 %, with the logits too 99.6 % and 99.8 %, with the 1x1 paths too 99.88 % and 99.90 %.
        """
        for part in self.encoder.modules():
            if isinstance(part, ResidualBlock):
                part.res_path.half()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        layers, head = self.encoder.blocks[:-1], self.encoder.blocks.output.conv
        with torch.autocast(images.device.type, enabled=False):  # a token must not depend on the precision of the training around it
            x = layers(map_pixels(images.float() / 255)).relu_().flatten(2).transpose(1, 2)  # (B, h*w, C)
            return F.linear(x if index is None else pick(x, index), head.weight.flatten(1), head.bias).argmax(-1)


@torch.no_grad()
def decode(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Tokens (B, h, w) -> pixels in [0, 1] (B, 3, 8h, 8w), each the middle of its distribution."""
    output = decoder(F.one_hot(tokens, decoder.blocks.input.in_channels).permute(0, 3, 1, 2).float())
    return unmap_pixels(torch.sigmoid(output[:, :3].float()))


def save_tokenizer(path: Path, encoder: Encoder, decoder: Decoder, config: dict[str, int]) -> None:
    """Write an encoder, with the arguments of `Tokenizer` that rebuild it, and the decoder for pictures of tokens, atomically."""
    encoding, decoding = ({k: v.detach().cpu().contiguous() for k, v in part.state_dict().items()} for part in (encoder, decoder))
    content = {"format": FORMAT, "config": config, "state": encoding, "decoder": decoding}
    write_atomically(path, lambda stream: torch.save(content, stream))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file that `save_tokenizer` wrote, or OpenAI's encoder.pkl.

    Raises:
        UserError: a .pkl is missing, damaged, malicious or no encoder.
        JobFailed: any other file is missing, damaged or of another format.
    """
    if path.suffix == ".pkl":
        encoder = read_released(path)
        if not isinstance(encoder, Encoder):
            raise UserError(f"{path}: holds a decoder: the tokenizer is encoder.pkl of openai/DALL-E")
        first, last = encoder.blocks.input, encoder.blocks.output.conv
        tokenizer = Tokenizer(first.out_channels, last.out_channels, sum(n.startswith("block_") for n, _ in encoder.blocks.group_1.named_children()))
        tokenizer.encoder.load_state_dict(encoder.state_dict(), strict=True)
        return tokenizer
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] == FORMAT:
            tokenizer = Tokenizer(**content["config"])
            tokenizer.encoder.load_state_dict(content["state"], strict=True)
            return tokenizer
    except Exception as error:
        raise JobFailed(f"{path} is no readable tokenizer ({type(error).__name__}): remove its folder, then run with --retry") from error
    raise JobFailed(f"{path} has format {content['format']}, this version reads {FORMAT}")


def load_decoder(path: Path) -> Decoder | str:
    """The decoder of a tokenizer's file: kept in it, or OpenAI's decoder.pkl beside encoder.pkl; else, in words, why there is none.

    It makes pictures and no number, so that nothing here may end a training.
    """
    try:
        if path.suffix == ".pkl":
            beside = path.with_name("decoder.pkl")
            decoder = read_released(beside) if beside.is_file() else None
        else:
            state = torch.load(path, map_location="cpu", weights_only=True).get("decoder")
            decoder = network_of(state) if state is not None else None
    except Exception as error:  # a damaged file: told, and nothing else
        return f"the tokenizer's decoder cannot be read ({type(error).__name__})"
    if not isinstance(decoder, Decoder):
        return "decoder.pkl does not lie beside encoder.pkl" if path.suffix == ".pkl" else "the tokenizer was made before its decoder was kept"
    return decoder.eval().requires_grad_(False)


def read_released(path: Path) -> Encoder | Decoder:
    """OpenAI's encoder.pkl or decoder.pkl: pickled modules, whose tensors are taken and whose classes are not run. Sizes are those of the tensors.

    Raises:
        UserError: the file cannot be read, asks for other classes, or holds other tensors than the two networks have.
    """
    state, _ = read_module(path, RELEASED)
    if unnamed := sorted(k for k in state if k.rsplit(".", 1)[-1] not in ("w", "b")):
        raise UserError(f"{path}: no part of DALL-E's dVAE: it holds {unnamed[0]}, expected encoder.pkl or decoder.pkl of openai/DALL-E")
    state = {k[:-1] + {"w": "weight", "b": "bias"}[k[-1]]: v for k, v in state.items()}
    try:
        return network_of(state)
    except (KeyError, IndexError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{path}: no part of DALL-E's dVAE: {' '.join(str(error).split())[:300]}") from error


def network_of(state: Mapping[str, Tensor]) -> Encoder | Decoder:
    """The encoder or decoder with these tensors, which say its sizes. Raises what missing names and wrong shapes raise."""
    first, last = state["blocks.input.weight"].shape, state["blocks.output.conv.weight"].shape
    blocks = len({k.split(".")[2] for k in state if k.startswith("blocks.group_1.block_")})
    network = Encoder(first[0], last[0], blocks) if first[1] == 3 else Decoder(last[1], first[1], blocks, first[0])
    network.load_state_dict(state, strict=True)
    return network
