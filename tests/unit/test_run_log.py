"""What is on disk: each committed step once, each pause with its causes and its length."""

from __future__ import annotations

import base64
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.controller.run_log import Books
from elastic.errors import UserError
from elastic.observe import ledger
from elastic.observe.jsonl import read_lines


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path)


def line(step: int, time: float = 0.0, generation: int = 1, step_s: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "time": time or float(step), "step_s": step_s, "world_size": 2, "generation": generation, "samples": 4}


def on_disk(books: Books) -> list[Any]:
    return [fields["step"] if "eval" not in fields else (fields["step"], fields["eval"]["loss"]) for fields in read_lines(books.metrics.path)]


def events(books: Books, name: str) -> list[dict[str, Any]]:
    return [fields for fields in read_lines(books.events.path) if fields["event"] == name]


def test_each_step_once_and_in_order(books: Books) -> None:
    for step in (1, 2, 2, 1, 3, 3, 2, 4):
        books.metric(1, line(step))
    assert on_disk(books) == [1, 2, 3, 4]
    assert books.written == 4 and not events(books, "lines_missing")


def test_lines_that_are_missing_are_spoken_of(books: Books) -> None:
    for step in (1, 4, 5):
        books.metric(1, line(step))
    assert on_disk(books) == [1]
    assert [(e["first"], e["last"]) for e in events(books, "lines_missing")] == [(2, 3)]
    for step in (2, 3, 4, 5):  # from whoever has them
        books.metric(2, line(step))
    assert on_disk(books) == [1, 2, 3, 4, 5]


def test_each_evaluation_once(books: Books) -> None:
    books.metric(1, line(1))
    for step, loss in ((1, 0.5), (1, 0.6)):
        books.metric(1, {"step": step, "eval": {"loss": loss}})
    books.metric(1, line(2))
    books.metric(1, {"step": 2, "eval": {"loss": 0.4}})
    books.metric(1, {"step": 1, "eval": {"loss": 0.3}})
    assert on_disk(books) == [1, (1, 0.5), 2, (2, 0.4)]
    assert books.evaluated == 2


def test_a_run_goes_on_where_it_stood(tmp_path: Path) -> None:
    first = Books(tmp_path)
    for step in (1, 2):
        first.metric(1, line(step))
    with pytest.raises(UserError, match="is alive"):
        Books(tmp_path)
    first.close()
    second = Books(tmp_path, written=2)
    for step in (1, 2, 3):
        second.metric(2, line(step))
    assert on_disk(second) == [1, 2, 3]


def test_an_event_says_when_and_where(books: Books) -> None:
    books.metric(1, line(1))
    books.generation = 3
    books.event("hang", worker="w")
    books.event("healed", 7, 2, bytes=5)
    hang, healed = events(books, "hang")[0], events(books, "healed")[0]
    assert (hang["generation"], hang["step"], hang["worker"]) == (3, 1, "w")
    assert (healed["generation"], healed["step"], healed["bytes"]) == (2, 7, 5)
    assert hang["time"] <= healed["time"]


def test_a_pause_is_what_lies_between_two_commits_beyond_a_step(books: Books) -> None:
    for step in range(1, 6):
        books.metric(1, line(step))
    books.interrupted(2, "killed", 4, 3, 0)
    assert not events(books, "recovered")
    books.metric(2, line(6, time=5.0 + 1.0 + 0.25, generation=2))
    recovered, resized = events(books, "recovered")[0], events(books, "resized")[0]
    assert recovered["pause_s"] == pytest.approx(0.25) and recovered["steps_lost"] == 0
    assert (resized["from"], resized["to"], resized["pause_s"]) == (4, 3, pytest.approx(0.25))
    books.metric(2, line(7, generation=2))
    assert len(events(books, "recovered")) == 1


def test_several_breaks_are_one_pause(books: Books) -> None:
    books.metric(1, line(1, time=10.0))
    books.interrupted(2, "resize", 4, 2, 0)
    books.interrupted(3, "killed", 2, 1, 3)
    books.interrupted(4, "broken", 1, 4, 2)
    books.metric(3, line(2, time=11.0, generation=3))  # a line from before the last break does not end it
    assert not events(books, "recovered")
    books.metric(4, line(3, time=20.0, generation=4))
    recovered = events(books, "recovered")
    assert [(e["steps_lost"], e["pause_s"]) for e in recovered] == [(5, pytest.approx(9.0))]
    assert events(books, "resized") == []  # four before, four after


@pytest.mark.parametrize("cause", ["resize", "drain"])
def test_a_planned_change_is_no_recovery(cause: str, books: Books) -> None:
    books.metric(1, line(1))
    books.interrupted(2, cause, 2, 4, 0)
    books.metric(2, line(2, generation=2))
    assert not events(books, "recovered") and len(events(books, "resized")) == 1


def test_a_follower_gets_every_line_once(books: Books) -> None:
    seen: list[dict[str, Any]] = []
    known = 0
    for step in range(1, 4):
        books.metric(1, line(step))
        books.event("hang")
        new, known = books.since(known)
        seen += new
    assert len(seen) == known == 6 and books.since(6) == ([], 6)
    assert [fields["step"] for fields in seen if "loss" in fields] == [1, 2, 3]


def test_a_step_whose_rows_a_full_disk_does_not_take_has_no_line(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step in metrics.jsonl is in the ledger, at any moment; nothing is lost, and what goes back needs no room."""

    def full(file: Any, piece: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fed(step: int, generation: int = 1) -> dict[str, Any]:
        rows = np.array([[0, step - 1, 0, step - 1]], "<i8")
        return {**line(step, generation=generation), "samples": 1, "ledger": {"sizes": [9], "rows": base64.b64encode(rows.tobytes()).decode()}}

    books.metric(1, fed(1))
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "write_whole", full)
        for step, generation in ((2, 1), (3, 2), (4, 2)):
            books.metric(generation, fed(step, generation))
        assert on_disk(books) == [1] and (books.written, books.on_disk) == (4, 1)
        assert not books.retry() and books.error is not None and books.error.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space"):
            books.sync()
        books.cut_back(3)
        assert (books.written, books.on_disk) == (3, 1)
    assert books.retry() and books.on_disk == 3 and on_disk(books) == [1, 2, 3]
    books.metric(3, fed(4, 3))
    books.sync()
    problems, facts = ledger.prove(books.metrics.path.parent, [{"step": step, "samples": 1} for step in range(1, 5)])
    assert not problems and facts[0].startswith("ledger: 4 positions, each fed once")
