"""P4, P7: a process that stands still is found, replaced, and can change nothing when it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import assert_sound, assert_survivors_kept, events, train

pytestmark = pytest.mark.usefixtures("cluster")
HANG_TIMEOUT_S = 3.0


@pytest.mark.parametrize("phase", ["forward", "reduction"])
def test_a_stopped_worker_is_found_replaced_and_fenced(tmp_path: Path, phase: str) -> None:
    undisturbed = train(tmp_path / "undisturbed", 2)
    result = train(tmp_path / "run", 3, [f"stop:1@30/{phase}", "cont:1@60"], elastic={"hang_timeout_s": HANG_TIMEOUT_S})
    assert_sound(result, undisturbed.summary["state_sha256"])
    assert_survivors_kept(result)
    (hang,), (lost,) = events(result, "hang"), events(result, "worker_lost")
    assert hang["worker"] == lost["worker"]
    assert lost["rank"] == 1
    assert HANG_TIMEOUT_S <= hang["silent_s"] < HANG_TIMEOUT_S + 2.0
    assert [e["fault"] for e in events(result, "chaos")][-1] == "cont:1@60"
    later = [g for g in events(result, "generation_started") if g["generation"] > lost["generation"]]
    assert all(lost["worker"] not in [w["worker"] for w in g["workers"]] for g in later)
