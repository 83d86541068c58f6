"""The controller is killed at every point of its work: another one takes over the live workers, and the run ends with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from elastic.controller import session
from elastic.controller.controller import Controller
from elastic.controller.journal import Journal, Past, decode, encode, replay
from elastic.controller.policy import Bounds
from elastic.messages import Ballot, Generation, Holder, Standing
from elastic.observe.jsonl import read_lines
from tests.support.inprocess import Result, Run, gpt_recipe
from tests.support.run_logs import CheckedRunLog
from tests.support.sampling import sample

STEPS = 12
PHASES = ("waiting", "running", "stopping", "regrouping", "finished")
HISTORY = ("kill:1@3/reduction", "scale:1@6", "scale:3@8")  # waiting, running, regrouping, stopping, and all again


class Crash(BaseException):
    """The controller's process is gone."""


class Clock:
    """Counts the points at which a controller may fall: before and after every record and the lines that must be there
    once, and before every action; with every other, before and after a journal is compacted too."""

    def __init__(self, fatal: int = 0):
        self.points, self.fatal, self.compacts = 0, fatal, fatal % 2 == 1

    def point(self) -> None:
        self.points += 1
        if self.points == self.fatal:
            raise Crash


class FragileJournal(Journal):
    def __init__(self, path: Path, run_id: str, clock: Clock):
        super().__init__(path, run_id)
        self.clock, self.compacted = clock, 0

    def append(self, record: Any) -> None:
        clock = getattr(self, "clock", Clock())  # it has none before its header is written
        clock.point()
        super().append(record)
        clock.point()

    def compact(self, past: Past) -> None:
        """At every chance, if at all."""
        if self.clock.compacts and self.lines.size != self.compacted:
            self.clock.point()
            self.compact_at = 0
            super().compact(past)
            self.compacted = self.lines.size
            self.clock.point()


class FragileRunLog(CheckedRunLog):
    clock: Clock

    def event(self, name: str, *where: Any, **fields: Any) -> None:
        points = [self.clock.point] if name in ("run_started", "run_finished", "chaos") else []
        for point in points:
            point()
        super().event(name, *where, **fields)
        for point in points:
            point()


class FragileController(Controller):
    clock: Clock

    def perform(self, actions: Sequence[Any]) -> None:
        for action in actions:
            self.clock.point()
            super().perform([action])


class FragileRun(Run):
    """A run whose controller falls at one point and is followed by another."""

    def __init__(self, run_dir: Path, fatal: int = 0, **options: Any):
        self.clock, self.crashes = Clock(fatal), 0
        super().__init__(run_dir, **options)

    def build(self, run_log: Any) -> Controller:
        if not isinstance(run_log, FragileRunLog):
            run_log.close()
            run_log = FragileRunLog(self.run_dir)
        self.run_log, run_log.clock = run_log, self.clock
        journal = FragileJournal(self.run_dir / "journal.jsonl", self.job.run_id, self.clock)
        controller = FragileController(self.job, self.settings, self.fleet, run_log, None, journal)
        controller.clock = self.clock
        self.fleet.controller = controller
        return controller

    def opened(self) -> None:
        """Not yet: it may fall there, too."""

    def work(self, found: list[Any]) -> None:
        while not found:
            try:
                self.controller.opened()
                found.append(session.run(self.controller))
            except Crash:
                self.crashes += 1
                self.controller.journal.lines.close()
                self.run_log.close()  # as the end of its process would
                self.controller = self.build(FragileRunLog.take_over(self.run_dir))
            except BaseException as error:
                found.append(error)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("".join(f"{n} times {n} is {n * n}; " for n in range(400)))
    return file


def recipe(text: Path) -> Any:
    return gpt_recipe(text, STEPS, run={"eval_every": 6}, elastic={"max_workers": 3}, checkpoint={"every_steps": 5},
                      data={"ledger": True})


def fall(tmp_path: Path, text: Path, fatal: int) -> tuple[Result, FragileRun]:
    run = FragileRun(tmp_path / f"run-{fatal}", fatal, recipe=recipe(text), chaos=HISTORY, capacity=4)
    return run.fit(), run


def test_killed_at_every_point(text: Path, tmp_path: Path) -> None:
    undisturbed, first = fall(tmp_path, text, 0)
    undisturbed.assert_sound(STEPS)
    assert not first.crashes and first.clock.points > 60
    crashes, phases = 0, set()
    points = sample(range(1, first.clock.points + 1), 10)
    for fatal in points:
        result, run = fall(tmp_path, text, fatal)
        result.assert_sound(STEPS)
        assert result.sha == undisturbed.sha, f"other bits after a fall at point {fatal}"
        lost = {e["worker"] for e in result.named("worker_lost")}
        assert len(lost) == 1, f"at point {fatal} a survivor did not survive: {lost}"
        assert not result.named("rewound")
        assert len(result.named("controller_restarted")) == run.crashes
        assert len(result.named("run_started")) == len(result.named("run_finished")) == 1, f"after a fall at point {fatal}"
        assert 1 in result.summary["world_sizes"], f"the scaling was lost by a fall at point {fatal}"
        phases |= {e["phase"] for e in result.named("controller_restarted")}
        crashes += run.crashes
    assert crashes > 0.8 * len(points)
    assert phases <= set(PHASES) and (phases == set(PHASES) or len(points) < first.clock.points)


def test_a_controller_that_always_falls_is_always_followed(text: Path, tmp_path: Path) -> None:
    """Each controller falls a little later than the one before: the run ends, by what each of them added to the
    journal."""

    class Stubborn(FragileRun):
        def build(self, run_log: Any) -> Controller:
            self.clock = Clock(fatal=4 + self.crashes)
            return super().build(run_log)

    undisturbed, _ = fall(tmp_path, text, 0)
    run = Stubborn(tmp_path / "run", recipe=recipe(text), chaos=HISTORY, capacity=4)
    result = run.fit()
    result.assert_sound(STEPS)
    assert result.sha == undisturbed.sha and run.crashes > 5


def test_a_journal_says_what_was_said(tmp_path: Path) -> None:
    ballot = Ballot(3, 0.1, float(2**-40), 1)
    messages = [Standing("a", 2, "broken", 2, 3, ballot, error='x "y"\n', mesh=(1, 1, 2, 1), coordinate=1),
                Generation(4, ("a", "b"), "h:1", "gloo", 3, ballot, ((0, (1,)),), mesh=(2, 1, 1, 1)),
                Generation(5, ("a", "b"), "h:1", "gloo", 3, mesh=(2, 1, 1, 1),
                           resharded=(Holder(0, (0, 1, 2, 1), 0), Holder(1, (0, 1, 2, 1), 1)))]
    assert [decode(encode(message)) for message in messages] == messages
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "run-1")
    journal.event(messages[0])
    journal.published(messages[1])
    journal.lines.close()
    with open(path, "a") as file:
        file.write('{"event": {"@": "Sta')  # torn by a crash
    again = Journal(path, "run-1")
    assert len(again.past) == 2 and replay(again.past, Bounds(1, 2, 4), 0).published == messages[1]
    again.lines.close()
    other = Journal(path, "run-2")
    assert other.past == [] and len(read_lines(path)) == 1, "another run's journal is replaced"
    assert again.secret == journal.secret != other.secret and len(other.secret) == 64
    assert path.stat().st_mode & 0o777 == 0o600, "it holds the run's secret"
