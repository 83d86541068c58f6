"""The optimizer's state shared out over real processes: each worker falls once, and its twin has what it had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import assert_fired, assert_sound, assert_survivors_kept, bits, events, train

pytestmark = pytest.mark.usefixtures("cluster")
STEPS = 24
WIDE = {"run": {"name": "bits", "steps": STEPS, "eval_every": 10}, "model": {"layers": 1, "width": 128},
        "checkpoint": {"every_steps": 0}}


def test_each_worker_falls_once(tmp_path: Path) -> None:
    """Each in another phase, once all three are there. Nothing is read from a checkpoint: there is none before the end.
    """
    faults = ["kill:0@5/update", "kill:1@10/gather", "kill:2@15/reduction"]
    result = train(tmp_path / "run", 3, faults,
                   **{**WIDE, "elastic": {"min_workers": 3}, "optimizer": {"sharded": True}})
    assert_sound(result, bits(**WIDE), STEPS)
    assert_survivors_kept(result)
    assert_fired(result, faults)
    assert len(events(result, "worker_lost")) == 3
    used = [event["blocks"] for event in events(result, "twin_used")]
    assert len(used) == 3 and all(blocks > 0 for blocks in used)
    assert events(result, "optimizer_resharded") and not events(result, "rewound") and not events(result, "loaded")
