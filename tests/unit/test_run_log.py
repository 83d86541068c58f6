"""What is on disk: each committed step once, each pause with its causes and its length."""

from __future__ import annotations

import base64
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.controller.run_log import RunLog
from elastic.errors import UserError
from elastic.observe import ledger_files as ledger
from elastic.observe.jsonl import read_lines


@pytest.fixture
def run_log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path)


def line(step: int, time: float = 0.0, generation: int = 1, step_s: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "time": time or float(step), "step_s": step_s, "world_size": 2,
            "generation": generation, "samples": 4}


def on_disk(run_log: RunLog) -> list[Any]:
    return [fields["step"] if "eval" not in fields else (fields["step"], fields["eval"]["loss"])
            for fields in read_lines(run_log.metrics.path)]


def events(run_log: RunLog, name: str) -> list[dict[str, Any]]:
    return [fields for fields in read_lines(run_log.events.path) if fields["event"] == name]


def test_each_step_once_and_in_order(run_log: RunLog) -> None:
    for step in (1, 2, 2, 1, 3, 3, 2, 4):
        run_log.metric(1, line(step))
    assert on_disk(run_log) == [1, 2, 3, 4]
    assert run_log.written == 4 and not events(run_log, "lines_missing")


def test_lines_that_are_missing_are_spoken_of(run_log: RunLog) -> None:
    for step in (1, 4, 5):
        run_log.metric(1, line(step))
    assert on_disk(run_log) == [1]
    assert [(e["first"], e["last"]) for e in events(run_log, "lines_missing")] == [(2, 3)]
    for step in (2, 3, 4, 5):  # from whoever has them
        run_log.metric(2, line(step))
    assert on_disk(run_log) == [1, 2, 3, 4, 5]


def test_each_evaluation_once(run_log: RunLog) -> None:
    run_log.metric(1, line(1))
    for step, loss in ((1, 0.5), (1, 0.6)):
        run_log.metric(1, {"step": step, "eval": {"loss": loss}})
    run_log.metric(1, line(2))
    run_log.metric(1, {"step": 2, "eval": {"loss": 0.4}})
    run_log.metric(1, {"step": 1, "eval": {"loss": 0.3}})
    assert on_disk(run_log) == [1, (1, 0.5), 2, (2, 0.4)]
    assert run_log.evaluated == 2


def test_a_run_goes_on_where_it_stood(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    for step in (1, 2):
        first.metric(1, line(step))
    with pytest.raises(UserError, match="is alive"):
        RunLog(tmp_path)
    first.close()
    second = RunLog(tmp_path, written=2)
    for step in (1, 2, 3):
        second.metric(2, line(step))
    assert on_disk(second) == [1, 2, 3]


def test_an_event_says_when_and_where(run_log: RunLog) -> None:
    run_log.metric(1, line(1))
    run_log.generation = 3
    run_log.event("hang", worker="w")
    run_log.event("healed", 7, 2, bytes=5)
    hang, healed = events(run_log, "hang")[0], events(run_log, "healed")[0]
    assert (hang["generation"], hang["step"], hang["worker"]) == (3, 1, "w")
    assert (healed["generation"], healed["step"], healed["bytes"]) == (2, 7, 5)
    assert hang["time"] <= healed["time"]


def test_a_pause_is_what_lies_between_two_commits_beyond_a_step(run_log: RunLog) -> None:
    for step in range(1, 6):
        run_log.metric(1, line(step))
    run_log.interrupted(2, "killed", 4, 3, 0)
    assert not events(run_log, "recovered")
    run_log.metric(2, line(6, time=5.0 + 1.0 + 0.25, generation=2))
    recovered, resized = events(run_log, "recovered")[0], events(run_log, "resized")[0]
    assert recovered["pause_s"] == pytest.approx(0.25) and recovered["steps_lost"] == 0
    assert (resized["from"], resized["to"], resized["pause_s"]) == (4, 3, pytest.approx(0.25))
    run_log.metric(2, line(7, generation=2))
    assert len(events(run_log, "recovered")) == 1


def test_several_breaks_are_one_pause(run_log: RunLog) -> None:
    run_log.metric(1, line(1, time=10.0))
    run_log.interrupted(2, "resize", 4, 2, 0)
    run_log.interrupted(3, "killed", 2, 1, 3)
    run_log.interrupted(4, "broken", 1, 4, 2)
    run_log.metric(3, line(2, time=11.0, generation=3))  # a line from before the last break does not end it
    assert not events(run_log, "recovered")
    run_log.metric(4, line(3, time=20.0, generation=4))
    recovered = events(run_log, "recovered")
    assert [(e["steps_lost"], e["pause_s"]) for e in recovered] == [(5, pytest.approx(9.0))]
    assert events(run_log, "resized") == []  # four before, four after


@pytest.mark.parametrize("cause", ["resize", "drain"])
def test_a_planned_change_is_no_recovery(cause: str, run_log: RunLog) -> None:
    run_log.metric(1, line(1))
    run_log.interrupted(2, cause, 2, 4, 0)
    run_log.metric(2, line(2, generation=2))
    assert not events(run_log, "recovered") and len(events(run_log, "resized")) == 1


def test_a_follower_gets_every_line_once(run_log: RunLog) -> None:
    seen: list[dict[str, Any]] = []
    known = 0
    for step in range(1, 4):
        run_log.metric(1, line(step))
        run_log.event("hang")
        new, known = run_log.since(known)
        seen += new
    assert len(seen) == known == 6 and run_log.since(6) == ([], 6)
    assert [fields["step"] for fields in seen if "loss" in fields] == [1, 2, 3]


def test_a_step_whose_rows_a_full_disk_does_not_take_has_no_line(run_log: RunLog,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step in metrics.jsonl is in the ledger, at any moment; nothing is lost, and what goes back needs no room.
    """

    def full(file: Any, piece: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fed(step: int, generation: int = 1) -> dict[str, Any]:
        rows = np.array([[0, step - 1, 0, step - 1]], "<i8")
        return {**line(step, generation=generation), "samples": 1,
                "ledger": {"sizes": [9], "rows": base64.b64encode(rows.tobytes()).decode()}}

    run_log.metric(1, fed(1))
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "write_whole", full)
        for step, generation in ((2, 1), (3, 2), (4, 2)):
            run_log.metric(generation, fed(step, generation))
        assert on_disk(run_log) == [1] and (run_log.written, run_log.on_disk) == (4, 1)
        assert not run_log.retry() and run_log.error is not None and run_log.error.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space"):
            run_log.sync()
        run_log.cut_back(3)
        assert (run_log.written, run_log.on_disk) == (3, 1)
    assert run_log.retry() and run_log.on_disk == 3 and on_disk(run_log) == [1, 2, 3]
    run_log.metric(3, fed(4, 3))
    run_log.sync()
    problems, facts = ledger.prove(run_log.metrics.path.parent, [{"step": step, "samples": 1} for step in range(1, 5)])
    assert not problems and facts[0].startswith("ledger: 4 positions, each fed once")
