"""Evaluators: one file each; everything of OpenMMLab stays in evals/openmmlab."""
