"""The names under which others keep the weights of a ViT, and the contract for each: what is taken, what may be left out, what may be missing.

Sources: facebookresearch/mae @ efb2a80 models_mae.py, models_vit.py; microsoft/unilm @ 768a3c8 beit/modeling_pretrain.py, modeling_finetune.py;
facebookresearch/moco-v3 @ c349e6e moco/builder.py; facebookresearch/dino @ 7c446df main_dino.py, utils.py; facebookresearch/deit @ 7e160fe models.py;
timm 1.0.31 vision_transformer.py, beit.py; transformers 5.23 models vit, vit_mae, beit; open-mmlab/mmpretrain 1.2 vision_transformer.py, beit.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.spec import UserError

WRAPPERS = ("model", "state_dict", "module", "teacher")  # MAE, BEiT and DeiT; mmpretrain and MoCo v3; DeepSpeed; DINO, whose result is the teacher
SHOWN = 4

TIMM = (
    (r"(cls_token|pos_embed|(?:patch_embed\.proj|norm|fc_norm)\.(?:weight|bias))", r"\1"),
    (r"(blocks\.\d+\.(?:norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(?:weight|bias))", r"\1"),
    (r"(blocks\.\d+\.ls[12]\.gamma)", r"\1"),
)
BEIT = (
    *TIMM[:1], (r"(blocks\.\d+\.(?:norm1|norm2|attn\.proj|mlp\.fc1|mlp\.fc2)\.(?:weight|bias))", r"\1"), (r"(blocks\.\d+\.attn\.qkv\.weight)", r"\1"),
    (r"blocks\.(\d+)\.attn\.([qv])_bias", r"blocks.\1.attn.\2.bias"), (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),
    (r"rel_pos_bias\.relative_position_bias_table", "relative_bias.shared"),
    (r"blocks\.(\d+)\.attn\.relative_position_bias_table", r"relative_bias.block.\1"),
)
MM = (
    (r"backbone\.(cls_token|pos_embed)", r"\1"), (r"backbone\.patch_embed\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"backbone\.ln1\.(weight|bias)", r"norm.\1"), (r"backbone\.ln2\.(weight|bias)", r"fc_norm.\1"),
    (r"backbone\.layers\.(\d+)\.ln([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"backbone\.layers\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (r"backbone\.layers\.(\d+)\.attn\.([qv])_bias", r"blocks.\1.attn.\2.bias"),
    (r"backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"backbone\.layers\.(\d+)\.ffn\.layers\.1\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"backbone\.layers\.(\d+)\.(?:attn\.gamma1|ffn\.gamma2)\.weight", r"blocks.\1.ls.gamma"),  # the number is put in by `rename`
    (r"backbone\.layers\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),
    (r"backbone\.rel_pos_bias\.relative_position_bias_table", "relative_bias.shared"),
    (r"backbone\.layers\.(\d+)\.attn\.relative_position_bias_table", r"relative_bias.block.\1"),
)
_HF = r"(?:vit\.|beit\.)?"
HF = (
    (_HF + r"embeddings\.cls_token", "cls_token"), (_HF + r"embeddings\.position_embeddings", "pos_embed"),
    (_HF + r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (_HF + r"encoder\.layer\.(\d+)\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (_HF + r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (_HF + r"encoder\.layer\.(\d+)\.layernorm_before\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (_HF + r"encoder\.layer\.(\d+)\.layernorm_after\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (_HF + r"encoder\.layer\.(\d+)\.intermediate\.dense\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_HF + r"encoder\.layer\.(\d+)\.output\.dense\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (_HF + r"encoder\.layer\.(\d+)\.lambda_([12])", r"blocks.\1.ls\2.gamma"),
    (_HF + r"encoder\.relative_position_bias\.relative_position_bias_table", "relative_bias.shared"),
    (_HF + r"encoder\.layer\.(\d+)\.attention\.attention\.relative_position_bias\.relative_position_bias_table", r"relative_bias.block.\1"),
    (_HF + r"layernorm\.(weight|bias)", r"norm.\1"), (r"beit\.pooler\.layernorm\.(weight|bias)|pooler\.layernorm\.(weight|bias)", r"fc_norm.\1\2"),
)
MOCO, DINO = (tuple((prefix + pattern, ours) for pattern, ours in TIMM) for prefix in (r"base_encoder\.", r"backbone\."))
INDEX = r"(?:.*\.)?relative_position_index"  # computed, not learned


@dataclass(frozen=True)
class Style:
    """One way to name a ViT's weights.

    Attributes:
        take: (pattern of a whole key, our name) of everything that is loaded; q, k and v parts are joined afterwards.
        leave: patterns of keys that a file of this style may hold besides and that are left out: heads, decoders, mask tokens.
        head: pattern of what stands before ".weight" and ".bias" of a fine-tuned classifier; those keys are among `leave`.
        norm_optional: models fine-tuned with mean pooling have no norm for single tokens, only `fc_norm`.
    """

    name: str
    take: tuple[tuple[str, str], ...]
    leave: tuple[str, ...]
    head: str = ""
    norm_optional: bool = True


HEAD = r"head\.(?:weight|bias)"
STYLES = {
    style.name: style for style in (
        Style("mae-pretrain", TIMM, ("mask_token", r"decoder_.*"), norm_optional=False),
        Style("vit", TIMM, (HEAD,), head="head"),
        Style("mocov3", MOCO, (r"base_encoder\.head\..*", r"momentum_encoder\..*", r"predictor\..*"), norm_optional=False),
        Style("dino", DINO, (r"head\.(?:mlp|last_layer)\..*",), norm_optional=False),
        Style("beit", BEIT, ("mask_token", INDEX, HEAD, r"lm_head\.(?:weight|bias)"), head="head"),
        Style("mmpretrain", MM, (r"(?:neck|head|target_generator|data_preprocessor)\..*", r"backbone\.mask_token", INDEX), head=r"head\.(?:layers\.head|fc)"),
        Style("hf-mae", HF, (r"decoder\..*",), norm_optional=False),
        Style("hf-vit", HF, (_HF + r"embeddings\.mask_token", r"classifier\..*", r"decoder\..*", _HF + r"pooler\.dense\..*"), head="classifier"),
        Style("hf-beit", HF, (_HF + r"embeddings\.mask_token", INDEX, r"classifier\..*", r"lm_head\..*"), head="classifier"),
    )
}


def unwrap(content: object, where: str) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    """(state dict, what lies beside it) of a loaded file; a DistributedDataParallel prefix is cut off.

    Raises:
        UserError: there is no state dict in it.
    """
    beside: Mapping[str, object] = {}
    if isinstance(content, Mapping):
        for name in WRAPPERS:
            if isinstance(content.get(name), Mapping):
                beside, content = {k: v for k, v in content.items() if k != name}, content[name]
                break
    if not isinstance(content, Mapping) or not content or not all(isinstance(k, str) for k in content):
        raise UserError(f"{where}: no checkpoint: it holds {describe(content)}, expected tensors by name")
    if others := [k for k, v in content.items() if not isinstance(v, Tensor)]:
        raise UserError(f"{where}: no checkpoint: {listed(others)} {'is' if len(others) == 1 else 'are'} no tensor, expected tensors by name")
    prefix = "module." if all(k.startswith("module.") for k in content) else ""
    return {k[len(prefix) :]: v for k, v in content.items()}, beside


def detect(keys: Iterable[str], where: str) -> Style:
    """The style of a state dict's keys.

    Raises:
        UserError: it is no ViT of a known style.
    """
    names = set(keys)
    if any(k.endswith("embeddings.patch_embeddings.projection.weight") for k in names):
        beit = any(re.search(r"lambda_1|relative_position_bias", k) for k in names) or not any(k.endswith("attention.key.bias") for k in names)
        mae = any(k.startswith("decoder.decoder_layers.") for k in names)
        return STYLES["hf-beit" if beit else "hf-mae" if mae else "hf-vit"]
    if "backbone.patch_embed.projection.weight" in names:
        return STYLES["mmpretrain"]
    for name, prefix in (("mocov3", "base_encoder."), ("dino", "backbone.")):
        if prefix + "patch_embed.proj.weight" in names:
            return STYLES[name]
    if "patch_embed.proj.weight" in names and "blocks.0.attn.qkv.weight" in names:
        if "blocks.0.attn.q_bias" in names:
            return STYLES["beit"]
        return STYLES["mae-pretrain" if "decoder_embed.weight" in names else "vit"]
    raise UserError(f"{where}: no ViT of a known kind (MAE, BEiT, MoCo v3, DINO, timm, Hugging Face, mmpretrain): its keys are {listed(sorted(names))}")


def rename(state: Mapping[str, Tensor], style: Style, where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(tensors under our names, keys left out). Parts of q, k, v are joined; a missing k bias is zero, as BEiT has it.

    Raises:
        UserError: the style knows no such key, or one part of a whole is missing.
    """
    found: dict[str, Tensor] = {}
    left, unknown = [], []
    for key, value in state.items():
        for pattern, ours in style.take:
            if match := re.fullmatch(pattern, key):
                name = match.expand(ours).replace("ls.gamma", "ls1.gamma" if "gamma1" in key else "ls2.gamma")
                if name in found:
                    raise UserError(f"{where}: {name} is there twice, once as {key}: two checkpoints in one")
                found[name] = value.detach().float().contiguous()
                break
        else:
            (left if any(re.fullmatch(p, key) for p in style.leave) else unknown).append(key)
    if unknown:
        raise UserError(f"{where}: keys that a checkpoint of style {style.name} does not have: {listed(unknown)}: another architecture")
    for block in sorted({int(k.split(".")[1]) for k in found if k.startswith("blocks.")}):
        join(found, f"blocks.{block}.attn", where)
    return found, tuple(left)


def split_second_token(state: Mapping[str, Tensor], where: str) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """(a ViT with a class token alone, the rest of it) of DeiT's distilled ViT, whose second token, between class token and patches, has a position and a head.

    The rest is what `methods.deit` keeps of its own: "token" and "token_position" (1, 1, D), "teacher_head.weight" and "teacher_head.bias". It is empty for
    any other state dict, which comes back as it is.

    Raises:
        UserError: a part of the second token is missing, or of another shape.
    """
    if "dist_token" not in state:
        return state, {}
    parts = {k: state[k].detach().float() for k in ("pos_embed", "dist_token", "head_dist.weight", "head_dist.bias") if k in state}
    table, token = (parts.get(k, torch.empty(0)) for k in ("pos_embed", "dist_token"))
    heads = [k for k in parts if k.startswith("head_dist.")]
    if len(heads) == 1 or table.ndim != 3 or table.shape[1] < 3 or token.shape != (1, 1, table.shape[2]):
        raise UserError(f"{where}: dist_token {tuple(token.shape)} with {listed([*heads, 'pos_embed'])} {tuple(table.shape)}: no whole distilled ViT of DeiT's")
    second = {"token": token, "token_position": table[:, 1:2].clone(), **{f"teacher_head.{k.rpartition('.')[2]}": parts[k] for k in heads}}
    rest = {k: v for k, v in state.items() if k not in ("dist_token", *heads)}
    return {**rest, "pos_embed": torch.cat([table[:, :1], table[:, 2:]], dim=1)}, second


def join(found: dict[str, Tensor], place: str, where: str) -> None:
    """Separate q, k, v of one attention become the fused qkv, in place."""
    for kind in ("weight", "bias"):
        parts = {p: found.pop(f"{place}.{p}.{kind}") for p in "qkv" if f"{place}.{p}.{kind}" in found}
        if not parts:
            continue
        if kind == "bias" and set(parts) == {"q", "v"}:
            parts["k"] = torch.zeros_like(parts["q"])
        if set(parts) != {"q", "k", "v"} or f"{place}.qkv.{kind}" in found:
            raise UserError(f"{where}: {place} has {', '.join(sorted(parts))} of q, k and v as {kind}: damaged, or another architecture")
        found[f"{place}.qkv.{kind}"] = torch.cat([parts[p] for p in "qkv"])


def read_out(state: Mapping[str, Tensor], style: Style) -> dict[str, Tensor]:
    """"head.weight" (classes, width) and "head.bias" (classes,) of a fine-tuned classifier, as far as the file has them."""
    found = ((re.fullmatch(rf"{style.head}\.(weight|bias)", key), value) for key, value in state.items()) if style.head else ()
    return {f"head.{match.group(1)}": value.detach().float().contiguous() for match, value in found if match}


def describe(content: object) -> str:
    """What was found where a state dict was expected."""
    return f"a dict with {listed(sorted(map(str, content)))}" if isinstance(content, Mapping) and content else f"a {type(content).__name__}"


def listed(names: Iterable[str]) -> str:
    """The first few of many names."""
    every = list(names)
    return ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")
