"""timm's pretrained models by name: downloaded once, kept as a folder of safetensors and config.json in the user's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.checkpoint import write_atomically
from harness.spec import UserError, suggest
from weights.architecture import build_timm, from_timm_model


def cache_folder() -> Path:
    """Where downloaded models are kept."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("vision-harness")) / "weights"


def fetch(name: str) -> Path:
    """The folder of a timm model with its pretrained weights.

    Raises:
        UserError: timm has no such model, it is no ViT, it has no weights, or they cannot be downloaded.
    """
    import timm

    flag = f"--methods weights:{name}"
    if not timm.is_model(name):
        raise UserError(f"{flag}: no such file, and timm has no model of this name: {nearest(name)}")
    folder = cache_folder() / name
    if (folder / "config.json").is_file():
        return folder
    from_timm_model(build_timm(name, flag), {}, flag)  # before anything is downloaded
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(f"{flag}: timm has no weights for it: {nearest(name)}")
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise UserError(f"{flag}: its weights are not in the cache and cannot be downloaded ({type(error).__name__}): save the file and name that") from error
    from safetensors.torch import save

    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda stream: stream.write(save(state)))
    write_config(folder, name, {}, {"mean": list(model.pretrained_cfg["mean"]), "std": list(model.pretrained_cfg["std"])})  # last: the folder is complete
    return folder


def write_config(folder: Path, architecture: str, arguments: dict[str, Any], cfg: dict[str, Any]) -> None:
    """config.json as timm reads it (`timm.create_model("local-dir:FOLDER")`)."""
    body = {"architecture": architecture, **arguments, "pretrained_cfg": cfg}
    write_atomically(folder / "config.json", lambda stream: stream.write((json.dumps(body, indent=1) + "\n").encode()))


def nearest(name: str) -> str:
    """Models with weights of about this name."""
    import timm

    models = [m for m in timm.list_pretrained() if m.startswith(("vit_", "beit_", "deit_"))]
    import difflib

    close = difflib.get_close_matches(name, models, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"{suggest(name, ['vit_base_patch16_224.mae', 'deit_base_patch16_224.fb_in1k'])}, ..."
