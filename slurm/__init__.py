"""SLURM: the launcher, cluster profiles and the local test cluster. The only place that imports submitit."""
