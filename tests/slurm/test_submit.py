"""The graph in SLURM's queue, against a fake of its commands: nothing twice, nothing lost, and each state said as it is."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm
from folders import written

from evals.finetune import ImageNet
from evals.knn import KNN
from evals.linear import Linear
from evals.probe_recipes import CENTRE
from harness.canonical import canonical
from harness.cli import main
from harness.jobs import Node, read_job
from harness.launch import make_launcher, queued, write_job
from harness.plan import Planner
from harness.request import Request
from harness.spec import Recipe, UserError
from harness.store import Store, lock, write_json
from methods.mae import MAE
from slurm.cancel import Cancel
from slurm.launcher import Slurm
from slurm.worker import command

METHODS, EVALS = ("mae", "beit", "scratch"), ("linear", "coco", "knn", "partial")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    cluster = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(cluster.folder), prepend=":")
    return cluster


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "runs")
    found.prepare()
    return found


def graph(store: Store, methods: tuple[str, ...] = METHODS, evals: tuple[str, ...] = EVALS) -> list[Node]:
    """Pre-trainings (beit's after a tokenizer), each with evaluations, parents first; their job files written as `run` does."""
    nodes: list[Node] = []
    for method in methods:
        parents = {}
        if method == "beit":
            parents = {"tokenizer": Node("asset", "dvae", {"plugin": "dvae"}, {}, {"title": "tokenizer dvae", "seed": 0})}
        pretrain = Node("pretrain", method, {"plugin": method}, parents, {"title": f"pretrain {method}", "seed": 0})
        scores = [Node("evaluate", f"{e}-{method}", {"plugin": e}, {"checkpoint": pretrain}, {"title": f"evaluate {e} on {method}", "seed": 0}) for e in evals]
        nodes += [*parents.values(), pretrain, *scores]
    for node in nodes:
        write_job(node, store)
    return nodes


def slurm(store: Store, text: str = "", wait: bool = False) -> Slurm:
    """The launcher with a profile."""
    path = store.root.parent / "cluster.toml"
    path.write_text(text)
    return Slurm(cluster=str(path), wait=wait, poll_s=0.02)


def quiet(status: Any) -> None:
    """A display that shows nothing."""


def finish(store: Store, node: Node, fake: FakeSlurm | None = None) -> None:
    """The node's record, as its job would leave it; it leaves the queue."""
    written(store.root, node)
    if fake is not None:
        ids = {name: job for name, job in fake_ids(store, fake).items() if name == node.folder}
        fake.queue = [line for line in fake.queue if line[0] not in ids.values()]


def fake_ids(store: Store, fake: FakeSlurm) -> dict[str, str]:
    """Folder name -> job id in the fake's queue."""
    from slurm.queue import jobs_of

    return {name: job.id for name, job in jobs_of(store)[0].items()}


def test_edges_become_dependencies_and_equal_nodes_arrays(fake: FakeSlurm, store: Store) -> None:
    nodes = graph(store)
    launcher = slurm(store, 'mem = "8G"\n[nodes."evaluate-coco*"]\nmem = "64G"')
    assert launcher.launch(nodes, store, quiet) == 3
    ids = fake_ids(store, fake)
    assert set(ids) == {n.folder for n in nodes}, "the whole graph at once"
    first = {n.name: ids[n.folder] for n in nodes if n.kind != "evaluate"}
    assert first["mae"].partition("_")[0] == first["scratch"].partition("_")[0] == first["dvae"].partition("_")[0], "one array of what waits for nothing"
    assert "dependency" not in fake.options(first["mae"].partition("_")[0])
    assert fake.options(first["beit"])["dependency"] == f"afterok:{first['dvae']}"
    for node in nodes:
        if node.kind == "evaluate":
            options = fake.options(ids[node.folder].partition("_")[0])
            method = node.parents["checkpoint"].name
            assert options["dependency"] == f"afterok:{first[method]}" and options["kill-on-invalid-dep"] == "yes"
            assert options["mem"] == ("64G" if node.name.startswith("coco") else "8G")
            if not node.name.startswith("coco"):
                assert options["array"] == "0-2%3", "three evaluations of one shape"


def test_a_cap_on_what_runs_holds_for_the_whole_submission_and_the_next(fake: FakeSlurm, store: Store) -> None:
    """Two lanes: two pre-trainings, then their evaluations, one array in each; what a second line adds waits for what the first has left there."""
    launcher, evals = slurm(store, "max_running = 2"), ("linear", "knn")
    assert launcher.launch(graph(store, ("mae", "scratch"), evals), store, quiet) == 3
    wanted = [(None, "0-1%2"), ("afterok:100_0,afterany:100", "0-1%1"), ("afterok:100_1,afterany:100", "0-1%1")]
    assert [(fake.options(id).get("dependency"), fake.options(id)["array"]) for id in fake.scripts] == wanted
    fake.queue = [line for line in fake.queue if not line[0].startswith("100")]
    nodes = graph(store, ("moco-v3",), evals)
    text = launcher.preview(nodes, store)
    assert "# ---- J1: 1 node, 1 of 2 lanes" in text and "#SBATCH --dependency=afterok:J1,afterany:101:102" in text.splitlines()
    assert launcher.launch(nodes, store, quiet) == 3
    assert (fake.options("103")["dependency"], fake.options("104")["dependency"]) == ("afterany:101", "afterok:103,afterany:101:102")
    assert "kill-on-invalid-dep" not in fake.options("103") and fake.options("104")["array"] == "0-1%2"


def test_two_launchers_do_not_submit_a_node_twice(fake: FakeSlurm, store: Store) -> None:
    nodes = graph(store)
    launchers = [slurm(store) for _ in range(2)]
    codes: list[int] = []
    threads = [threading.Thread(target=lambda one=one: codes.append(one.launch(nodes, store, quiet))) for one in launchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [3, 3] and len(fake.queue) == len(nodes)


def test_a_launcher_killed_after_sbatch_loses_nothing(fake: FakeSlurm, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between sbatch and the next line there is nothing to write down: the queue itself says what was submitted."""
    nodes = graph(store)

    class Killed(BaseException):
        pass

    real, calls = Slurm.sbatch, []

    def dies(self: Slurm, group: Any, store: Store) -> str:
        calls.append(real(self, group, store))
        if len(calls) == 2:
            raise Killed
        return calls[-1]

    monkeypatch.setattr(Slurm, "sbatch", dies)
    with pytest.raises(Killed):
        slurm(store).launch(nodes, store, quiet)
    there = fake_ids(store, fake)
    assert 0 < len(there) < len(nodes)
    monkeypatch.setattr(Slurm, "sbatch", real)
    assert slurm(store).launch(nodes, store, quiet) == 3
    assert len(fake.queue) == len(nodes) and there.items() <= fake_ids(store, fake).items()


def test_what_is_done_failed_or_elsewhere_is_not_submitted(fake: FakeSlurm, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = graph(store, ("mae", "scratch", "beit"), ("linear", "knn"))
    by = {n.name: n for n in nodes}
    finish(store, by["mae"])
    finish(store, by["knn-mae"])
    write_json(store.folder(by["scratch"]) / "failure.json", {"message": "loss nan", "type": "JobFailed", "traceback": "", "time": 0})
    with lock(store.folder(by["beit"])):  # as a `local` launcher's job does
        assert slurm(store).launch(nodes, store, quiet) == 3
    assert set(fake_ids(store, fake)) == {by["linear-mae"].folder, by["dvae"].folder}
    assert "dependency" not in fake.options("100"), "a parent that is done is not waited for"
    assert "4 nodes wait for one that failed" in capsys.readouterr().err


def test_a_node_that_is_tried_again_goes_by_the_new_line(fake: FakeSlurm, store: Store) -> None:
    """Where its data lies and what it does when memory gives out may have changed since job.json was written: they are in no key."""
    old = Node("pretrain", "mae", {"plugin": "mae"}, {}, {"title": "pretrain mae", "seed": 0}, {"folders": {"imagenet": "/old"}, "on_oom": "fail"})
    new = dataclasses.replace(old, identity={"plugin": "mae"}, where={"folders": {"imagenet": "/new"}, "on_oom": "halve"})
    write_job(old, store)
    assert old.key == new.key and slurm(store).launch([new], store, quiet) == 3
    assert read_job(store.folder(new) / "job.json")["where"] == new.where


def test_limits_of_the_cluster(fake: FakeSlurm, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """MaxArraySize of the fake is 11; max_submit counts other jobs of the user; the rest comes when there is room."""
    nodes = graph(store, ("mae",), tuple(f"linear@{i}" for i in range(25)))
    fake.queue = [["7", "RUNNING", "n1", "mine", "None"]]
    launcher = slurm(store, "max_submit = 20")
    assert launcher.launch(nodes, store, quiet) == 3
    assert len(fake.queue) == 20 and [fake.options(i).get("array") for i in fake.scripts] == [None, "0-10%11", "0-6%7"]
    assert "7 nodes are not submitted yet: the queue has no room for more (max_submit is 20, 20 are there)" in capsys.readouterr().err
    fake.queue = fake.queue[:10]
    assert launcher.launch(nodes, store, quiet) == 3
    assert len(fake.queue) == 20


@pytest.mark.parametrize(("associations", "qos", "text", "limit", "taken"), [
    ("root|lab||5|\nroot|root|||\n", "normal -", 'account = "lab"', "MaxSubmitJobs is 5", 5),
    ("root|lab||5|\nroot|root||6|\n", "normal 9", "", "MaxSubmitJobs is 6", 6),  # the user's own account
    ("root|root|low|2|fast\nroot|root||20|fast\n", "fast 4", 'partition = "high"', "MaxSubmitJobsPerUser of the QOS fast is 4", 4),
    ("root|root|||fast\n", "slow 3", 'qos = "slow"', "MaxSubmitJobsPerUser of the QOS slow is 3", 3),
    ("root|root|||\n", "normal -", "", "", 10),
])
def test_limits_of_accounting(
    fake: FakeSlurm, store: Store, capsys: pytest.CaptureFixture[str], associations: str, qos: str, text: str, limit: str, taken: int
) -> None:
    """The smallest of what accounting, the configuration and the profile allow, and which one it is."""
    (fake.folder / "associations").write_text(associations)
    (fake.folder / "qos").write_text(f"{qos}\n".replace("-", ""))
    assert slurm(store, text).launch(graph(store, ("mae",), tuple(f"linear@{i}" for i in range(9))), store, quiet) == 3
    said = capsys.readouterr().err
    assert len(fake.queue) == taken and (f"no room for more ({limit}, {taken} are there)" in said if limit else "not submitted" not in said)


def test_limits_that_are_not_enforced_hold_nothing_back(fake: FakeSlurm, store: Store) -> None:
    (fake.folder / "associations").write_text("root|root||5|\n")
    (fake.folder / "qos").write_text("normal 4\n")
    (fake.folder / "enforced").write_text("associations\n")
    assert slurm(store).launch(graph(store, ("mae",), tuple(f"linear@{i}" for i in range(9))), store, quiet) == 3
    assert len(fake.queue) == 10


def test_what_sbatch_refuses_is_said(fake: FakeSlurm, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = graph(store)
    (fake.folder / "refuse").write_text("100")
    with pytest.raises(UserError, match=r"cluster.toml: sbatch: QOSMaxSubmitJobPerUserLimit: Batch job submission failed"):
        slurm(store).launch(nodes, store, quiet)
    (fake.folder / "refuse").write_text("102")
    assert slurm(store).launch(nodes, store, quiet) == 3
    assert len(fake.scripts) == 2 and "QOSMaxSubmitJobPerUserLimit" in capsys.readouterr().err
    (fake.folder / "refuse").unlink()
    assert slurm(store).launch(nodes, store, quiet) == 3
    assert len(fake.queue) == len(nodes)


def test_states_for_status(fake: FakeSlurm, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = graph(store, ("mae",), ("linear",))
    slurm(store).launch(nodes, store, quiet)
    fake.set("100", "RUNNING", "n7")
    write_json(store.folder(nodes[0]) / "progress.json", {"time": time.time() - 1300})
    away = queued(store)
    assert (away[nodes[0].folder].status, away[nodes[0].folder].reason) == ("running", "job 100 on n7, no step for 22 minutes")
    assert store.explain(store.folder(nodes[1]), away).reason == "job 101 waits: Dependency"
    write_json(store.folder(nodes[0]) / "slurm.json", {"attempts": [{"job": "100", "host": "n7", "start": 0, "how": "stopped"}]})
    assert queued(store)[nodes[0].folder].status == "running", "stopped to be put back: SLURM shows it for a moment as it was"
    write_json(store.folder(nodes[0]) / "slurm.json", {"attempts": [{"job": "100", "host": "n7", "start": 0, "how": "data error"}]})
    assert queued(store)[nodes[0].folder].reason.startswith("left the queue (data error)"), "it has said that it is over"
    fake.set("100", "PENDING", "", "BeginTime")
    assert queued(store)[nodes[0].folder].status == "pending", "and when it is put back it waits"
    (fake.folder / "down").write_text("")
    said = "the queue is not shown: no SLURM cluster answers on this machine (squeue: Unable to contact slurm controller (connect failure)): run this"
    assert queued(store) == {} and said in capsys.readouterr().err
    with pytest.raises(UserError, match="Unable to contact"):
        slurm(store).launch(nodes, store, quiet)


def test_a_job_that_never_began_is_not_simply_missing(fake: FakeSlurm, store: Store) -> None:
    """A setup line that fails on the node leaves no record; status says where SLURM put what it printed."""
    nodes = graph(store, ("mae",), ("linear",))
    slurm(store).launch(nodes, store, quiet)
    fake.queue = []
    away = queued(store)
    assert set(away) == {nodes[0].folder} and away[nodes[0].folder].status == "interrupted", "what waits for it is explained by it"
    assert "left the queue (never began): see" in away[nodes[0].folder].reason
    assert store.explain(store.folder(nodes[1]), away).reason.startswith("its checkpoint interrupted: left the queue")
    write_json(store.folder(nodes[0]) / "slurm.json", {"attempts": [{"job": "100", "host": "n7", "start": 0}]})
    assert "left the queue (died without a word): see" in queued(store)[nodes[0].folder].reason
    (fake.folder / "out_of_memory").write_text("99\n100\n")  # SLURM ended the job, and with it what would have said so
    assert "left the queue (out of memory): see" in queued(store)[nodes[0].folder].reason


def test_wait_takes_on_what_another_process_was_at_work_on(fake: FakeSlurm, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent runs under `local`: the child is submitted when that is done, not forgotten."""
    monkeypatch.setattr("slurm.launcher.HELD_S", 0.0)
    nodes = graph(store, ("mae",), ("linear",))
    seen: list[str] = []

    def show(status: Any) -> None:
        seen.append(status[nodes[1].key])
        if len(seen) == 1:
            held.close()
            finish(store, nodes[0])
        elif fake.queue:
            finish(store, nodes[1], fake)

    with ExitStack() as held:
        held.enter_context(lock(store.folder(nodes[0])))
        assert slurm(store, wait=True).launch(nodes, store, show) == 0
    assert seen[0] == "pending" and seen[-1] == "done"


def test_wait_outlasts_a_queue_that_takes_no_more(
    fake: FakeSlurm, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of its own is left there, and other jobs of the user fill what the QOS allows: it says so once, and asks again."""
    monkeypatch.setattr("slurm.launcher.HELD_S", 0.0)
    nodes, launcher, tries, seen = graph(store, ("mae",), ("linear",)), slurm(store, wait=True), list[Any](), list[str]()

    def sbatch(group: Any, store: Store) -> str:
        tries.append(group)
        if len(tries) == 6:  # refused at the launch, while its parent runs, and twice when that is done
            (fake.folder / "refuse").unlink()
        return Slurm.sbatch(launcher, group, store)

    def show(status: Any) -> None:
        seen.append(status[nodes[1].key])
        finish(store, nodes[0 if len(seen) == 1 else 1], fake)

    monkeypatch.setattr(launcher, "sbatch", sbatch)
    (fake.folder / "refuse").write_text("101")
    assert launcher.launch(nodes, store, show) == 0
    assert len(tries) == 6 and seen == ["pending", "pending", "done"] and capsys.readouterr().err.count("; asking again") == 1


def test_wait_follows_to_the_end(fake: FakeSlurm, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held back is submitted once there is room; a job taken out of the queue ends the wait too, with what is below it."""
    monkeypatch.setattr("slurm.launcher.HELD_S", 0.0)
    nodes = graph(store, ("mae", "scratch"), ("linear",))
    by = {n.name: n for n in nodes}
    seen: list[dict[str, str]] = []

    def show(status: Any) -> None:
        seen.append({n.name: status[n.key] for n in nodes})
        step = len(seen)
        if step == 1:
            assert set(seen[0].values()) == {"pending"} and len(fake.queue) == 2
            finish(store, by["mae"], fake)
        elif by["linear-mae"].folder in fake_ids(store, fake) and "RUNNING" not in {line[1] for line in fake.queue}:
            fake.set(fake_ids(store, fake)[by["linear-mae"].folder], "RUNNING", "n1")
        elif seen[-1]["linear-mae"] == "running":
            finish(store, by["linear-mae"], fake)
            fake.queue = []  # scratch is cancelled by hand

    assert slurm(store, "max_submit = 2", wait=True).launch(nodes, store, show) == 0
    assert seen[-1] == {"mae": "done", "linear-mae": "done", "scratch": "killed", "linear-scratch": "blocked"}


def test_cancel(fake: FakeSlurm, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = graph(store, ("mae",), ("linear", "knn"))
    slurm(store).launch(nodes, store, quiet)
    parser = argparse.ArgumentParser()
    Cancel.add_arguments(parser)
    with pytest.raises(UserError, match="cancel nothing: no such run in the queue"):
        Cancel().run(parser.parse_args(["nothing", "--runs", str(store.root)]))
    assert Cancel().run(parser.parse_args([nodes[1].key[:6], "--runs", str(store.root)])) == 0
    assert {line[0] for line in fake.queue} == {"100", "101_1"}
    assert Cancel().run(parser.parse_args(["--runs", str(store.root)])) == 0
    assert fake.queue == [] and "cancelled 101_0" in capsys.readouterr().out


def test_dry_run_shows_the_text_that_sbatch_gets(fake: FakeSlurm, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = graph(store, ("mae",), ("linear", "knn"))
    launcher = slurm(store, 'partition = "gpu"\ngpus = 1\ngres = "gpu:h100:{gpus}"\nsetup = ["module load cuda"]\nextra = ["--reservation=x"]')
    text = launcher.preview(nodes, store)
    assert not fake.scripts, "nothing is submitted"
    launcher.launch(nodes, store, quiet)
    batch = next(line[3] for line in fake.queue if line[0] == "100")
    shown = text[text.index("#!"):text.index("# ---- J2")]
    assert shown.replace("J1", batch).strip() == fake.scripts["100"].strip()
    for line in ("#SBATCH --partition=gpu", "#SBATCH --gres=gpu:h100:1", "#SBATCH --reservation=x", "module load cuda", "#SBATCH --signal=B:USR2@120"):
        assert line in text.splitlines()
    assert "--dependency=afterok:J1" in text and "--array=0-1%2" in text
    done = subprocess.run(["bash", "-n"], input=shown, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("PATH", "")
    assert slurm(store).preview(nodes, store).count("#!/bin/bash") == 2, "also where there is no SLURM"
    for node in nodes:
        finish(store, node)
    assert launcher.preview(nodes, store) == "nothing to submit" and launcher.preview(nodes, store, force=True).count("#!/bin/bash") == 2


def test_a_job_on_several_gpus_and_machines(fake: FakeSlurm, store: Store) -> None:
    """A process on each GPU of each machine; what one process has to do asks for its share only, and keeps nobody's GPUs idle."""
    pretrain = Node("pretrain", "mae", {"plugin": canonical(MAE()), "recipe": None}, {}, {"title": "pretrain mae", "seed": 0})
    on_features = Recipe(batch=8, lr=1.0, epochs=1, augment=CENTRE)
    scores = [
        Node("evaluate", name, {"plugin": canonical(plugin), "recipe": canonical(recipe)}, {"checkpoint": pretrain}, {"title": name, "seed": 0})
        for name, plugin, recipe in (("imagenet", ImageNet(), None), ("knn", KNN(), None), ("linear", Linear(), on_features))
    ]
    for node in (pretrain, *scores):
        write_job(node, store)
    slurm(store, "machines = 2\ngpus = 4\ncpus = 32").launch([pretrain, *scores], store, quiet)
    asked = {
        node.name: (fake.options(id)["nodes"], fake.options(id)["gpus-per-node"], fake.options(id)["cpus-per-task"], *environment(fake.scripts[id]))
        for node, id in ((n, fake_ids(store, fake)[n.folder].partition("_")[0]) for n in (pretrain, *scores))
    }
    assert asked["mae"] == asked["imagenet"] == ("2", "4", "32", "4", "8")
    assert asked["knn"] == asked["linear"] == ("1", "1", "8", "1", "8")
    assert command(Path("n"), 1)[1:] == ["-m", "harness.run", "n/job.json"]
    assert command(Path("n"), 2)[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"] and command(Path("n"), 2)[-4:] == command(Path("n"), 1)


def environment(script: str) -> tuple[str, str]:
    """Processes and threads that a script sets."""
    pairs = dict(line.removeprefix("export ").partition("=")[::2] for line in script.splitlines() if line.startswith("export "))
    return pairs["HARNESS_PROCESSES"], pairs["HARNESS_THREADS"]


def test_submitting_from_inside_a_job(fake: FakeSlurm, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch hands its environment on: the outer job's task number, shape and GPUs must not become the inner one's. What the user has set must."""
    outer = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "5", "SLURM_CPUS_PER_TASK": "8", "SLURM_MEM_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "3", "RANK": "1",
             "HARNESS_LAUNCHER_PID": "1"}
    for name, value in {**outer, "SLURM_CONF": "/etc/slurm.conf", "HARNESS_DATA": "/data"}.items():
        monkeypatch.setenv(name, value)
    assert slurm(store).launch(graph(store, ("mae",), ("linear",)), store, quiet) == 3
    given = dict(line.partition("=")[::2] for line in (fake.folder / "environment").read_text().splitlines())
    assert not set(outer) & set(given) and given["SLURM_CONF"] == "/etc/slurm.conf" and given["HARNESS_DATA"] == "/data" and "PATH" in given
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm(store).launch(graph(store, ("scratch",), ()), store, quiet) == 3
    assert "CUDA_VISIBLE_DEVICES=3" in (fake.folder / "environment").read_text().splitlines(), "outside of one it is the user's own"


def test_flags_of_another_launcher_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--cluster: --launcher local does not know it"):
        make_launcher(argparse.Namespace(launcher="local", cluster="x.toml", wait=False))
    with pytest.raises(UserError, match="name your cluster's profile with --cluster"):
        make_launcher(argparse.Namespace(launcher="slurm", cluster=None, wait=False))


@pytest.mark.parametrize(("profile", "said"), [('shared = ["/elsewhere"]', "--runs"), ("", "squeue: ")])
def test_what_cannot_be_submitted_is_refused_before_force_moves_results(
    fake: FakeSlurm, store: Store, smoke_data: Path, capsys: pytest.CaptureFixture[str], profile: str, said: str
) -> None:
    line = ["--methods", "scratch", "--evals", "knn", "--protocol", "smoke", "--data", str(smoke_data)]
    line += ["--launcher", "slurm", "--cluster", str(slurm(store, profile).cluster)]
    nodes = Planner(Request(("scratch",), ("knn",), "smoke", data=str(smoke_data))).plan().nodes
    for node in nodes:
        write_job(node, store)
        finish(store, node)
    (fake.folder / "down").touch()
    before = sorted(store.root.rglob("*"))
    assert main(["run", *line, "--force", "--runs", str(store.root)]) == 2 and said in capsys.readouterr().err
    assert sorted(store.root.rglob("*")) == before and all(store.state(store.folder(n)).status == "done" for n in nodes)
    assert main(["run", *line, "--runs", str(new := store.root.parent / "new")]) == 2 and not new.exists()


def test_auto_precision_is_that_of_the_nodes(store: Store) -> None:
    """A login node without a GPU must not decide that a GPU cluster computes in fp32."""
    assert slurm(store, "gpus = 1").precision == "bf16" and slurm(store, 'precision = "fp32"').precision == "fp32"


def test_without_submitit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra: the command line works without it, and this launcher says what to install."""
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert queued(store) == {}
    with pytest.raises(UserError, match=r"pip install 'vision-pretraining-harness\[slurm\]'"):
        slurm(store)
