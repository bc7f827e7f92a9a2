"""The text that sbatch gets for one job or array. submitit writes it, with its names and quoting; the command in it is ours.

submitit's own job format, a pickled function, and its view of the queue, by sacct, are not used: a job is a file that
`python -m harness.run` reads, the same under every launcher, and its state is its records.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from harness.jobs import Node
from slurm.profile import Profile, Resources
from slurm.snapshot import python_path


def script(
    batch: Path, nodes: Sequence[Node], resources: Resources, profile: Profile, tree: Path, after: Mapping[str, Sequence[str]] = MappingProxyType({}),
    running: int = 0, probe: int = 0,
) -> str:
    """The batch script of nodes that ask for the same and wait for the same jobs.

    Args:
        batch: its folder.
        tree: the copy of the code that it runs.
        after: kind of dependency -> ids of the jobs that must have ended before it starts; where one of afterok ends badly, SLURM removes it from the queue.
        running: tasks of an array at a time, 0: all.
        probe: instead of nodes of the graph, the probe of `doctor --cluster` on so many machines.
    """
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):  # type: ignore[misc, unused-ignore]
        """submitit's executor, for its text."""

        @classmethod
        def affinity(cls) -> int:
            """Where there is no SLURM the text can be shown all the same."""
            return 2

    array = len(nodes) > 1
    threads = str(resources.cpus // resources.each)
    python = profile.python or sys.executable
    exports = {
        "PYTHONPATH": python_path(tree), "PYTHONSAFEPATH": "1",  # or the folder that sbatch was called in, the tree itself perhaps, would come first
        "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads, "HARNESS_THREADS": threads, "HARNESS_PROCESSES": str(resources.each),
        **dict(resources.environment),
    }
    executor = Executor(folder=batch)
    executor.update_parameters(
        job_name="harness doctor" if probe else name_of(nodes),
        partition=resources.partition or None, account=resources.account or None, qos=resources.qos or None,
        constraint=resources.constraint or None, time=resources.time or None, cpus_per_task=resources.cpus, nodes=probe or resources.machines,
        ntasks_per_node=1,
        gpus_per_node=resources.gpus or None if not resources.gres else None, gres=resources.gres.format(gpus=resources.gpus) if resources.gpus else None,
        mem=resources.mem or None, mem_per_cpu=resources.mem_per_cpu or None, mem_per_gpu=resources.mem_per_gpu or None,
        dependency=",".join(f"{kind}:{':'.join(ids)}" for kind, ids in after.items() if ids) or None,
        comment=batch.name, wckey=None, use_srun=False, stderr_to_stdout=True,
        array_parallelism=running or len(nodes), setup=[*resources.setup, *(f"export {k}={shlex.quote(v)}" for k, v in exports.items())],
        additional_parameters={
            "output": str(batch / ("slurm-%A_%a.out" if array else "slurm-%j.out")),
            "no-requeue" if probe else "requeue": True, "signal": f"B:USR2@{resources.signal_s}",
            **({"kill-on-invalid-dep": "yes"} if after.get("afterok") else {}),
        },
    )
    if array:
        executor.parameters["map_count"] = len(nodes)  # as submitit does for its own arrays
    start = f"srun --cpus-per-task={resources.cpus} {shlex.quote(python)} -m slurm.probe_job" if probe else f"{shlex.quote(python)} -m slurm.worker"
    text = executor._make_submission_file_text(f"exec {start} {shlex.quote(str(batch))}", "")
    lines = text.strip().splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    return "\n".join([*lines[: last + 1], *(f"#SBATCH {option}" for option in resources.extra), *lines[last + 1:]]) + "\n"


def name_of(nodes: Sequence[Node]) -> str:
    """What squeue shows people: the node's name, or what the nodes of an array have in common."""
    if len({n.name for n in nodes}) == 1:
        return f"{nodes[0].kind} {nodes[0].name}"
    return f"{nodes[0].kind} x{len(nodes)}" if len({n.kind for n in nodes}) == 1 else f"harness x{len(nodes)}"
