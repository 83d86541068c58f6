"""What a controller that falls leaves to the next: faults, the last checkpoint, the first and the last line. Stepped by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic.chaos import parse
from elastic.controller import membership as m
from elastic.controller.controller import Controller
from elastic.controller.run_log import RunLog
from elastic.controller.session import close
from elastic.controller.workers import Workers
from elastic.messages import Begin, Progress, Standing
from elastic.observe.jsonl import read_lines
from tests.support.rig import SETTINGS, Rig, metric, save


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


class Fallen(BaseException):
    """The controller's process is gone."""


def successor(rig: Rig, rewound_from: int = -1) -> Controller:
    """Who comes after a controller that fell."""
    rig.run_log.close()
    rig.controller.journal.lines.close()
    return Controller(rig.controller.job, SETTINGS, rig.fleet, RunLog.take_over(rig.run_dir),
                      Begin(rewound_from=rewound_from))


def test_a_continuation_finds_whom_a_controller_before_has_stopped(tmp_path: Path) -> None:
    rig = Rig(tmp_path, chaos=("stop:1@5", "cont:1@9"))
    rig.start("a", "b", "c")
    rig.controller.take_fault("b", parse("stop:1@5"))
    stopped = rig.controller.workers["b"].ready
    rig.controller.give_up_on("b", "hangs")
    again = successor(rig)
    assert again.chaos == ["cont:1@9"]
    again.take_fault("a", parse("cont:1@9"))
    assert rig.fleet.of("inject") == [(parse("cont:1@9"), stopped)]


def durable(controller: Controller) -> dict[str, tuple[Any, ...]]:
    """Of each worker's record what does not go by a clock."""
    return {name: (one.node, one.ready, one.released, one.given_up, one.lost, one.stopped_as)
            for name, one in controller.workers.items()}


@pytest.mark.parametrize("is_compacted", [False, True])
def test_the_journal_gives_back_what_was_known_of_every_worker(is_compacted: bool, tmp_path: Path) -> None:
    rig = Rig(tmp_path, chaos=("stop:1@5", "stop:1@7"))
    rig.start("a", "b", "c")
    for worker, spec in (("b", "stop:1@5"), ("c", "stop:1@7")):  # the later one is who a continuation goes to
        rig.controller.take_fault(worker, parse(spec))
    rig.controller.give_up_on("b", "hangs")
    for worker in "ac":
        rig.say(Standing(worker, 1, "broken", 0))
    rig.controller.advance(m.ScaleTo(1))
    for worker in "ac":
        rig.say(Standing(worker, 2, "stopped", 0))
    rig.controller.advance(m.Starting("d", "node-d"))
    before = durable(rig.controller)
    assert [(name, one[2:]) for name, one in before.items()] == [
        ("a", (False, False, False, -1)), ("b", (False, True, True, -1)), ("c", (True, False, False, 1)),
        ("d", (False, False, False, -1))]
    journal, controller = rig.controller.journal, rig.controller
    if is_compacted:
        long, journal.compact_at = journal.lines.size, 0
        journal.compact(controller.past)
        assert [*read_lines(journal.lines.path)[1]] == ["past"] and journal.lines.size < long
        rig.controller.advance(m.Starting("e", "node-e"))  # it goes on from there
        before = durable(rig.controller)
        before["b"] = "node-b", None, *before["b"][2:]  # of one that is gone and that nobody asks for
    again = successor(rig)
    assert durable(again) == before and again.state == rig.controller.state
    assert replace(again.past, workers=Workers()) == replace(controller.past, workers=Workers())
    assert again.journal.secret == journal.secret
    assert journal.lines.path.stat().st_mode & 0o777 == 0o600, "it holds the run's secret"
    assert again.workers.stopped(1) == before["c"][1] and [ready.worker for ready in again.workers.live()] == ["a"]


@pytest.mark.parametrize("spec", ["scale:1@5", "cont:1@5"])
def test_a_fault_that_may_come_twice_is_not_lost_with_a_controller(spec: str, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, chaos=(spec,))
    rig.start("a", "b")

    def fall(*arguments: Any) -> None:
        raise Fallen

    with monkeypatch.context() as patch:
        patch.setattr(rig.controller.journal, "spent", fall)
        with pytest.raises(Fallen):
            rig.controller.take_fault("a", parse(spec))
    again = successor(rig)
    assert (again.state.target == 1 or rig.fleet.of("inject")) and again.chaos == [spec]


def done(rig: Rig, generation: int, step: int) -> None:
    rig.say(Standing("a", generation, "done", step, state_sha256="s"))


def test_a_last_checkpoint_that_fell_with_controllers_is_saved_once_more_however_often(rig: Rig) -> None:
    rig.start("a")
    rig.steps(1, 2)
    for generation in (1, 2, 3):
        done(rig, generation, 2)
        assert rig.controller.outcome is None and rig.assigned()[0].number == generation + 1
    rig.say(save(rig, 2, generation=4))
    done(rig, 4, 2)
    assert rig.controller.outcome is not None and rig.controller.outcome.status == "done"
    assert not rig.events("step_failed")


def test_but_not_for_ever(rig: Rig) -> None:
    rig.start("a")
    rig.steps(1, 2)
    for generation in range(1, 30):
        if rig.controller.outcome is None:
            done(rig, generation, 2)
    assert rig.controller.outcome is not None and rig.controller.outcome.status == "failed" and generation > 9
    assert "The checkpoint of step 2 was not committed." in rig.controller.outcome.error


def test_a_disk_that_does_not_take_the_last_checkpoint_ends_the_run_with_what_it_says(rig: Rig) -> None:
    rig.start("a")
    rig.steps(1, 2)
    sentence = "The checkpoint of step 2 could not be written to /there (No space left on device); make room, then resume the run."
    for generation in (1, 2):
        assert rig.controller.outcome is None
        rig.say(replace(save(rig, 2, generation), error=sentence))
        done(rig, generation, 2)
    assert rig.controller.outcome is not None and (rig.controller.outcome.status,
                                                   rig.controller.outcome.error) == ("failed", sentence)


def test_first_and_last_line_are_written_by_whoever_comes_to_it_and_once(rig: Rig) -> None:
    rig.run_log.event("rewound", **{"from": 7, "to": 0})
    rig.run_log.event("noted", why="norm is in evaluation mode")
    again = successor(rig, 7)  # it fell between the first lines
    again.job = replace(again.job, notes=(("noted", "norm is in evaluation mode"),
                                          ("mesh_chosen", "tensor = 2: it fits")))
    again.opened()
    assert [(e["from"], e["to"]) for e in rig.events("rewound")] == [(7, 0)] and len(rig.events("run_started")) == 1
    assert [e["why"] for name in ("noted", "mesh_chosen")
            for e in rig.events(name)] == [why for _, why in again.job.notes]
    rig.controller, rig.run_log = again, again.run_log
    once_more = successor(rig, 7)
    once_more.opened()
    close(once_more, m.Finish("done"))
    rig.controller, rig.run_log = once_more, once_more.run_log
    last = successor(rig)  # it fell after its last line
    close(last, m.Finish("done"))
    assert [len(rig.events(name)) for name in ("rewound", "run_started", "run_finished", "run_failed")] == [1, 1, 1, 0]


@pytest.mark.parametrize("word", [Progress("a", 2, 7, "forward", 0, False), Standing("a", 2, "done", 8), metric(3, 2)])
def test_a_generation_that_the_journal_lacks_ends_the_run(word: Any, rig: Rig) -> None:
    """The disk was full as it was formed: who is in it nobody knows, and nobody would ever stand by."""
    rig.start("a")
    rig.steps(1, 2)
    again = successor(rig)
    again.take("a", Progress("a", 1, 7, "forward", 0, False))
    assert again.outcome is None
    again.take("a", word)
    assert again.outcome is not None and again.outcome.status == "failed"
    assert "its journal lacks generation 2; make room there" in again.outcome.error
    assert rig.written() == [1, 2] and rig.fleet.aborted() == [m.Abort("a", 2)]
