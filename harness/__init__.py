"""A benchmark and reproduction harness for vision pre-training. `python -m harness --help` is the place to start."""

__version__ = "0.1.0"
