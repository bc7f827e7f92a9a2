"""Every recorded answer is tested: nothing is left out by not being looked at."""

from __future__ import annotations

import pytest
from known_answers import FOLDER, cases, golden

TESTED = {
    "mae_pretrain", "mae_pretrain_groups", "mae_pos_embed", "mae_finetune", "beit_pretrain", "beit_masking", "beit_finetune", "dalle_encoder",
    "deit_ra_sampler", "robustness_metrics", "init_statistics", "upernet_taps", "vitdet_pieces", "mocov3_loss", "dino_loss",
}


def test_every_file_is_tested() -> None:
    """A file that is missing makes its tests fail; one that is new must not pass by unseen."""
    files = {path.stem for path in FOLDER.glob("*.npz")}
    assert files == TESTED


@pytest.mark.parametrize(
    ("name", "claimed"),
    [
        ("mae_pos_embed", lambda part: part in ("mae", "mae_large", "interpolate", "mocov3")),
        ("mae_finetune", lambda part: part in ("config", "state", "lrd", "lr_sched") or f"{part}/state_names" in golden("mae_finetune")),
        (
            "beit_finetune",
            lambda part: part in ("config", "state", "rel_interp", "layer_decay", "cosine_scheduler") or f"{part}/state_names" in golden("beit_finetune"),
        ),
        ("init_statistics", lambda part: part in ("mae_pretrain", "mocov3", "dino") or part.startswith(("beit_pretrain", "dalle_")) or "finetune" in part),
    ],
)
def test_every_entry_is_tested(name: str, claimed) -> None:  # type: ignore[no-untyped-def]
    """Files with many kinds of entries: each is enumerated by a test."""
    assert [part for part in cases(golden(name)) if not claimed(part)] == []
