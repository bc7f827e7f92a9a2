"""`harness data prepare | verify`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from harness.spec import UserError, suggest


class Data:
    """The command `data`."""

    help = "prepare (make generated data now) or verify (look at every file of a data set)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Words of the command line."""
        parser.add_argument("what", choices=("prepare", "verify"))
        parser.add_argument("names", nargs="*", metavar="NAME", help="data sets (default: all that are there); imagefolder:DIR and folder:DIR too")
        parser.add_argument("--protocol", default="demo", help="whose generated data (default: demo)")
        parser.add_argument("--data", help="folder of data sets, or a TOML name -> folder (default: generated)")

    def run(self, args: argparse.Namespace) -> int:
        """0 when all is well, 1 when a problem was found."""
        from harness import data, plugins
        from harness.launch import cores

        setting: Any = plugins.build("protocols", args.protocol)
        folders = data.locate(args.data, setting)
        if args.what == "prepare":
            if args.data is not None or setting.generator is None:
                raise UserError("data prepare: makes the generated data of a protocol and takes no --data: `data verify --data DIR` looks at yours")
            make = plugins.load("protocols", setting.generator)
            names = args.names or ["imagenet", "ade20k", "coco", "inat2018", "places365"]
            if wrong := [n for n in names if n not in folders]:
                raise UserError(f"data prepare: {args.protocol} makes no {wrong[0]!r}: {suggest(wrong[0], folders)}")
            make(data.generated_root(setting), names, setting.family, cores())
            for name in names:
                print(f"{name}: {folders[name]}")
            return 0
        names = [n for n in args.names if n != "all"] or [n for n, folder in folders.items() if folder.is_dir()]
        if not names:
            raise UserError(f"data verify: nothing is there: `data prepare --protocol {args.protocol}` makes it, or give --data DIR")
        problems = 0
        for name in names:
            problems += self.verify(name, data.folder_of(name, folders) if ":" in name or name in folders else None, folders)
        return 1 if problems else 0

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
        print(f"{name}: {len(found)} problems in {folder}" if found else f"{name}: in order ({folder})")
        return len(found)
