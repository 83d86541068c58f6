"""P4, P7: a process that stands still is found, replaced, and can change nothing when it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import assert_fired, assert_sound, assert_survivors_kept, bits, events, train

pytestmark = pytest.mark.usefixtures("cluster")
HANG_TIMEOUT_S = 3.0


def test_a_stopped_worker_is_found_replaced_and_fenced(tmp_path: Path) -> None:
    faults = ["stop:1@8/forward", "cont:1@16", "stop:1@24/reduction", "cont:1@32"]
    result = train(tmp_path / "run", 2, faults, elastic={"hang_timeout_s": HANG_TIMEOUT_S, "min_workers": 2})
    assert_sound(result, bits())
    assert_survivors_kept(result)
    assert_fired(result, faults)
    hangs, losses = events(result, "hang"), events(result, "worker_lost")
    assert [e["worker"] for e in hangs] == [e["worker"] for e in losses] and len({e["worker"] for e in hangs}) == 2
    assert [e["rank"] for e in losses] == [1, 1]
    assert all(HANG_TIMEOUT_S <= e["silent_s"] < HANG_TIMEOUT_S + 2.0 for e in hangs)
    for lost in losses:
        later = [g for g in events(result, "generation_started") if g["generation"] > lost["generation"]]
        assert later and all(lost["worker"] not in [w["worker"] for w in g["workers"]] for g in later)
