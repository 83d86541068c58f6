"""A driver: every line reaches its callback once, whatever restarts, and a run that ended well is never told to have failed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from elastic.controller.run_log import RunLog
from elastic.driver import follow as door
from elastic.driver import place
from elastic.driver.follow import Callbacks, result_of, see_out
from elastic.driver.rundir import LIVE, live_of
from elastic.errors import RunFailed
from elastic.messages import Begin


def step(number: int, time: float = 0.0, generation: int = 1) -> dict[str, Any]:
    return {"step": number, "loss": 1.0, "time": time or float(number), "step_s": 1.0, "world_size": 1,
            "generation": generation, "samples": 4}


def evaluation(number: int) -> dict[str, Any]:
    return {"step": number, "eval": {"loss": float("nan")}}  # on disk: null


class Heard:
    """What the callbacks were told, in short."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def callbacks(self) -> Callbacks:
        return Callbacks(lambda fields: self.told.append(fields["step"]),
                         lambda fields: self.told.append(("eval", fields["step"])),
                       lambda fields: self.told.append(fields["event"]))


class Controllers:
    """One controller after another over the same run_log, polled as a driver does; `ask` answers for the one that is
    there."""

    def __init__(self, run_dir: Path, begin: Begin):
        self.run_dir, self.begin, self.pid = run_dir, begin, 1
        self.run_log = RunLog(run_dir, begin.written, begin.evaluated, begin.generation)
        self.acts: list[Callable[[], None]] = []
        self.gone = False

    def restart(self) -> None:
        self.run_log.close()
        self.run_log, self.pid = RunLog.take_over(self.run_dir, self.begin), self.pid + 1

    def ask(self, controller: Any, method: str, *arguments: Any) -> Any:
        if self.gone:
            raise ray.exceptions.ActorDiedError
        if method == "outcome":
            return "done", ""
        pid, known = arguments
        answer = self.pid, *self.run_log.since(known if pid == self.pid else 0), not self.acts
        if self.acts:
            self.acts.pop(0)()  # after the answer was given
        return answer


@pytest.fixture
def controllers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controllers]:
    found = Controllers(tmp_path, Begin())
    monkeypatch.setattr(door, "ask", lambda *arguments: found.ask(*arguments))
    monkeypatch.setattr(ray, "kill", lambda controller: None)
    yield found
    found.run_log.close()


def test_each_line_once_whatever_restarts(controllers: Controllers) -> None:
    """Evaluations have no time, a late step an old one: on disk they are all there, and so they are here."""
    heard, run_log = Heard(), controllers.run_log

    def first() -> None:
        run_log.event("generation_started", generation=1)
        for number in (1, 2):
            run_log.metric(1, step(number))
        run_log.metric(1, evaluation(2))
        run_log.event("hang", worker="a")

    def unseen() -> None:
        """On disk, and the controller falls before anybody has asked."""
        run_log.metric(1, step(3, time=0.5))  # a node whose clock is behind
        run_log.metric(1, evaluation(3))
        controllers.restart()

    def later() -> None:
        controllers.run_log.metric(1, step(4, time=0.25))
        controllers.run_log.event("hang", worker="b")
        controllers.restart()

    controllers.acts = [first, unseen, later]
    door.follow(None, heard.callbacks())
    assert heard.told == ["generation_started", 1, 2, ("eval", 2), "hang", 3, ("eval", 3), 4, "hang"]


def test_steps_that_are_done_again_are_told_again(controllers: Controllers) -> None:
    heard = Heard()

    def first() -> None:
        for number in (1, 2, 3, 4):
            controllers.run_log.metric(1, step(number))
        controllers.run_log.metric(1, evaluation(4))

    def back() -> None:
        run_log = controllers.run_log
        run_log.event("rewound", **{"from": 4, "to": 2})
        run_log.cut_back(2)
        run_log.written = run_log.evaluated = 2
        run_log.event("generation_started", generation=2)
        for number in (3, 4):
            run_log.metric(2, step(number, generation=2))
        run_log.metric(2, evaluation(4))
        controllers.restart()

    controllers.acts = [first, back]
    door.follow(None, heard.callbacks())
    assert heard.told == [1, 2, 3, 4, ("eval", 4), "rewound", "generation_started", 3, 4, ("eval", 4)]


def test_a_resumed_run_does_not_tell_what_came_before_it(controllers: Controllers) -> None:
    heard, run_log = Heard(), controllers.run_log
    run_log.event("run_started")
    for number in (1, 2):
        run_log.metric(1, step(number))
    run_log.metric(1, evaluation(2))
    controllers.begin = Begin(written=2, evaluated=2, generation=1, events=1)

    def further() -> None:
        controllers.run_log.event("run_started", run="again")
        controllers.run_log.event("generation_started", generation=2)
        controllers.run_log.metric(2, step(3, generation=2))
        controllers.restart()

    controllers.restart()
    controllers.acts = [further]
    door.follow(None, heard.callbacks())
    assert heard.told == ["run_started", "generation_started", 3]


def ended(run_dir: Path, status: str = "done", error: str = "") -> None:
    (run_dir / "summary.json").write_text(json.dumps({"status": status, "steps": 3,
                                                      **({"error": error} if error else {})}))


def test_who_follows_beside_another_driver_learns_how_it_ended(controllers: Controllers, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The first driver kills the controller and clears up; the second has heard of one step."""
    heard, reports = Heard(), list[Path]()
    monkeypatch.setattr(place, "write_report", reports.append)

    def first() -> None:
        controllers.run_log.event("generation_started", generation=1)
        controllers.run_log.metric(1, step(1))

    def end() -> None:
        for number in (2, 3):
            controllers.run_log.metric(1, step(number))
        controllers.run_log.metric(1, evaluation(3))
        controllers.run_log.event("run_finished")
        ended(tmp_path)
        controllers.gone = True

    controllers.acts = [first, lambda: None, end]
    result = see_out(None, "run-1", tmp_path, heard.callbacks())
    assert (result.status, result.summary["steps"], result.error) == ("done", 3, "")
    assert sorted(map(str, heard.told)) == ["('eval', 3)", "1", "2", "3", "generation_started",
                                            "run_finished"] and not reports


def test_a_controller_that_is_gone_with_the_run_unended_is_a_failure(controllers: Controllers, tmp_path: Path) -> None:
    controllers.gone = True
    with pytest.raises(RunFailed, match="controller is gone .*; `elastic resume"):
        see_out(None, "run-1", tmp_path, Callbacks())


def test_the_one_who_clears_up_writes_the_report_and_touches_no_other_run(controllers: Controllers, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    reports = list[Path]()
    monkeypatch.setattr(place, "write_report", reports.append)
    ended(tmp_path)
    for run, left in (("run-2", True), ("run-1", False), ("run-1", False)):
        if run == "run-2" or not reports:
            (tmp_path / LIVE).write_text(json.dumps({"address": "here:1", "run_id": "run-1"}))
        see_out(None, run, tmp_path, Callbacks())
        assert (tmp_path / LIVE).exists() == left
    assert reports == [tmp_path]


def test_a_run_that_has_ended_is_not_live_though_its_controller_lingers(tmp_path: Path) -> None:
    (tmp_path / LIVE).write_text(json.dumps({"address": "here:1", "run_id": "run-1"}))
    assert live_of(tmp_path) == {"address": "here:1", "run_id": "run-1"}
    ended(tmp_path, "failed", "no such file")
    assert live_of(tmp_path) is None
    assert (result_of(tmp_path).status, result_of(tmp_path).error) == ("failed", "no such file")
