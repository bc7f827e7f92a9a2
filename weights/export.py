"""`harness export RUN --to timm|hf --out DIR`: a pre-trained ViT as a folder that timm or transformers loads, with a model card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness.spec import UserError, suggest

TARGETS = ("timm", "hf")


class Export:
    """The command `export`."""

    help = "a pre-trained ViT as a folder for timm or transformers, with a model card"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Words of the command line."""
        parser.add_argument("run", metavar="RUN", help="a pre-training: its folder's name, or the beginning of its key (see `status`)")
        parser.add_argument("--to", required=True, choices=TARGETS, help="for timm.create_model, or for transformers' from_pretrained")
        parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
        parser.add_argument("--runs", default="runs", help="folder of the results (default: runs)")

    def run(self, args: argparse.Namespace) -> int:
        """Write the folder; what loads it goes to stdout.

        Raises:
            UserError: no such run, not done, no weights in it, the target cannot hold it, or the folder cannot be used.
        """
        from harness.store import Store

        store = Store(Path(args.runs))
        if not store.root.is_dir():
            raise UserError(f"--runs {store.root}: no such folder: name the folder that `run` wrote to")
        store.check_version()
        folder, record = find(store, args.run)
        out = Path(args.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: is there and not empty: name a new folder")
        export(folder, record, results_on(store, record["key"]), args.to, out)
        print((out / "README.md").read_text().split("```python\n")[1].split("\n```")[0])
        return 0


def find(store: Any, run: str) -> tuple[Path, dict[str, Any]]:
    """(folder, record) of the pre-training that RUN means. Raises UserError."""
    from harness.store import read_record

    folders = store.folders()
    found = [f for f in folders if f.name == Path(run).name or f.name.rsplit("-", 1)[-1].startswith(run)]
    if not folders:
        raise UserError(f"--runs {store.root}: no runs there, and kept records have no weights: name the folder that `run` wrote to")
    if len(found) != 1:
        what = "no such run" if not found else f"{len(found)} runs fit"
        raise UserError(f"export {run}: {what}: {suggest(run, [f.name for f in (found or folders) if f.name.startswith('pretrain-')])}")
    record = read_record(found[0])
    if record is None:
        state = store.explain(found[0])
        raise UserError(f"export {run}: {state.status}{': ' + state.reason if state.reason else ''}: only a finished pre-training can be exported")
    if record["kind"] != "pretrain":
        parent = record["parents"].get("checkpoint", {}).get("folder")
        raise UserError(f"export {run}: a run of kind {record['kind']} keeps no ViT{f': export {parent}' if parent else ': name a pre-training'}")
    return found[0], record


def results_on(store: Any, key: str) -> list[dict[str, Any]]:
    """Records of the evaluations whose checkpoint has this key."""
    from harness.store import read_record

    records = [read_record(f) for f in store.folders() if f.name.startswith("evaluate-")]
    return [r for r in records if r is not None and r["parents"].get("checkpoint", {}).get("key") == key]


def export(folder: Path, record: dict[str, Any], results: list[dict[str, Any]], target: str, out: Path) -> None:
    """Write model.safetensors, the configuration and, last, the model card README.md.

    Raises:
        UserError: the checkpoint cannot be read, the target cannot hold it, or the folder cannot be written.
    """
    from safetensors.torch import save

    from harness.checkpoint import Backbone, write_atomically
    from harness.spec import JobFailed
    from weights.card import model_card
    from weights.targets import TARGETS as MAKERS

    try:
        made = MAKERS[target](Backbone.load(folder / "checkpoint" / "backbone.pt"))
    except JobFailed as error:
        raise UserError(str(error)) from error
    tensors = {k: v.contiguous().clone() for k, v in made.tensors.items()}
    snippet = made.snippet.replace("FOLDER", str(out))
    try:
        write_atomically(out / "model.safetensors", lambda stream: stream.write(save(tensors, metadata={"format": "pt"})))
        for name, body in made.files.items():
            text = json.dumps(body, indent=1) + "\n"
            write_atomically(out / name, lambda stream, text=text: stream.write(text.encode()))  # type: ignore[misc]
        card = model_card(record, results, target, made.model, snippet)
        write_atomically(out / "README.md", lambda stream: stream.write(card.encode()))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}): choose another folder") from error
