"""A cluster profile: what a job asks SLURM for, read from a TOML file, with exceptions for kinds of nodes.

The keys are the names that sbatch has for them; slurm/README.md explains each, slurm/profiles/ has examples.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from harness import ranks
from harness.jobs import Node
from harness.plugins import load
from harness.provenance import MODES
from harness.spec import UserError, suggest
from slurm.queue import OUR_OWN

TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")  # minutes, m:s, h:m:s, days-h[:m[:s]]
MEMORY = re.compile(r"\d+[KMGT]?")
MEMORIES = ("mem", "mem_per_cpu", "mem_per_gpu")


def seconds(time: str) -> int:
    """sbatch's time as seconds: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s."""
    days, dash, rest = time.rpartition("-")
    parts = [int(p) for p in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(p * u for p, u in zip(parts, units, strict=False))


@dataclass(frozen=True)
class Resources:
    """What one job asks for. Jobs of equal resources and equal dependencies become one array.

    `gpus` and `cpus` are of each of `machines`; on each run `processes`, 0: one for each GPU, or one.
    `gres` with {gpus} in it is used in place of --gpus-per-node where a cluster wants that. `time` as sbatch takes it; `signal_s` seconds before its end
    the job is told to save and goes back into the queue. `setup`: shell lines before the job; `environment`: variables of the job;
    `extra`: further options of sbatch as they are ("--reservation=x").
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    machines: int = 1
    processes: int = 0
    gpus: int = 0
    gres: str = ""
    cpus: int = 1
    mem: str = ""
    mem_per_cpu: str = ""
    mem_per_gpu: str = ""
    time: str = ""
    signal_s: int = 120
    setup: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.machines < 1 or self.cpus < 1 or self.signal_s < 1:
            raise UserError("machines, cpus and signal_s: 1 or more")
        if self.gpus and self.processes not in (0, 1, self.gpus):
            raise UserError(f"processes = {self.processes}: a process has a GPU of its own, and there are {self.gpus}: leave it out")
        if self.each > self.cpus:
            raise UserError(f"cpus = {self.cpus}: they are shared by the {self.each} processes of a machine: one for each at least")
        if self.gres and "{gpus}" not in self.gres:
            raise UserError(f"gres = {self.gres!r}: write {{gpus}} where the number goes, as in \"gpu:h100:{{gpus}}\"")
        if self.time and not TIME.fullmatch(self.time):
            raise UserError(f"time = {self.time!r}: minutes, hours:minutes:seconds or days-hours, as in \"12:00:00\"")
        if self.time and seconds(self.time) < self.signal_s + 60:
            raise UserError(f"time = {self.time!r}: a minute more than signal_s ({self.signal_s} s) at least: a job is told to save so long before its end")
        given = [name for name in MEMORIES if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: give one of them")
        for name in given:
            if not MEMORY.fullmatch(getattr(self, name)):
                raise UserError(f"{name} = {getattr(self, name)!r}: a number with K, M, G or T, as in \"64G\"")

    @property
    def each(self) -> int:
        """Processes of a job on each of its machines."""
        return self.processes or self.gpus or 1

    @property
    def single(self) -> Resources:
        """The share of one process, for jobs that cannot use more; memory stays as it is."""
        return dataclasses.replace(self, machines=1, processes=1, gpus=min(1, self.gpus), cpus=max(1, self.cpus // self.each))


@dataclass(frozen=True)
class Profile:
    """A cluster as its user knows it.

    `nodes` (pattern -> keys of Resources) holds for nodes whose folder begins like that, as in "evaluate-coco-*"; later ones win.
    `python`: the interpreter on the nodes, this one by default. `shared`: folders that every node sees; runs and data must lie below one of them.
    `precision`: what `auto` means on the nodes; by default bf16 with a GPU, and as on this machine without.
    `max_running`: nodes of a runs folder that run at a time (slurm/lanes.py).
    `max_array`, `max_submit`: jobs in an array, and in the queue, besides the cluster's own limits.
    `max_lost`: how many times a job whose node died without a word is started again.
    """

    path: str
    resources: Resources = Resources()
    nodes: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    python: str = ""
    shared: tuple[str, ...] = ()
    precision: Literal["", "fp32", "bf16"] = ""
    max_running: int = 0
    max_array: int = 0
    max_submit: int = 0
    max_lost: int = 3

    def of(self, folder: str) -> Resources:
        """Resources of the node with this folder name. Raises UserError for a pattern that asks for something impossible."""
        resources = self.resources
        for pattern, changes in self.nodes:
            if fnmatchcase(folder, pattern):
                new = dict(changes)
                if any(name in new for name in MEMORIES):  # another way to ask for memory replaces the one above
                    new = {**dict.fromkeys(MEMORIES, ""), **new}
                new["environment"] = tuple({**dict(resources.environment), **dict(new.get("environment", ()))}.items())
                resources = dataclasses.replace(resources, **new)
        return resources

    def of_node(self, node: Node) -> Resources:
        """Resources of a node: of a job that cannot be spread over processes those of one."""
        found = self.of(node.folder)
        return found if found.each * found.machines == 1 or ranks.spreads({"kind": node.kind, "identity": node.identity}) else found.single

    def check_shared(self, flag: str, folder: Path) -> None:
        """Raises UserError when a folder that jobs need is on no shared one."""
        roots = [Path(s).expanduser().resolve() for s in self.shared]
        if roots and not any(folder.resolve().is_relative_to(root) for root in roots):
            raise UserError(f"{flag} {folder}: not below a folder that all nodes see ({', '.join(self.shared)}: `shared` in {self.path}): choose one there")


OWN = {f.name for f in dataclasses.fields(Profile)} - {"path", "resources"}


def typed(name: str, value: Any, hint: Any) -> Any:
    """A TOML value as the type of its field. Raises UserError."""
    if hint == tuple[tuple[str, str], ...]:
        good, wanted = isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values()), "a table of texts, as in { NAME = \"value\" }"
    elif hint == tuple[str, ...]:
        good, wanted = isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of texts, as in [\"...\"]"
    elif hint is int:
        good, wanted = isinstance(value, int) and not isinstance(value, bool) and value >= 0, "a whole number, 0 or more"
    elif typing.get_origin(hint) is Literal:
        good, wanted = value in typing.get_args(hint), " or ".join(repr(a) for a in typing.get_args(hint) if a)
    else:
        good, wanted = isinstance(value, str), "a text in quotes"
    if not good:
        raise UserError(f"{name} = {value!r}: expected {wanted}")
    return tuple(value.items()) if isinstance(value, Mapping) else tuple(value) if isinstance(value, list) else value


@cache
def variables() -> frozenset[str]:
    """The variables that users may set: those that the harness's own source reads, without what it sets for its processes."""
    found = (re.findall(r"HARNESS_[A-Z]+(?:_[A-Z]+)*", file.read_text()) for file in Path(ranks.__file__).parent.glob("*.py"))
    return frozenset(name for names in found for name in names).difference(OUR_OWN)


def check_environment(given: Mapping[str, str]) -> None:
    """What a job would refuse hours later. Raises UserError."""
    for name in (n for n in given if n.startswith("HARNESS_")):
        if name not in variables():
            raise UserError(f"unknown variable {name}: {suggest(name, variables())}")
        if name in ranks.LEAST:
            ranks.number_from(name, ranks.LEAST[name], given=given)
    if (mode := given.get("HARNESS_GEMM", "")) not in ("", *MODES):
        raise UserError(f"HARNESS_GEMM={mode}: expected {' or '.join(MODES)}")
    for logger in filter(None, map(str.strip, given.get("HARNESS_LOGGERS", "").split(","))):
        load("loggers", logger, "HARNESS_LOGGERS")


def read_resources(body: Mapping[str, Any], valid: set[str], where: str = "") -> dict[str, Any]:
    """Keys and values checked against `Resources`. Raises UserError."""
    hints = typing.get_type_hints(Resources)
    for name in body:
        if name not in hints:
            raise UserError(f"{where}unknown key {name!r}: {suggest(name, valid)}")
    found = {name: typed(name, value, hints[name]) for name, value in body.items()}
    try:
        check_environment(dict(found.get("environment", ())))
    except UserError as error:
        raise UserError(f"{where}environment: {error}") from error
    return found


def read_profile(path: Path) -> Profile:
    """A profile from its file.

    Raises:
        UserError: the file cannot be read, or a key or a value in it is wrong.
    """
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        body = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--cluster {path}: cannot be read ({error.strerror}): see slurm/profiles/ for examples") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--cluster {path}: no TOML ({error})") from error
    try:
        hints, names = typing.get_type_hints(Profile), set(typing.get_type_hints(Resources))
        tables = body.pop("nodes", {})
        if not isinstance(tables, Mapping) or not all(isinstance(t, Mapping) for t in tables.values()):
            raise UserError("nodes: expected tables, as in [nodes.\"evaluate-coco-*\"]")
        own = {name: typed(name, body.pop(name), hints[name]) for name in sorted(OWN & set(body))}
        resources = Resources(**read_resources(body, names | OWN))
        nodes = tuple((p, tuple(read_resources(t, names, f"[nodes.\"{p}\"]: ").items())) for p, t in tables.items())
        profile = Profile(str(path), resources, nodes, **own)
        for pattern, _ in nodes:
            profile.of(pattern)
        return profile
    except UserError as error:
        raise UserError(f"--cluster {path}: {error}") from error


def default_precision(profile: Profile) -> str | None:
    """What `auto` precision means on the nodes, None when this machine is to say."""
    return profile.precision or ("bf16" if profile.resources.gpus else None)
