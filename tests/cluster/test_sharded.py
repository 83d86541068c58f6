"""The optimizer's state shared out over real processes: each worker falls once, and its twin has what it had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import assert_sound, assert_survivors_kept, events, train

pytestmark = pytest.mark.usefixtures("cluster")
STEPS = 24
WIDE = {"run": {"name": "bits", "steps": STEPS, "eval_every": 10}, "model": {"layers": 2, "width": 128}, "checkpoint": {"every_steps": 0}}


@pytest.fixture(scope="module")
def bits(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state of one worker that keeps everything."""
    return train(tmp_path_factory.mktemp("undisturbed") / "run", 1, **WIDE).summary["state_sha256"]


@pytest.mark.parametrize("phase", ["update", "gather", "reduction"])
def test_each_worker_falls_once(bits: str, tmp_path: Path, phase: str) -> None:
    """Spares take the places at once. Nothing is read from a checkpoint: there is none before the end."""
    faults = [f"kill:0@5/{phase}", f"kill:1@10/{phase}", f"kill:2@15/{phase}"]
    result = train(tmp_path / "run", 3, faults, elastic={"spares": 3}, optimizer={"sharded": True}, **WIDE)
    assert_sound(result, bits, STEPS)
    assert_survivors_kept(result)
    assert len(events(result, "worker_lost")) == 3
    used = [event["blocks"] for event in events(result, "twin_used")]
    assert len(used) == 3 and all(blocks > 0 for blocks in used)
    assert events(result, "optimizer_resharded") and not events(result, "rewound") and not events(result, "loaded")
