"""DINO against the original's recorded numbers: loss with centring, head, crops of two sizes, schedules, clipping, decay, initial values."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from known_answers import (
    PRECISIONS,
    cases,
    check_gradients,
    check_groups,
    check_initial_values,
    check_loss,
    check_values,
    config,
    golden,
    initial,
    initial_vit,
    names,
    section,
    translate,
    vit_config,
    vit_name,
)
from PIL import Image
from protocols_for_tests import family
from torch import Tensor, nn

from harness import plugins
from harness.data import ImageList
from harness.optim import clip_gradients, lr_at, parameter_groups, weight_decay_at
from harness.plugins import Session, TrainContext
from harness.randomness import seed_all
from harness.spec import Recipe, ViTConfig
from harness.train import fit
from harness.vit import ViT
from methods.dino import DINO, DINOObjective
from methods.distillation import Head, distill
from methods.teacher import rising

ARRAYS = golden("dino_loss")
RECIPE = DINO().recipe(family("paper"), ViTConfig())
assert RECIPE is not None
MULTICROP = next(key for key in ARRAYS if key.startswith("multicrop_loss"))
EPOCH, START, END, WARMUP = (float(n) for n in re.fullmatch(r"multicrop_loss_epoch(\d+)_temp_([\d.]+)_([\d.]+)_warmup(\d+)", MULTICROP).groups())
EPOCHS = 100.0


def ours(original: str) -> str:
    """Our name of a parameter of the original's student."""
    where, _, rest = original.partition(".")
    return f"vit.{vit_name(rest)}" if where == "backbone" else original.replace("last_layer.weight_v", "last_layer")


def build(precision: torch.dtype = torch.float32) -> DINOObjective:
    """The recorded student and teacher in our modules."""
    student = section(ARRAYS, "student")
    architecture = vit_config(ARRAYS, {k.removeprefix("backbone."): v for k, v in student.items()}, "crops/0")
    method = DINO(temperature_start=START, temperature=END, temperature_warmup=int(WARMUP), freeze_last=1, hidden=config(ARRAYS, "hid"),
                  bottleneck=config(ARRAYS, "bott"), prototypes=config(ARRAYS, "out"))
    small = (crops()["local"].shape[-2] // architecture.patch, crops()["local"].shape[-1] // architecture.patch)
    objective = DINOObjective(ViT(architecture), method, small, 1000, EPOCHS, nn.Identity())
    state = {"centre": torch.zeros(1, config(ARRAYS, "out"))}
    for side, prefix in (("student", ""), ("teacher", "teacher.")):
        recorded = section(ARRAYS, side)
        assert (recorded.pop("head.last_layer.weight_g") == 1).all()  # ours has no gains
        state |= {prefix + name: value for name, value in translate(recorded, ours).items()}
    objective.load_state_dict(state, strict=True)
    parameter_groups(objective, dataclasses.replace(RECIPE, frozen=()), len(objective.vit.blocks))
    return objective.to(precision).train()


def crops() -> dict[str, Tensor]:
    """The recorded crops as a batch: (B, crops, 3, h, w) of either size."""
    every = [torch.from_numpy(ARRAYS[f"crops/{i}"]) for i in range(len([key for key in ARRAYS if key.startswith("crops/")]))]
    return {"global": torch.stack(every[:2], dim=1), "local": torch.stack(every[2:], dim=1)}


def flat(x: Tensor) -> Tensor:
    """(B, V, ...) -> (V x B, ...), crop after crop."""
    return x.transpose(0, 1).flatten(0, 1)


def test_the_boosted_head_trains_its_gains_once_it_is_thawed() -> None:
    """DINO-repo README: --norm_last_layer false, as torch's own weight norm has it; the plain head has none, so its checkpoints stay as they are."""
    torch.manual_seed(0)
    head, x = Head(8, 8, 4, 6, gains=True), torch.randn(5, 8)
    assert head.last_gains is not None and Head(8, 8, 4, 6).last_gains is None
    with torch.no_grad():
        head.last_gains.uniform_(0.5, 2.0)
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 6, bias=False))
    layer.parametrizations.weight.original0, layer.parametrizations.weight.original1 = (nn.Parameter(p.detach()) for p in (head.last_gains, head.last_layer))
    torch.testing.assert_close(head(x), layer(nn.functional.normalize(head.mlp(x), dim=1)))
    head(x, frozen=True).sum().backward()
    assert head.last_gains.grad is None and head.last_layer.grad is None and head.mlp[0].weight.grad is not None
    head(x).sum().backward()
    assert head.last_gains.grad is not None and plugins.build("methods", "dino@boosted").train_gains


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", cases(ARRAYS, holds="center_initial"))
def test_loss_and_centre_are_the_originals(case: str, precision: torch.dtype) -> None:
    """Three steps on one centre: a step uses the centre from before it. Crops are paired with the large ones but themselves."""
    views, images, width, start, end, warmup, epochs = ARRAYS[f"{case}/config_ncrops_batch_dim_warmuptemp_temp_warmupepochs_epochs"].tolist()
    student_temperature, centre_momentum = ARRAYS[f"{case}/student_temp_and_center_momentum"].tolist()
    method = DINO(temperature_start=start, temperature=end, temperature_warmup=int(warmup), centre_momentum=centre_momentum, hidden=4, bottleneck=4,
                  prototypes=int(width))
    objective = DINOObjective(ViT(ViTConfig(size=(16, 16), patch=8, width=8, depth=1, heads=1)), method, (1, 1), 100, epochs, nn.Identity()).to(precision)
    for epoch, temperature in enumerate(ARRAYS[f"{case}/teacher_temp_schedule"]):
        assert math.isclose(objective.temperature(epoch), temperature, rel_tol=1e-12) and objective.epoch(epoch / epochs) == epoch
    objective.centre.copy_(torch.from_numpy(ARRAYS[f"{case}/center_initial"]))
    for epoch in sorted(int(name[5:]) for name in cases(ARRAYS, f"{case}/") if name.startswith("epoch")):
        at = f"{case}/epoch{epoch}"
        student, teacher = (torch.from_numpy(ARRAYS[f"{at}/{side}"]).to(precision) for side in ("student", "teacher"))
        assert len(student) == views * images
        student.requires_grad_()
        loss, _ = distill(student, teacher, objective.centre, student_temperature, objective.temperature(epoch), int(images))
        check_loss(loss, ARRAYS, f"{at}/loss")
        loss.backward()
        np.testing.assert_allclose(student.grad.numpy(), ARRAYS[f"{at}/grad_student"], rtol=1e-4, atol=1e-6)
        objective.given.copy_(teacher.sum(dim=0, keepdim=True)), objective.number.fill_(len(teacher))
        objective.after_step(0.5)
        np.testing.assert_allclose(objective.centre.numpy(), ARRAYS[f"{at}/center_after"], rtol=1e-5, atol=1e-6)


def test_outputs_features_and_positions_are_the_originals() -> None:
    """Small crops go through the same ViT with stretched positions; a plain resize of the table would be off by 0.3."""
    objective = build()
    given = crops()
    with torch.no_grad():
        check_values(objective.student_outputs(flat(given["global"]), flat(given["local"])), ARRAYS, "student_output")
        check_values(objective.teacher_outputs(flat(given["global"])), ARRAYS, "teacher_output")
        check_values(objective.tokens(objective.vit, given["global"][:, 0]), ARRAYS, "features_global0")
        check_values(objective.tokens(objective.vit, given["local"][:, 0]), ARRAYS, "features_local2")
        check_values(objective.head(torch.from_numpy(ARRAYS["head_input"])), ARRAYS, "head_output")
        table = objective.vit.pos_embed
        check_values(torch.cat([table[:, :1], objective.local.float() @ table[:, 1:]], dim=1), ARRAYS, "pos_embed_at_local_size")


def test_multicrop_loss_gradients_and_clipping_are_the_originals() -> None:
    """The teacher gets no gradient; clipping looks at each tensor by itself."""
    objective = build()
    loss = objective(crops(), EPOCH / EPOCHS)["loss"]
    check_loss(loss, ARRAYS, MULTICROP)
    loss.backward()
    check_gradients(objective, {f"run/{k}": v for k, v in ARRAYS.items() if k.startswith("grad")}, "run", ours)
    assert names(ARRAYS, "names_without_gradient") == ["head.last_layer.weight_g"]  # ours has no gains
    objective.after_step(EPOCH / EPOCHS)
    np.testing.assert_allclose(objective.centre.numpy(), ARRAYS["multicrop_center_after"], rtol=1e-5, atol=1e-6)
    given = dict(objective.named_parameters())
    clip_gradients([p for p in given.values() if p.requires_grad], dataclasses.replace(RECIPE, clip=float(ARRAYS["clip_value"])))
    for name, norm in zip(names(ARRAYS, "grad_names"), ARRAYS["clip_norms_after"], strict=True):
        assert math.isclose(given[ours(name)].grad.norm().item(), norm, rel_tol=1e-4, abs_tol=1e-6), name


def test_weight_decay_is_the_originals() -> None:
    """Class token and positions are decayed, biases and norms are not."""
    groups = parameter_groups(build(), RECIPE, 1)
    expected = dict.fromkeys(names(ARRAYS, "decayed_names"), (RECIPE.weight_decay, 1.0)) | dict.fromkeys(names(ARRAYS, "not_decayed_names"), (0.0, 1.0))
    check_groups(groups, expected, ours)


@pytest.mark.parametrize("case", cases(ARRAYS, "cosine_scheduler/"))
def test_schedules_are_the_originals(case: str) -> None:
    """Learning rate, weight decay and the teacher's momentum, step by step."""
    base, final, epochs, iterations, warmup = ARRAYS[f"cosine_scheduler/{case}/config_base_final_epochs_iters_warmupepochs"].tolist()
    total = int(ARRAYS[f"cosine_scheduler/{case}/length"])
    assert total == epochs * iterations
    recipe = dataclasses.replace(RECIPE, epochs=epochs, warmup=warmup, weight_decay=base, weight_decay_end=final)
    recipe = dataclasses.replace(recipe, lr=base, lr_batch=None, min_lr=min(base, final))
    for i, value in zip(ARRAYS[f"cosine_scheduler/{case}/index"].tolist(), ARRAYS[f"cosine_scheduler/{case}/value"].tolist(), strict=True):
        if final <= base:
            assert math.isclose(lr_at(recipe, i, total), value, rel_tol=1e-12), i
        elif final == 1:
            assert math.isclose(rising(base, i / total), value, rel_tol=1e-12), i
        else:
            assert math.isclose(weight_decay_at(recipe, i, total), value, rel_tol=1e-12), i


def test_initial_values_are_the_originals() -> None:
    """Of the student; the teacher starts as the same numbers."""
    table = {n: row for n, row in initial("dino").items() if n != "head.last_layer.weight_g"}
    for name, row in table.items():
        if row["absmax"] == 2.0:  # one element at the end of the truncation, where torch's draw ends up once in millions: this one is taken out
            twin = table[re.sub(r"blocks\.\d+", "blocks.0", name)]
            assert twin["absmax"] < 0.2
            n = math.prod(row["shape"])
            row |= {"rms": math.sqrt(row["rms"] ** 2 - 4 / n), "absmax": twin["absmax"]}
    vit = initial_vit({n.removeprefix("backbone."): row for n, row in table.items()})
    hidden, bottleneck, prototypes = (table[f"head.{n}"]["shape"][0] for n in ("mlp.0.weight", "mlp.4.weight", "last_layer.weight_v"))
    seed_all(0, "init")
    objective = DINOObjective(ViT(vit), DINO(hidden=hidden, bottleneck=bottleneck, prototypes=prototypes), (1, 1), 10, EPOCHS, nn.Identity())
    values = dict(objective.named_parameters())
    check_initial_values({name: values[ours(name)] for name in table}, table)
    assert len(values) == 2 * len(table)
    assert all(torch.equal(values[n.removeprefix("teacher.")], p) for n, p in values.items() if n.startswith("teacher."))


TINY = ViTConfig(size=(32, 32), patch=8, width=16, depth=1, heads=2)
SHORT = Recipe(batch=6, lr=0.1, epochs=4, optimizer="sgd", weight_decay=0.04, clip=3.0, clip_mode="tensor", precision="fp32")


def train(folder: Path, images: Path, micro_batch: int | None = None, epochs_frozen: int = 1) -> DINOObjective:
    """Four epochs of one step of a tiny DINO."""
    folder.mkdir()
    method = DINO(local_crops=2, freeze_last=epochs_frozen, prototypes=32)
    seed_all(3, "init")
    objective = method.objective(ViT(TINY), TrainContext(TINY, SHORT, 4))
    files = ImageList(images, sorted(p.name for p in images.glob("*.png")), None, ())
    fit(objective, files, method.transform(TINY, SHORT), SHORT, Session(folder, 3, torch.device("cpu"), torch.float32, {}, micro_batch=micro_batch))
    return objective


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six images."""
    root = tmp_path_factory.mktemp("dino")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / f"{i}.png")
    return root


def test_a_batch_may_be_split(place: Path, tmp_path: Path) -> None:
    """The centre is that of the whole step, whatever its parts; the teacher, which is exported, has moved and is not the student."""
    whole, parts = (train(tmp_path / name, place, micro).state_dict() for name, micro in (("whole", None), ("parts", 2)))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert whole["centre"].any()
    objective = train(tmp_path / "again", place)
    exported = objective.export().state_dict()
    assert all(torch.equal(exported[k], whole[f"teacher.vit.{k}"]) for k in exported)
    moved = whole["vit.norm.weight"] - exported["norm.weight"], exported["norm.weight"] - 1
    assert all(d.abs().max() > 1e-5 for d in moved)


def test_the_last_layer_waits(place: Path, tmp_path: Path) -> None:
    """Neither gradient nor weight decay moves it in the first epochs."""
    seed_all(3, "init")
    start = DINO(local_crops=2, prototypes=32).objective(ViT(TINY), TrainContext(TINY, SHORT, 4)).head.last_layer
    ends = {n: train(tmp_path / str(n), place, epochs_frozen=n).head.last_layer for n in (1, 4)}
    assert torch.equal(ends[4], start) and not torch.equal(ends[1], start)


def test_sizes_and_refusals() -> None:
    """Small crops keep the papers' proportion; sizes without a source have no recipe; a relative bias cannot take two sizes."""
    demo, small = ViTConfig(size=(64, 64), patch=8, width=96, depth=4, heads=3), ViTConfig(width=384, heads=6)
    assert DINO().local_grid(ViTConfig()) == (6, 6) and DINO().local_grid(demo) == (3, 3)
    repo = DINO(**DINO.variants["repo"])
    assert [bool(m.recipe(family("paper"), v)) for m in (DINO(), repo) for v in (ViTConfig(), small, ViTConfig(width=1024, depth=24, heads=16))] == [
        True, False, False, True, True, False]
    biased = dataclasses.replace(demo, positions="none", relative_bias="shared")
    assert "small crops" in (DINO().skip(biased) or "") and DINO(local_crops=0).skip(biased) is None
    sample = DINO().transform(demo, SHORT)(Image.new("RGB", (80, 70)), np.random.default_rng(0))
    assert {k: tuple(v.shape) for k, v in sample.items()} == {"global": (2, 3, 64, 64), "local": (10, 3, 24, 24)}
