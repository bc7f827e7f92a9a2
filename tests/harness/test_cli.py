"""The command line is a contract: scripts and sweeps rely on these words. A new one is added here on purpose."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import cli, data
from harness import request as request_module
from harness.spec import UserError

Call = Callable[..., subprocess.CompletedProcess[str]]

COMMANDS = {
    "run": {
        "--methods", "--evals", "--protocol", "--backbone", "--seeds", "--eval-seeds", "--data", "--pretrain-data", "--runs", "--launcher", "--set", "--sweep",
        "--tuning", "--on-bad-image", "--on-oom", "--budget", "--dry-run", "--retry", "--force", "--cluster", "--wait", "--plan", "--out",
    },
    "list": {"what", "--protocol", "--runs"},
    "status": {"run", "--runs", "--watch"},
    "doctor": {"--data", "--runs", "--evaluators", "--cluster", "--drill"},
    "export": {"run", "--to", "--out", "--runs"},
    "cancel": {"run", "--runs"},
    "data": {"what", "names", "--protocol", "--data", "--archives", "--labels"},
    "table": {"--format", "--layout", "--methods", "--evals", "--protocol", "--backbone", "--spread", "--cost", "--runs"},
    "report": {"--out", "--no-image-noise", "--methods", "--evals", "--protocol", "--backbone", "--runs"},
    "audit": {"--plan", "--format", "--data", "--pretrain-data", "--tuning", "--set", "--sweep", "--methods", "--evals", "--protocol", "--backbone", "--runs"},
}


def words_of(parser: argparse.ArgumentParser) -> set[str]:
    return {a.option_strings[0] if a.option_strings else a.dest for a in parser._actions if a.dest != "help"}


def test_commands_and_flags_are_frozen() -> None:
    [commands] = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert {name: words_of(parser) for name, parser in commands.choices.items()} == COMMANDS


def test_defaults_are_frozen() -> None:
    args = cli.parser().parse_args(["run", "--methods", "mae", "--evals", "ade20k"])
    assert (args.runs, args.launcher, args.on_bad_image) == ("runs", "local", "fail")
    ((request,), keep) = request_module.requests_of(args, None)
    assert (request.protocol, request.seeds, request.eval_seeds, request.tuning, request.on_bad_image, keep) == ("demo", (0,), (0,), None, "fail", None)


def test_names_by_commas_or_by_spaces() -> None:
    """People type both."""
    for words in (["mae,beit"], ["mae", "beit"], ["mae,", "beit"]):
        assert request_module.words(",".join(cli.parser().parse_args(["run", "--methods", *words, "--evals", "x"]).methods)) == ("mae", "beit")


def test_bare_call_prints_help(harness: Call) -> None:
    done = harness()
    assert done.returncode == 0 and "usage: harness" in done.stdout and done.stderr == ""


def test_a_package_of_the_same_name_elsewhere_is_noticed(tmp_path: Path, environment: dict[str, str]) -> None:
    """PyPI has an `evals`: it must not stand in for ours without a word."""
    (tmp_path / "other" / "evals").mkdir(parents=True)
    (tmp_path / "other" / "evals" / "__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path / "other"), environment["PYTHONPATH"]])
    line = [sys.executable, "-m", "harness", "list", "evals"]
    done = subprocess.run(line, cwd=tmp_path, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 2 and "package 'evals' is found in" in done.stderr and done.stderr.count("\n") == 1


def test_list_shows_plugins_of_others(harness: Call) -> None:
    assert "rotation@two" in harness("list", "methods").stdout
    assert "nearest-mean" in harness("list", "evals").stdout
    assert "vit-smoke" in harness("list", "backbones", "--protocol", "smoke").stdout
    listed = dict(line.split(None, 1) for line in harness("list", "datasets").stdout.splitlines())
    assert set(listed) == set(data.folder_names()) and listed["inat2019"] == "yours, with --data DIR: DIR/inat2019" and "DIR" not in listed["imagenet"]


@pytest.mark.parametrize("text", ["1,2", "0", "3,1,2"])
def test_seeds(text: str) -> None:
    assert request_module.integers("--seeds", text) == tuple(int(w) for w in text.split(","))


@pytest.mark.parametrize("text", ["a", "", "1,1", "-1", "1.0"])
def test_seeds_refused(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        request_module.integers("--seeds", text)


def test_a_wrong_key_names_the_nearest_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(100):
        folder = tmp_path / f"evaluate-coco-mae-{number:016x}"
        folder.mkdir()
        (folder / "job.json").write_text("{}")
    assert cli.main(["status", "evaluate-coco-mea-0000000000000042", "--runs", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no such run: did you mean evaluate-coco-mae-0000000000000042? nearest of 100: " in said and said.count("evaluate-coco") == 7
