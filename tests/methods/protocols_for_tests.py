"""A protocol of each family without its data, for the tests of methods."""

from __future__ import annotations

from harness.spec import Protocol, ViTConfig


def family(name: str, vit: ViTConfig | None = None) -> Protocol:
    """A protocol of the family `name` with one backbone."""
    return Protocol(name=name, family=name, summary="test", backbones={"test": vit or ViTConfig()}, backbone="test")
