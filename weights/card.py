"""The model card of an exported checkpoint: recipe, data, cost and results, from the record and from the evaluations built on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LIBRARY = {"timm": "timm", "hf": "transformers"}


def model_card(record: Mapping[str, Any], results: Sequence[Mapping[str, Any]], target: str, model: str, snippet: str) -> str:
    """README.md of the folder. `results` are records of evaluations whose checkpoint this is."""
    identity, about = record["identity"], record["about"]
    plugin, recipe, vit = identity["plugin"], identity.get("recipe"), identity["vit"]
    lines = [
        "---", f"library_name: {LIBRARY[target]}", "pipeline_tag: image-feature-extraction", "tags:", "- vision", f"- {plugin_name(plugin)}", "---", "",
        f"# {record['name']}: {plugin_name(plugin)}, {about.get('backbone', 'ViT')} under the protocol {about.get('protocol', '?')}", "",
        f"A Vision Transformer ({model}): {vit['size'][0]}x{vit['size'][1]} pixels, patch {vit['patch']}, width {vit['width']}, {vit['depth']} blocks, "
        f"{vit['heads']} heads. Without a classifier: it gives features. Run {record['key']}, seed {record['seed']}.", "", "```python", snippet, "```", "",
        "## Pre-training", "",
    ]
    if recipe is None:
        lines += ["Nothing was trained by this run."]
        facts = record.get("facts", {})
        lines += [f"Loaded from a checkpoint of style {facts['style']}, sha256 {identity['files'].get('weights', '?')}."] if "style" in facts else []
    else:
        lines += table(("field", "value"), flat(recipe))
    lines += ["", "Method, with every field:", "", *table(("field", "value"), flat(plugin))]
    lines += ["", "## Data", "", *(table(("data set", "fingerprint"), sorted(identity.get("data", {}).items())) or ["None."])]
    lines += ["", "## Cost", "", *table(("what", "value"), costs(record)), "", "## Results", ""]
    head = ("evaluation", "metric", "score (0..100)", "data", "protocol", "seed", "deviations")
    lines += table(head, scores(results)) or ["No evaluation of this checkpoint is recorded."]
    if captions := sorted({r["about"]["caption"] for r in results if r["about"].get("caption")}):
        lines += ["", *(f"{c}." for c in captions)]
    deviations = [*record.get("deviations", ()), *record.get("deviations_found", ())]
    lines += ["", "## Deviations from the recipe", "", *([f"- {d}" for d in deviations] or ["None."])]
    packages = ", ".join(f"{k} {v}" for k, v in record["packages"].items())
    commit = f"{record['git']['commit'] or 'unknown'}{' with changes' if record['git']['dirty'] else ''}"
    lines += ["", "## Made with", "", f"{packages}; harness commit {commit}; {record['start'][:10]}."]
    return "\n".join(lines) + "\n"


def scores(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each metric of each evaluation."""
    rows = []
    for about, metrics, deviations in ((r["about"], r["metrics"], r.get("deviations", ())) for r in results):
        where = (about.get("data", ""), about.get("protocol", ""), str(about["eval_seed"]), "; ".join(deviations) or "none")
        rows += [(about["eval"], metric, f"{value:.2f}", *where) for metric, value in metrics.items()]
    return sorted(rows)


def plugin_name(plugin: Mapping[str, Any]) -> str:
    """A plugin's class name."""
    return str(plugin["class"]).partition(":")[2]


def flat(body: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value) of nested data."""
    rows: list[tuple[str, str]] = []
    for key, value in body.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        elif key == "sources":
            rows += [(f"source of {what}", source) for what, source in value]
        elif key != "class":
            rows.append((f"{prefix}{key}", "none" if value is None else str(value)))
    return rows


def costs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the pre-training took."""
    hardware, flops, images = record["hardware"], record["flops"], record["images_seen"]
    return [
        ("images seen", "unknown" if images is None else f"{images:,}"), ("FLOPs of the training", "unknown" if flops is None else f"{flops:.3g}"),
        ("device-hours", f"{record['device_hours']:.4g}"), ("device", hardware["cpu"] if hardware["device"] == "cpu" else hardware["device"]),
        ("precision", record["precision"]),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; no lines when there are no rows."""
    if not rows:
        return []

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]
