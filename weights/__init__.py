"""Weights in and out: other people's checkpoints as a row of the table, ours for timm and transformers."""
