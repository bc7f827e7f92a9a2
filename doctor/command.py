"""`harness doctor`: what works on this machine, what does not, and the remedy; with the flags of a check (--cluster), what works elsewhere."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from harness import plugins
from harness.data import locate, missing
from harness.layout import check_layout
from harness.provenance import MODES, calibrated, gemm_mode, processor, versions
from harness.request import resolve_precision
from harness.spec import UserError
from harness.store import Store


class Doctor:
    """The command `doctor`. Other rooms add checks through the entry points harness.checks: `flags` as launchers have them, and lines(args) -> iterator of
    (works, what was found, what helps), which is asked in place of this machine when one of its flags is given."""

    help = "versions, devices, data: what works, what does not, the remedy"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Words of the command line."""
        parser.add_argument("--data", help="folder of data sets, or a TOML name -> folder (default: generated)")
        parser.add_argument("--runs", default="runs")
        parser.add_argument("--evaluators", action="store_true", help="let each evaluator score what has a known answer (a minute)")
        for check in plugins.importable("checks").values():
            for flag, keywords in check.flags.items():
                parser.add_argument(f"--{flag}", **keywords)

    def run(self, args: argparse.Namespace) -> int:
        """0 when everything that a run needs works, else 1."""
        elsewhere = [check for check in plugins.importable("checks").values() if any(getattr(args, flag) for flag in check.flags)]
        if not elsewhere:
            return examine(args.data, Path(args.runs), args.evaluators)
        return max([show(*line) for check in elsewhere for line in check.lines(args)], default=0)


def show(good: bool | None, text: str, remedy: str = "") -> int:
    """Print what was found, with the remedy where it does not work; 1 for a problem."""
    print(f"{'ok  ' if good else '--  ' if good is None else 'BAD '} {text}{'' if good else ': ' + remedy if remedy else ''}", flush=True)
    return int(good is False)


def known_answers() -> Iterator[tuple[bool, str, str]]:
    """(right, what was found, remedy) for each known answer of each evaluator that has any."""
    for name, cls in plugins.importable("evals").items():
        if not hasattr(cls, "golden"):
            continue
        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                answers = cls().golden(Path(folder))
        except Exception as error:  # whatever an evaluator stops at is what is looked for here
            yield False, f"evaluator {name}", f"stopped with {type(error).__name__}: {' '.join(str(error).split())}"
            continue
        for a in answers:
            right = abs(a.score - a.expected) <= a.tolerance  # False for NaN
            remedy = f"must be {a.expected:.2f}: install the versions of requirements.lock; do not trust its scores"
            yield right, f"evaluator {name}: {a.what} {a.score:.2f}", remedy
        yield True, f"evaluator {name}: {len(answers)} known answers in {time.monotonic() - began:.0f} s", ""


def examine(data: str | None, runs: Path, evaluators: bool = False) -> int:
    """Print one line for each thing looked at; 1 when something that a run needs does not work, else 0."""
    import torch

    problems = 0

    def say(good: bool | None, text: str, remedy: str = "") -> None:
        nonlocal problems
        problems += show(good, text, remedy)

    say((3, 10) <= sys.version_info[:2] < (3, 14), f"python {sys.version.split()[0]}", "mmengine needs 3.10 to 3.13")
    for name, found in versions().items():
        if name != "python":
            say(True, f"{name} {found}")
    for module, extra in (("mmengine", "dense"), ("mmseg", "dense"), ("mmdet", "dense"), ("pycocotools", "dense")):
        if importlib.util.find_spec(module) is None:
            say(False, f"{module} is not installed", f"pip install 'vision-pretraining-harness[{extra}]', needed by ade20k and coco")
    say(True, f"processor {processor()}")
    products = calibrated()
    speeds = ", ".join(f"{m} {products['gflops'][m]:.0f} GFLOP/s (error {products['error'][m]:.0e})" for m in MODES)
    say(True, f"fp32 products of one thread: {speeds}; jobs use {gemm_mode()}")
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
    for right, found, remedy in known_answers() if evaluators else ():
        say(right, found, remedy)
    return 1 if problems else 0
