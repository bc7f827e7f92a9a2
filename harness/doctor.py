"""`harness doctor`: what works on this machine, what does not, and the remedy."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import warnings
from pathlib import Path

from harness import plugins
from harness.data import locate, missing
from harness.layout import check_layout
from harness.provenance import processor, versions
from harness.request import resolve_precision
from harness.spec import UserError
from harness.store import Store


def examine(data: str | None, runs: Path) -> int:
    """Print one line for each thing looked at; 1 when something that a run needs does not work, else 0."""
    import torch

    problems = 0

    def say(good: bool | None, text: str, remedy: str = "") -> None:
        nonlocal problems
        problems += good is False
        print(f"{'ok  ' if good else '--  ' if good is None else 'BAD '} {text}{'' if good else ': ' + remedy if remedy else ''}")

    say((3, 10) <= sys.version_info[:2] < (3, 14), f"python {sys.version.split()[0]}", "mmengine needs 3.10 to 3.13")
    for name, found in versions().items():
        if name != "python":
            say(True, f"{name} {found}")
    for module, extra in (("mmengine", "dense"), ("mmseg", "dense"), ("mmdet", "dense"), ("pycocotools", "dense")):
        if importlib.util.find_spec(module) is None:
            say(False, f"{module} is not installed", f"pip install 'vision-pretraining-harness[{extra}]', needed by ade20k and coco")
    say(True, f"processor {processor()}")
    say(torch.cuda.is_available() or None, f"cuda: {torch.cuda.device_count()} devices", "none, the processor is used")
    say(True, f"precision `auto` means {resolve_precision()} here")
    for kind in ("methods", "evals", "protocols", "launchers", "commands"):
        for name in plugins.installed(kind):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    plugins.load(kind, name)
            except UserError as error:
                say(False, f"{kind} {name}", str(error))
    try:
        setting = plugins.build("protocols", "demo")
        folders = locate(data, setting)
        absent = missing(list(folders), folders)
        plain = [p for kind in ("methods", "evals") for p in plugins.importable(kind).values() if not hasattr(p, "from_argument")]
        used = {s for p in plain for s in p().datasets(setting)}
        for name, folder in folders.items():
            if name in absent and name not in used:
                continue
            if name in absent:
                say(None, f"data {name}", "made on first use" if data is None else f"not in {folder}")
                continue
            try:
                check_layout(name, folder)
                say(True, f"data {name}: {folder}")
            except UserError as error:
                say(False, f"data {name}", str(error))
    except UserError as error:
        say(False, "data", str(error))
    try:
        Store(runs).prepare() if runs.exists() else Store(runs).check_version()
        say(True, f"runs {runs}: {shutil.disk_usage(runs if runs.exists() else runs.resolve().parent).free // 2**30} GB free")
    except (UserError, OSError) as error:
        say(False, f"runs {runs}", str(error))
    return 1 if problems else 0
