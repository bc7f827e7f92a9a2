"""SLURM: the only place that imports submitit. Empty until the cluster issue; `--launcher` lists what is installed."""
