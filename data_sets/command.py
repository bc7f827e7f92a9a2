"""`harness data prepare | verify`."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.spec import UserError, suggest


class Data:
    """The command `data`."""

    help = "prepare (make generated data, or a set from its archives) or verify (look at every file of a data set)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Words of the command line."""
        parser.add_argument("what", choices=("prepare", "verify"))
        parser.add_argument("names", nargs="*", metavar="NAME", help="data sets (default: all that are there); imagefolder:DIR and folder:DIR too")
        parser.add_argument("--protocol", default="demo", help="whose generated data (default: demo)")
        parser.add_argument("--data", help="folder of data sets, or a TOML name -> folder (default: generated)")
        parser.add_argument("--archives", help="prepare: folder with the archives as downloaded (default: that of --data)")
        parser.add_argument("--labels", help="prepare imagenet: list with the classes of the validation images (default: found beside the archives)")

    def run(self, args: argparse.Namespace) -> int:
        """0 when all is well, 1 when a problem was found."""
        from harness import data, plugins

        setting: Any = plugins.build("protocols", args.protocol)
        new = args.what == "prepare" and args.data is not None and not Path(args.data).exists() and Path(args.data).suffix != ".toml"
        folders = data.folders_below(Path(args.data)) if new else data.locate(args.data, setting)
        if args.what == "prepare":
            return self.unpack(args, folders) if args.data is not None else self.generate(args, setting, folders)
        names = [n for n in args.names if n != "all"] or [n for n, folder in folders.items() if folder.is_dir()]
        if not names and args.data is not None:
            raise UserError(f"--data {args.data}: holds none of {', '.join(sorted({f.name for f in folders.values()}))}: name the folder that they lie in")
        if not names:
            raise UserError(f"data verify: nothing is there: `data prepare --protocol {args.protocol}` makes it, or give --data DIR")
        problems = 0
        for name in names:
            known = ":" in name or name in data.folder_names()
            problems += self.verify(name, data.folder_of(name, folders) if known else None, folders)
        return 1 if problems else 0

    def generate(self, args: argparse.Namespace, setting: Any, folders: dict[str, Any]) -> int:
        """Make generated sets that are not there yet."""
        from harness import data, plugins
        from harness.launch import cores

        if args.archives or args.labels:
            raise UserError("data prepare: --archives and --labels need --data DIR, the folder that the data sets shall lie in")
        if setting.generator is None:
            raise UserError(f"data prepare: {args.protocol} generates no data: give --data DIR, and --archives DIR with what was downloaded")
        names = args.names or list(setting.generates)
        if wrong := [n for n in names if n not in folders]:
            raise UserError(f"data prepare: {args.protocol} makes no {wrong[0]!r}: {suggest(wrong[0], folders)}")
        plugins.load("protocols", setting.generator)(data.generated_root(setting), names, setting.family, cores())
        for name in names:
            print(f"{name}: {folders[name]}")
        return 0

    def unpack(self, args: argparse.Namespace, folders: dict[str, Any]) -> int:
        """Make sets from their archives."""
        from data_sets.prepare import ARCHIVES, prepare

        able = ["imagenet", *ARCHIVES]
        if not args.names:
            raise UserError(f"data prepare: name the sets to be made from archives: {', '.join(able)}")
        archives = Path(args.archives or args.data)
        if not archives.is_dir():
            raise UserError(f"--archives {archives}: no such folder: name the one with the archives as downloaded")
        if wrong := [n for n in args.names if n not in able]:
            raise UserError(f"data prepare: no archives of {wrong[0]!r} are known: {suggest(wrong[0], able)}")
        if wrong := [n for n in args.names if n not in folders]:
            raise UserError(f"--data {args.data}: names no folder for {wrong[0]}: add a line {wrong[0]} = \"FOLDER\"")
        made = not Path(args.data).exists()
        try:
            for name in args.names:
                done = prepare(name, archives, folders[name], None if args.labels is None else Path(args.labels))
                print(f"{name}: {folders[name]} ({done})")
        finally:
            if made:
                with suppress(OSError):  # it holds what was prepared, or was not needed
                    Path(args.data).rmdir()
        return 0

    def verify(self, name: str, folder: Any, folders: dict[str, Any]) -> int:
        """Print a set's problems; how many."""
        from tqdm import tqdm

        from data_sets.verify import compare_counts, verify

        if folder is None:
            raise UserError(f"data verify: unknown data set {name!r}: {suggest(name, folders)}")
        with tqdm(desc=f"verify {name}", unit="image", disable=not sys.stderr.isatty(), leave=False) as bar:
            found = verify(name, folder, lambda images: bar.update(images) and None)
            problems, remarks = compare_counts(name, folder)
        found += problems
        for line in found:
            print(line)
        for line in remarks:
            print(f"note: {line}")
        print(f"{name}: {len(found)} problem{'s' * (len(found) > 1)} in {folder}" if found else f"{name}: in order ({folder})")
        return len(found)
