"""Training steps of MAE and BEiT in images/s, against transformers' ViTMAE and BEiT and lightly's MAE.

A step is forward, backward and AdamW; ours also normalises uint8 images, as `harness.train` has it, and computes the gradient's norm; rivals get floats.
Ours computes as a job does here (`harness.provenance.set_up`: the GEMMs of this machine, explicit attention with oneDNN or bf16, deterministic algorithms,
freed memory kept). Before each step that counts the same one takes a step that does not.
Each rival runs as it is published: default GEMMs and attention, transformers with fused AdamW as its Trainer, lightly with the optimiser of its example (its
example's model is restated over its modules, with normalised pixels and the paper's decoder). transformers' BEiT gets its labels from the same network as
DALL-E's code runs it: fp32, channels first, logits of all patches. The gate comes first: from the same weights and noise, loss and gradients must be ours; a
rival that is not installed is named and left out. Then what training does besides steps, as a share of a step's time at the default intervals.

Rounds are interleaved in one process: on a CPU one thread and processor seconds, so that other processes count less; on a GPU wall-clock. With a
folder, a dated JSON is written there. The rivals are no dependencies: pip install transformers lightly --no-deps.

    .venv/bin/python benchmarks/step.py [--cases mae-base,mae-demo,...] [--rounds 7] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from report import keep, middle
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from harness.augment import Normalize
from harness.checkpoint import SAVES_APART, States
from harness.metrics import Metrics
from harness.optim import Ema, build_optimizer, clip_gradients, parameter_groups
from harness.plugins import Progress
from harness.provenance import gemm_mode, keep_freed_memory, processor
from harness.restarts import check_finite
from harness.spec import IMAGENET_MEAN, IMAGENET_STD, Recipe, ViTConfig
from harness.store import write_json
from harness.vit import ViT, choose_attention, compile_blocks
from methods.beit import BEiT, BEiTObjective
from methods.dalle import Tokenizer, map_pixels
from methods.mae import MAE, MAEObjective
from methods.masking import block_mask
from methods.targets import Tokens

Batch = dict[str, Tensor]
GOAL = ">= 1.4" if "AMD" in processor() else ">= 1.05"  # of a CPU's step, by its make (R11)
DEMO = ViTConfig(size=(64, 64), patch=8, width=128, depth=6, heads=4, positions="sincos-mae")
BASE = ViTConfig(positions="sincos-mae")
DEMO_BEIT = replace(DEMO, positions="learned", key_bias=False)


@dataclass(frozen=True)
class Case:
    """What is measured: a method on a ViT, images of a step, autocast type, the tokenizer's width, codes and blocks of a group, MAE's ablations."""

    method: str
    vit: ViTConfig
    batch: int
    dtype: torch.dtype = torch.float32
    tokenizer: tuple[int, int, int] = (256, 8192, 2)
    decoder_depth: int | None = None
    see_masks: bool = False


CASES = {
    "mae-base": Case("mae", BASE, 8), "mae-demo": Case("mae", DEMO, 64), "mae-demo-bf16": Case("mae", DEMO, 64, torch.bfloat16),
    "beit-base": Case("beit", replace(BASE, positions="learned", key_bias=False), 2),
    "beit-demo": Case("beit", DEMO_BEIT, 32, tokenizer=(16, 256, 1)), "beit-demo-bf16": Case("beit", DEMO_BEIT, 32, torch.bfloat16, (16, 256, 1)),
}


@dataclass
class Contender:
    """One who takes a step: its module, its optimiser, loss(batch), and the name that it has for each of our parameters."""

    module: nn.Module
    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer
    renamed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    after: Callable[[], object] = lambda: None
    gemm: str = "highest"
    deterministic: bool = False
    trim: int = 2**26  # see `keep_freed_memory`; the most that glibc comes to by itself


def batch_of(case: Case) -> Batch:
    """Images with what hides their patches, and for BEiT the tokenizer's view."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (case.batch, 3, *case.vit.size), dtype=torch.uint8, generator=generator)
    floats = Normalize(IMAGENET_MEAN, IMAGENET_STD)(images)
    if case.method == "mae":
        return {"image": images, "floats": floats, "noise": torch.rand(case.batch, case.vit.patches, generator=generator)}
    import numpy as np

    rng, view = np.random.default_rng(0), [8 * side for side in case.vit.grid]
    masks = [torch.from_numpy(block_mask(rng, BEiT().blocks(case.vit))) for _ in range(case.batch)]
    small = torch.nn.functional.interpolate(images.float(), view, mode="area").to(torch.uint8)
    return {"image": images, "floats": floats, "mask": torch.stack(masks), "tokenizer_image": small, "floats_for_tokenizer": small / 255}


def ours(case: Case, device: str, batch: Batch) -> Contender:
    """Our objective as `fit` trains it."""
    torch.manual_seed(0)
    vit = ViT(case.vit)
    objective: Any
    if case.method == "mae":
        decoder = MAE(decoder_depth=case.decoder_depth).decoder(case.vit)
        objective = MAEObjective(vit, 0.75, decoder, True, Normalize(IMAGENET_MEAN, IMAGENET_STD), case.see_masks)
    else:
        tokenizer = Tokenizer(*case.tokenizer)
        objective = BEiTObjective(vit, Tokens(tokenizer), BEiT().blocks(case.vit).target, Normalize(IMAGENET_MEAN, IMAGENET_STD))
    objective.to(device).train()
    recipe = Recipe(batch=case.batch, lr=1e-4, iterations=1000, frozen=("vit.pos_embed",) if case.method == "mae" else ())
    optimizer = build_optimizer(parameter_groups(objective, recipe, case.vit.depth), recipe)
    parameters, gemm = [p for p in objective.parameters() if p.requires_grad], gemm_mode() if device == "cpu" else "highest"
    torch.set_float32_matmul_precision(gemm)
    choose_attention(objective, torch.device(device), case.dtype)
    return Contender(objective, lambda b: objective(b)["loss"], optimizer, dict, lambda: clip_gradients(parameters, recipe), gemm, True, -1)


# ------------------------------------------------------------------------------------------------------------------- rivals


def hugging_names(state: Mapping[str, Tensor], encoder: str, key_bias: bool) -> dict[str, Tensor]:
    """Our tensors (weights or gradients) under transformers' names."""
    plain = {
        "vit.cls_token": "embeddings.cls_token", "vit.pos_embed": "embeddings.position_embeddings", "vit.norm": "layernorm",
        "vit.patch_embed.proj": "embeddings.patch_embeddings.projection", "vit.blocks": "layers",
    }
    inside = {"attn.proj": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after"}
    out: dict[str, Tensor] = {}
    for ours_, value in state.items():
        name = ours_
        if name.startswith("decoder") or (name == "mask_token" and encoder == "vit"):
            name = "decoder." + name.replace("decoder_blocks", "decoder_layers").replace("decoder_positions", "decoder_pos_embed")
        elif name == "mask_token":
            name = f"{encoder}.embeddings.mask_token"
        elif name.startswith("head."):
            name = name.replace("head", "lm_head")
        elif name.startswith("vit.norm.") and encoder == "beit":
            name = name.removeprefix("vit.").replace("norm", "layernorm")  # behind the model, in front of the head
        else:
            old = next(p for p in plain if name.startswith(p))
            name = f"{encoder}.{plain[old]}{name.removeprefix(old)}"
        for old, new in inside.items():
            name = name.replace(f".{old}.", f".{new}.")
        if ".attn.qkv." not in name:
            out[name] = value
            continue
        for part, piece in zip("qkv", value.chunk(3), strict=True):
            if part != "k" or key_bias or not name.endswith("bias"):
                out[name.replace("attn.qkv", f"attention.{part}_proj")] = piece
    return out


def transformers_mae(case: Case, device: str, batch: Batch) -> Contender:
    """ViTMAEForPreTraining."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    v, (width, depth, heads) = case.vit, MAE().decoder(case.vit)
    model: Any = ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=v.width, num_hidden_layers=v.depth, num_attention_heads=v.heads, intermediate_size=4 * v.width, layer_norm_eps=1e-6,
        image_size=v.size[0], patch_size=v.patch, decoder_hidden_size=width, decoder_num_hidden_layers=depth, decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width, norm_pix_loss=True,
    )).to(device).train()
    return Contender(
        model, lambda b: model(b["floats"], noise=b["noise"]).loss, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True),
        lambda state: hugging_names(state, "vit", True),
    )


def lightly_mae(case: Case, device: str, batch: Batch) -> Contender:
    """lightly's masked ViT and decoder, put together as in its example."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    v, (width, depth, heads) = case.vit, MAE().decoder(case.vit)
    vit = VisionTransformer(img_size=v.size, patch_size=v.patch, num_classes=0, embed_dim=v.width, depth=v.depth, num_heads=v.heads)
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MAEDecoderTIMM(v.patches, v.patch, embed_dim=v.width, decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=heads)
    model = nn.ModuleDict({"backbone": backbone, "decoder": decoder}).to(device).train()
    vit.pos_embed.requires_grad_(False)
    length = backbone.sequence_length

    def loss(b: Batch) -> Tensor:
        images = b["floats"]
        order = torch.cat([torch.zeros_like(b["noise"][:, :1]) - 1, b["noise"]], dim=1).argsort(dim=1)  # random_token_mask, from noise that is given
        keep, hidden = order.tensor_split([1 + int(v.patches * 0.25)], dim=1)
        encoded = decoder.embed(backbone.encode(images=images, idx_keep=keep))
        x = utils.set_at_index(utils.repeat_token(decoder.mask_token, (images.shape[0], length)), keep, encoded.type_as(decoder.mask_token))
        prediction = decoder.predict(utils.get_at_index(decoder.decode(x), hidden))
        target = utils.get_at_index(utils.patchify(images, v.patch), hidden - 1)
        return nn.functional.mse_loss(prediction, utils.normalize_mean_var(target, dim=-1))

    def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {k: f"backbone.{k}" if k.startswith("vit.") else f"decoder.{k.replace('decoder_positions', 'decoder_pos_embed')}" for k in state}
        return {names[k]: value for k, value in state.items()}

    return Contender(model, loss, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4), renamed)


def transformers_beit(case: Case, device: str, batch: Batch) -> Contender:
    """BeitForMaskedImageModeling with labels from the same tokenizer."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    v, codes = case.vit, case.tokenizer[1]
    model: Any = BeitForMaskedImageModeling(BeitConfig(
        hidden_size=v.width, num_hidden_layers=v.depth, num_attention_heads=v.heads, intermediate_size=4 * v.width, layer_norm_eps=1e-6,
        image_size=v.size[0], patch_size=v.patch, vocab_size=codes, layer_scale_init_value=0.0, drop_path_rate=0.0, use_mask_token=True,
        use_absolute_position_embeddings=True,
    )).to(device).train()
    tokenizer = Tokenizer(*case.tokenizer).encoder.to(device, memory_format=torch.contiguous_format)

    def loss(b: Batch) -> Tensor:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            labels = tokenizer(map_pixels(b["floats_for_tokenizer"])).argmax(dim=1).flatten(1)[b["mask"]]
        out: Tensor = model(b["floats"], bool_masked_pos=b["mask"], labels=labels).loss
        return out

    found = Contender(
        model, loss, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), lambda state: hugging_names(state, "beit", False),
    )
    model.lent_tokenizer = [tokenizer]  # a list: none of its parameters
    return found


RIVALS: dict[str, dict[str, Callable[[Case, str, Batch], Contender]]] = {
    "mae": {"transformers": transformers_mae, "lightly": lightly_mae}, "beit": {"transformers": transformers_beit},
}


# --------------------------------------------------------------------------------------------------------------- measuring


def gate(name: str, rival: str, case: Case, our: Contender, their: Contender, batch: Batch) -> dict[str, float]:
    """Give the rival our weights; loss and gradients must then be ours. Returns the relative differences."""
    state = dict(our.module.named_parameters())
    if case.method == "mae":
        state["decoder_positions"] = our.module.decoder_positions  # type: ignore[assignment]
    given = their.renamed({k: v.detach() for k, v in state.items()})
    missing = their.module.load_state_dict(given, strict=False)
    wrong = missing.unexpected_keys + [k for k in missing.missing_keys if "mask_token" not in k]  # lightly's encoder has one that is never used
    if wrong:
        sys.exit(f"{name}: {rival} has other parameters: {', '.join(wrong[:5])}")
    if case.method == "beit":
        their.module.lent_tokenizer[0].load_state_dict(our.module.targets.tokenizer.encoder.state_dict())  # type: ignore[index, union-attr]
    losses = []
    for one in (our, their):
        torch.set_float32_matmul_precision(one.gemm)
        with torch.autocast(batch["image"].device.type, case.dtype, enabled=case.dtype != torch.float32):
            losses.append(loss := one.loss(batch))
        loss.backward()
    theirs = {k: p.grad for k, p in their.module.named_parameters() if p.grad is not None}
    want = their.renamed({k: p.grad for k, p in our.module.named_parameters() if p.grad is not None})
    if set(want) != set(theirs):
        sys.exit(f"{name}: {rival} trains other parameters: {', '.join(sorted(set(want) ^ set(theirs))[:5])}")
    apart = sum(float((theirs[k] - want[k]).square().sum()) for k in want) ** 0.5
    size = sum(float(g.square().sum()) for g in want.values()) ** 0.5
    found = {"loss": abs(float(losses[0].detach() - losses[1].detach())) / abs(float(losses[0].detach())), "gradient": apart / size}
    if found["loss"] > (1e-5 if case.dtype == torch.float32 else 1e-2) or found["gradient"] > (1e-4 if case.dtype == torch.float32 else 5e-2):
        sys.exit(f"{name}: not the same computation as {rival}'s: loss and gradient differ by {found}")
    for one in (our, their):
        one.optimizer.zero_grad(set_to_none=True)
    return found


def seconds(one: Contender, case: Case, batch: Batch) -> float:
    """Seconds of one step."""
    device = batch["image"].device.type
    keep_freed_memory(one.trim)
    torch.set_float32_matmul_precision(one.gemm)
    torch.use_deterministic_algorithms(one.deterministic, warn_only=True)
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    with torch.autocast(device, case.dtype, enabled=case.dtype != torch.float32):
        loss = one.loss(batch)
    loss.backward()
    one.after()
    one.optimizer.step()
    one.optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def compiled(one: Contender, backend: str) -> None:
    """Compile each of our blocks and of timm's; transformers' models as a whole, as its Trainer does."""
    if any(isinstance(part, Block) for part in one.module.modules()):
        compile_blocks(one.module, backend)
    else:
        one.module.compile(backend=backend)


def measure(name: str, case: Case, device: str, rounds: int, backend: str = "") -> list[dict[str, Any]]:
    """Gate, then interleaved rounds, with a `backend` of compiled models. One row for each rival."""
    batch = {k: v.to(device) for k, v in batch_of(case).items()}
    contenders, differences = {"ours": ours(case, device, batch)}, {}
    for rival, build in RIVALS[case.method].items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lightly has a newer class for its decoder
                contenders[rival] = build(case, device, batch)
        except ImportError as error:
            print(f"{name}: no {rival} here ({error.name}): left out", flush=True)
            continue
        differences[rival] = gate(name, rival, case, contenders["ours"], contenders[rival], batch)
    for one in contenders.values():
        if backend:
            compiled(one, backend)
        for _ in range(3 if backend else 1):
            seconds(one, case, batch)
    def turn(one: Contender) -> float:
        if device == "cpu":
            seconds(one, case, batch)  # does not count: the memory that the one before has given back is got anew
        return seconds(one, case, batch)

    taken = [{who: turn(one) for who, one in contenders.items()} for _ in range(rounds)]
    speed = {who: case.batch / statistics.median(t[who] for t in taken) for who in contenders}
    rows = []
    for rival, apart in differences.items():
        ratios = [t[rival] / t["ours"] for t in taken]
        rows.append({
            "name": ", ".join(filter(None, (name, f"batch {case.batch}", str(case.dtype).removeprefix("torch."), backend and f"compiled ({backend})"))),
            **middle(ratios, "ratio"), "rounds": ratios, **({"goal": GOAL} if device == "cpu" else {}), "rival": f"{rival} {importlib.metadata.version(rival)}",
            "images_per_s": {"ours": speed["ours"], "rival": speed[rival]}, "loss_apart": apart["loss"], "gradient_apart": apart["gradient"],
        })
    return rows


def besides(name: str, case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Shares of a step's time, in per cent.

    The average of the weights and the gradients' norm: of every step. A line of metrics.jsonl: every sixth (a 1200-step recipe has 200). progress.json:
    once a second. A training state: every 30 s, or fifty times what the last one took: what training waits for it, and what the writing thread uses.
    """
    batch = {k: v.to(device) for k, v in batch_of(case).items()}
    one = ours(case, device, batch)
    parameters, recipe = [p for p in one.module.parameters() if p.requires_grad], Recipe(batch=case.batch, lr=1e-4, iterations=1000)
    step = statistics.median([seconds(one, case, batch) for _ in range(rounds)])
    for p in parameters:
        p.grad = torch.zeros_like(p)
    average, clock = Ema(one.module, 0.999), time.process_time if device == "cpu" else time.perf_counter

    def median(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(rounds):
            start = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(clock() - start)
        return statistics.median(taken)

    with tempfile.TemporaryDirectory() as folder:
        metrics, states = Metrics(Path(folder) / "metrics.jsonl", "train", 0), States(Path(folder) / "states")
        loss, norm = torch.tensor(1.0, device=device), torch.tensor(1.0, device=device)

        def log() -> None:
            check_finite("train", 1, 2, recipe, loss, norm, states)
            metrics.add(1, {"loss": float(loss), "grad_norm": float(norm), "lr": 1e-4})

        progress = asdict(Progress("train", 1, 2, 1.0, 1.0, 1.0))
        state = {"objective": one.module.state_dict(), "optimizer": one.optimizer.state_dict()}
        share = {
            "EMA": median(lambda: average.update(one.module)) / step, "gradient norm": median(lambda: clip_gradients(parameters, recipe)) / step,
            "log": median(log) / 6 / step, "progress": median(lambda: write_json(Path(folder) / "progress.json", progress)),
        }
        start, wall = clock(), time.perf_counter()
        states.save(1, state)
        waited = time.perf_counter() - wall
        states.wait()
        every = max(30.0, SAVES_APART * states.took)
        share |= {"waiting for states": waited / every, "writing states beside": (clock() - start) / every}
    return {"name": f"{name}, {str(case.dtype).removeprefix('torch.')}: our step, and what training does besides it", "value": step, "unit": "s",
            "rounds": rounds, "percent": {k: 100 * v for k, v in share.items()}}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="mae-base,mae-demo,mae-demo-bf16,beit-base,beit-demo,beit-demo-bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="folder for a dated JSON")
    args = parser.parse_args()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # as `harness.provenance.set_up`
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    rows = []
    for name in args.cases.split(","):
        for row in measure(name, CASES[name], args.device, args.rounds):
            rows.append(row)
            speed, (low, high) = row["images_per_s"], row["spread"]
            print(f"{row['name']}, {args.device}: ours {speed['ours']:.2f} images/s, {row['rival']} {speed['rival']:.2f}: ratio {row['ratio']:.2f} "
                  f"({low:.2f} to {high:.2f}); loss apart {row['loss_apart']:.1e}, gradient {row['gradient_apart']:.1e}", flush=True)
        if name.startswith("mae"):
            rows.append(row := besides(name, CASES[name], args.device, 5))
            print(f"{name}: besides a step of {row['value']:.3f} s: " + ", ".join(f"{k} {v:.2f} %" for k, v in row["percent"].items()), flush=True)
    if args.out:
        hardware = torch.cuda.get_device_name() if args.device == "cuda" else processor()
        keep(f"step-{args.device}", rows, Path(args.out), hardware=hardware)


if __name__ == "__main__":
    main()
