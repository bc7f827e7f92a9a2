#!/usr/bin/env bash
# A sweep, line by line: CLUSTER=my.toml RUNS=/scratch/me/runs DATA=/datasets bash slurm/sweep.sh
# Each line can be typed by itself. Called again it submits what is missing, and nothing twice.
set -euo pipefail
cluster=${CLUSTER:?a cluster profile: see slurm/profiles/} runs=${RUNS:?a folder that all nodes see} data=${DATA:?the folder of the data sets}
sweep=(--methods beit,mae,supervised --evals imagenet,linear,ade20k --protocol paper --seeds 0,1,2 --data "$data" --runs "$runs")
slurm=(--launcher slurm --cluster "$cluster")

python -m harness doctor --cluster "$cluster" --runs "$runs" --data "$data" --drill    # does it work there, and survive preemption?
python -m harness run "${sweep[@]}" "${slurm[@]}" --dry-run > "$runs/sweep.txt"         # the graph and the text of every batch, to read
python -m harness run "${sweep[@]}" "${slurm[@]}" || [ $? = 3 ]                         # into the queue; 3 = submitted
python -m harness status --runs "$runs"                                                # done, running, pending, failed, and why
# hours or days later, the first line for what failed meanwhile:
#   python -m harness run "${sweep[@]}" "${slurm[@]}" --retry
#   python -m harness table --runs "$runs"
#   python -m harness cancel --runs "$runs"
