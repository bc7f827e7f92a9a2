"""The command line. Results go to stdout, progress to stderr; a user error is one line and exit code 2.

Exit codes: 0 all done, 1 some cell failed, 2 usage or bad input (nothing started), 3 submitted and not finished, 130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harness import __version__
from harness.spec import UserError

if TYPE_CHECKING:
    from harness.request import Keep, Plan
    from harness.store import Store


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def check_packages() -> None:
    """Our top-level packages have generic names: another distribution must not stand in their place.

    Raises:
        UserError: one resolves elsewhere than beside harness/.
    """
    root = Path(__file__).resolve().parents[1]
    for name in ("methods", "evals", "results", "launchers", "slurm", "protocols", "weights", "data_sets", "doctor"):
        found = find_spec(name)
        places = [Path(p).resolve() for p in (found.submodule_search_locations or ())] if found else []
        if root / name not in places[:1]:
            where = places[0] if places else "nowhere"
            raise UserError(f"package {name!r} is found in {where}, not beside {root / 'harness'}: uninstall the other one or put {root} first on PYTHONPATH")


def parser() -> argparse.ArgumentParser:
    """The command line of section 6 of the design; commands of other rooms add themselves through the entry points harness.commands."""
    top = Parser(prog="harness", description="Train every pre-training method on the same ViT, score it with the same evaluators, print the table.",
                 epilog="example: python -m harness run --methods beit,mae --evals ade20k,coco")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    run = commands.add_parser("run", help="pre-train, evaluate, print the table", description="Train what is missing, then print the table.")
    run.add_argument("--methods", nargs="+", help="names by commas or spaces, or `all` (see `list methods`)")
    run.add_argument("--evals", nargs="+", help="names by commas or spaces, or a group such as all, paper, inat, places (see `list evals`)")
    run.add_argument("--plan", metavar="FILE", help="run what a plan says in place of --methods and --evals (results/*/plan.py); its tables are kept beside it")
    run.add_argument("--out", metavar="DIR", help="with --plan: keep its tables and its report here instead")
    run.add_argument("--protocol", help="scale and data (default: demo, minutes on a laptop)")
    run.add_argument("--backbone", help="a backbone of the protocol (see `list backbones`)")
    run.add_argument("--seeds", help="pre-training seeds, by commas (default: 0)")
    run.add_argument("--eval-seeds", help="fine-tuning seeds on each pre-training (default: 0)")
    run.add_argument("--data", help="folder of data sets, or a TOML name -> folder (default: generated)")
    run.add_argument("--pretrain-data", help="pre-train on this folder of images instead, nested, no labels needed")
    run.add_argument("--runs", default="runs", help="folder for results (default: runs)")
    run.add_argument("--launcher", default="local", help="local, debug (this process), or another one installed")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a field: mae.mask_ratio=0.6, ade20k.recipe.lr=1e-3")
    run.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2", help="try values on a held-out part of train, report with the best")
    run.add_argument("--tuning", choices=("shared", "published"),
                     help="fine-tuning: one recipe for all, or each method's paper's (default: the protocol's)")
    run.add_argument("--on-bad-image", choices=("fail", "skip"), default="fail", help="an unreadable image ends the job, or is skipped and counted")
    run.add_argument("--on-oom", choices=("fail", "halve"), default="fail", help="memory that gives out ends the job, or halves its micro-batch")
    run.add_argument("--budget", type=float, metavar="HOURS", help="refuse a plan that needs more device-hours, as estimated from what was measured")
    run.add_argument("--dry-run", action="store_true", help="print the graph and what is cached; start nothing")
    run.add_argument("--retry", action="store_true", help="start failed jobs again, from their last state")
    run.add_argument("--force", action="store_true", help="do the whole graph again; old folders are moved to RUNS/aside")
    run.set_defaults(go=command_run)

    listing = commands.add_parser("list", help="methods, evals, protocols, backbones, datasets, runs")
    listing.add_argument("what", choices=("methods", "evals", "protocols", "backbones", "datasets", "runs"))
    listing.add_argument("--protocol", default="demo")
    listing.add_argument("--runs", default="runs")
    listing.set_defaults(go=command_list)

    status = commands.add_parser("status", help="what is done, running, failed, missing, and why")
    status.add_argument("run", nargs="?", metavar="RUN", help="a node: its folder's name, a part of it that no other has, or the beginning of its key")
    status.add_argument("--runs", default="runs")
    status.add_argument("--watch", action="store_true", help="again and again until nothing runs, or Ctrl-C")
    status.set_defaults(go=command_status)

    from harness.launch import add_flags
    from harness.plugins import installed, load

    add_flags(run)
    for name in installed("commands"):
        command = load("commands", name)()
        sub = commands.add_parser(name, help=command.help)
        command.add_arguments(sub)
        sub.set_defaults(go=command.run)
    return top


def command_run(args: argparse.Namespace, again: bool = False) -> int:
    """`harness run`. `again`: after the trials of a sweep."""
    from harness.collect import note_cells
    from harness.display import Display
    from harness.launch import cores, make_launcher, write_job
    from harness.plan import Planners
    from harness.plugins import load
    from harness.request import requests_of
    from harness.run import check_environment
    from harness.store import Store

    launcher = make_launcher(args)
    requests, keep = requests_of(args, getattr(launcher, "precision", None))
    if args.sweep and args.plan:
        raise UserError("--sweep: a plan has no values to choose among: leave --plan out")
    check_environment()
    store = Store(Path(args.runs))
    store.check_version()

    def make_planner() -> Any:
        return load("options", "sweep")(requests[0], args, store, again) if args.sweep else Planners(requests)

    planner = make_planner()
    plan = planner.plan()
    if plan.later and again:
        print("--sweep: not all trials have ended: run the same line again to go on", file=sys.stderr)
        return 1
    if args.dry_run:
        return dry_run(plan, store, planner, args, launcher)
    if planner.missing:
        raise UserError(next(iter(planner.missing.values())))
    if planner.pending:
        planner.generate(cores())
        plan = make_planner().plan()
    if args.budget is not None:
        load("options", "budget")(plan, store, args.force, launcher).check(args.budget)
    getattr(launcher, "check", lambda *_: None)(plan.nodes, store, args.force)  # before --force and --retry touch what is there
    store.prepare()
    for node in plan.nodes if args.force else ():
        if (state := store.state(store.folder(node))).status == "running":
            raise UserError(f"--force: {node.folder} is being worked on ({state.reason}): stop that process first")
    for node in plan.nodes:
        folder = store.folder(node)
        if args.force and (old := store.set_aside(folder)) is not None:
            print(f"moved {folder} to {old}", file=sys.stderr)
        elif args.retry and not (again and "trial" in node.about):
            (folder / "failure.json").unlink(missing_ok=True)
    todo = [n for n in plan.nodes if store.state(store.folder(n)).status != "done"]
    code = 0
    with ThreadPoolExecutor(16) as pool:  # also of those that will wait for a parent which fails, so that `table` knows of them; each is flushed to disk
        list(pool.map(lambda n: write_job(n, store), [n for n in todo if not (store.folder(n) / "job.json").exists()]))
    note_cells(plan.cells, store)
    if todo:
        print(f"{len(plan.nodes)} nodes, {len(plan.nodes) - len(todo)} done before, {len(todo)} to do in {store.root}", file=sys.stderr)
        display = Display(plan.nodes, store)
        code = launcher.launch(plan.nodes, store, display)
        display.close()
    if code == 130:
        print("interrupted: run the same line again to go on", file=sys.stderr)
    if code == 3 and plan.later:
        print("--sweep: these are the trials; the same line goes on when they have ended, with --wait by itself", file=sys.stderr)
    return code or (command_run(args, again=True) if plan.later else print_table(plan, store, keep))


def print_table(plan: Plan, store: Store, keep: Keep | None) -> int:
    """The table of a plan on stdout, kept beside its file if it has one; exit code 1 when a cell has no number and is not skipped."""
    from dataclasses import replace

    from harness.plugins import load
    from harness.store import read_record

    states = {n.key: store.explain(store.folder(n)) for n in plan.nodes}
    records = {n.key: r for n in plan.nodes if (r := read_record(store.folder(n))) is not None}
    results = [replace(r, status="failed") if r.status in ("interrupted", "missing") else r for r in plan.results(states, records)]
    print(load("commands", "table")().render(results, folders=(store.root,)))
    if keep is not None:
        print(keep(results, (store.root,)), file=sys.stderr)
    return 1 if any(r.status not in ("done", "skipped") for r in results) else 0


def dry_run(plan: Plan, store: Store, planner: Any, args: argparse.Namespace, launcher: Any) -> int:
    """The graph, what is cached, what it costs, and what the launcher would do."""
    from harness.plugins import load

    costs = load("options", "budget")(plan, store, args.force, launcher)
    if planner.pending:
        print(f"data to be generated first (keys are not final): {', '.join(sorted(planner.pending))}")
    for reason in planner.missing.values():
        print(f"missing (keys are not final): {reason}")
    for number, node in enumerate(plan.nodes, start=1):
        shown = {"done": "to be done again" if args.force else "cached"}.get(status := store.state(store.folder(node)).status, status)
        after = ", ".join(f"{role} {p.key[:8]}" for role, p in node.parents.items())
        more = (f" (after {after})" if after else "") + (f"\n      {node.recipe}" if node.recipe else "")
        print(f"[{number}/{len(plan.nodes)}] {node.key} {node.about['title']} seed {node.about['seed']}: {shown}{costs.words(node)}{more}")
    if plan.later:
        print("then, with the values that score best there:", *dict.fromkeys(n.about["title"] for n in plan.later[0] if n.kind == "evaluate"), sep="\n    ")
    print(costs)
    for cell in plan.cells:
        if cell.node is None:
            print(f"skipped: {cell.about['eval']} on {cell.about['method']}: {cell.skipped}")
    if hasattr(launcher, "preview"):
        print(launcher.preview(plan.nodes, store, args.force))
    if args.budget is not None:
        costs.check(args.budget)
    return 0


def command_list(args: argparse.Namespace) -> int:
    """`harness list`."""
    from harness import plugins

    if args.what == "runs":
        return command_status(argparse.Namespace(run=None, runs=args.runs, watch=False))
    setting: Any = plugins.build("protocols", args.protocol) if args.what in ("backbones", "datasets") else None
    if args.what == "backbones":
        for name, vit in setting.backbones.items():
            print(f"{name:16} {vit.size[0]}x{vit.size[1]} px, patch {vit.patch}, width {vit.width}, {vit.depth} blocks, {vit.heads} heads, "
                  f"positions {vit.positions}{' (default)' if name == setting.backbone else ''}")
    elif args.what == "datasets":
        from harness import data

        for name, folder in {**data.folders_below(Path("DIR")), **data.locate(None, setting)}.items():
            print(f"{name:16} {'there' if folder.is_dir() else 'made on first use' if name in setting.generates else 'yours, with --data DIR'}: {folder}")
    else:
        for name, plugin in plugins.importable(args.what).items():
            source = getattr(plugin, "source", "")
            print(f"{name:16} {getattr(plugin, 'summary', '')}{source and f' [{source}]'}")
            for variant, fields in getattr(plugin, "variants", {}).items():
                origin = getattr(plugin, "variant_sources", {}).get(variant, "")
                print(f"{name + '@' + variant:16} {', '.join(f'{k}={v}' for k, v in fields.items())}{f' [{origin}]' if origin else ''}")
        if args.what in ("methods", "evals"):
            print(f"groups: {', '.join(plugins.groups(args.what))}")
    return 0


def command_status(args: argparse.Namespace) -> int:
    """`harness status`."""
    from harness.launch import queued
    from harness.plugins import load
    from harness.store import Store

    store = Store(Path(args.runs))
    if not store.root.is_dir():
        raise UserError(f"--runs {store.root}: no such folder: name the folder that `run` wrote to")
    store.check_version()
    if args.run is None:
        return int(load("commands", "table")().overview(lambda: (store, queued(store)), args.watch))
    if args.watch:
        raise UserError("--watch: shows all runs: leave RUN out")
    print(*load("commands", "table").explain(args.run, store, queued(store)), sep="\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m harness` and of the script `harness`."""
    gc.set_threshold(100_000, 50, 100)  # imports and records are a million objects and no garbage: looking for it took a quarter of a command's time
    try:
        check_packages()
        top = parser()
        args = top.parse_args(arguments)
        if args.command is None:
            top.print_help()
            return 0
        return int(args.go(args))
    except UserError as error:
        print(f"harness: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where, what = error.filename or "writing", error.strerror or error
        print(f"harness: {where}: {what}: mend that (space, permissions), then give the same line again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
