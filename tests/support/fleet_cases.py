"""What a `Fleet` promises to the controller, as cases that every implementation goes through, one after another on the same fleet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from elastic.chaos import parse
from elastic.controller import membership as m
from elastic.controller.fleet import Fleet
from elastic.messages import STOP, Abort, Generation, Job, Line, Progress, Ready, RequestStop, Save, Standing
from elastic.recipe import dumps
from tests.support.inprocess import module_recipe

LIMIT_S = 180.0  # for processes that import a framework on a busy machine
T = TypeVar("T")


def job_of(run_dir: Path, secret: str = "") -> Job:
    """A run that nobody sees the end of."""
    recipe = module_recipe("Small", 10**6, checkpoint={"every_steps": 10**6})
    return Job(f"run-{time.time_ns():x}", dumps(recipe), {}, str(run_dir), str(run_dir / "checkpoints"),
               (str(Path.cwd()),), secret=secret)


class Desk:
    """Takes a controller's place: what the fleet posts and what workers report, in order."""

    def __init__(self) -> None:
        self.posted: list[Any] = []
        self.reported: list[Any] = []
        self.announced: list[tuple[str, str]] = []
        self.changed = threading.Condition()
        self.numbers = iter(range(1, 100))

    def post(self, event: Any) -> None:
        with self.changed:
            self.posted.append(event)
            self.changed.notify_all()

    def receive(self, worker: str, messages: Sequence[Any], number: int) -> int:
        with self.changed:
            self.reported += [message for message in messages if not isinstance(message, (Progress, Line))]
            self.changed.notify_all()
        return 0

    def announce(self, worker: str, spec: str) -> None:
        with self.changed:
            self.announced.append((worker, spec))

    def until(self, find: Callable[[], T]) -> T:
        """What `find` gives once that is something."""
        with self.changed:
            assert self.changed.wait_for(find, LIMIT_S), (self.posted, self.reported)
            return find()

    def starting(self) -> list[str]:
        return [event.worker for event in self.posted if isinstance(event, m.Starting)]

    def lost(self) -> list[str]:
        return [event.worker for event in self.posted if isinstance(event, m.Lost)]

    def ready(self, number: int) -> list[Ready]:
        """The reports of that many workers that were ever ready."""
        def find() -> list[Ready]:
            first = {report.worker: report for report in self.reported if isinstance(report, Ready)}
            return list(first.values()) if len(first) >= number else []

        return self.until(find)

    def stands(self, worker: str, generation: int) -> Standing:
        return self.until(lambda: next((report for report in self.reported if isinstance(report, Standing)
                                        and (report.worker, report.generation) == (worker, generation)), None))

    def train(self, fleet: Fleet, ready: Ready, chaos: tuple[str, ...] = ()) -> int:
        """Gives a worker a generation of its own to train in; returns its number."""
        number = next(self.numbers)
        fleet.send(ready.worker, Generation(number, (ready.worker,), ready.endpoint, fleet.transport([ready]), 0,
                                            load="recipe", chaos=chaos))
        return number


def assert_those_who_are_wanted_come_and_say_so(fleet: Fleet, desk: Desk, workers: int) -> list[Ready]:
    fleet.want(workers, ())
    ready = desk.ready(workers)
    assert len(ready) == workers and sorted(desk.starting()) == sorted(report.worker for report in ready)
    fleet.want(workers, ())  # there they are: nobody comes twice
    assert len({report.worker for report in ready}) == workers
    return ready


def assert_orders_arrive(fleet: Fleet, desk: Desk, ready: Ready) -> None:
    stopped = desk.train(fleet, ready)
    fleet.send(ready.worker, RequestStop(ready.worker, stopped, STOP))
    assert desk.stands(ready.worker, stopped).reason == "stopped"
    left = desk.train(fleet, ready)
    fleet.send(ready.worker, Abort(ready.worker, left))
    assert desk.stands(ready.worker, left).reason == "broken"


def assert_what_was_reported_can_be_had_again(fleet: Fleet, desk: Desk, ready: Ready) -> None:
    before = len(desk.reported)
    fleet.resync(ready.worker)
    desk.until(lambda: ready in desk.reported[before:])


def assert_an_end_of_its_own_is_a_loss(fleet: Fleet, desk: Desk, ready: Ready) -> None:
    desk.train(fleet, ready, ("kill:0@1",))
    desk.until(lambda: ready.worker in desk.lost())
    assert desk.announced == [(ready.worker, "kill:0@1")]


def assert_whoever_is_gone_takes_no_order(fleet: Fleet, worker: str) -> None:
    """And nobody falls over it."""
    for order in (Generation(99, (worker,), "", "", 0), Save(99, 1), Abort(worker, 99), RequestStop(worker, 99, STOP)):
        fleet.send(worker, order)
    fleet.resync(worker)
    fleet.release(worker)
    fleet.inject(parse("cont:1@1"), None)


def assert_a_successor_finds_the_living_and_gives_no_name_twice(fleet: Fleet, desk: Desk, known: set[str],
                                                                living: set[str]) -> Ready:
    """`fleet`: that of a controller that came after another."""
    assert set(fleet.adopt(known)) == living
    before = desk.starting()
    fleet.want(len(living) + 1, ())
    ready = desk.ready(len(known) + 1)[-1]
    assert ready.worker not in known and desk.starting() == [*before, ready.worker]
    return ready


def assert_the_contract_of_a_fleet(fleet: Fleet, desk: Desk, successor: Callable[[], Fleet]) -> None:
    """All of it; then every worker has ended, and only the one that fell by itself was a loss."""
    first, second, third = assert_those_who_are_wanted_come_and_say_so(fleet, desk, 3)
    assert_orders_arrive(fleet, desk, first)
    assert_what_was_reported_can_be_had_again(fleet, desk, second)
    fleet.want(2, ())  # else others would come for them
    fleet.release(second.worker)
    fleet.want(1, ())
    assert_an_end_of_its_own_is_a_loss(fleet, desk, third)
    assert_whoever_is_gone_takes_no_order(fleet, third.worker)
    after = successor()
    last = assert_a_successor_finds_the_living_and_gives_no_name_twice(
        after, desk, {first.worker, second.worker, third.worker}, {first.worker})
    assert_orders_arrive(after, desk, last)
    after.want(1, ())
    after.kill(first.worker)
    after.close()
    assert desk.lost() == [third.worker]
