"""A worker's messages: in order, each delivered at least once, none after it was fenced off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from elastic.controller.mailbox import Mailbox
from elastic.messages import Line, Part, Progress
from elastic.worker.loop_control import Control
from elastic.worker.outbox import Outbox

LIMIT_S = 10.0


class Controller:
    """Takes what is delivered; `fails` deliveries get lost first."""

    def __init__(self, fails: int = 0, answer: int = 0):
        self.batches: list[list[Any]] = []
        self.fails, self.answer = fails, answer
        self.changed = threading.Condition()

    def deliver(self, messages: Sequence[Any], number: int) -> int:
        with self.changed:
            if self.fails:
                self.fails -= 1
                raise ConnectionError("nobody answers")
            self.batches.append(list(messages))
            self.changed.notify_all()
            return self.answer

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, LIMIT_S)

    @property
    def messages(self) -> list[Any]:
        return [message for batch in self.batches for message in batch if not isinstance(message, Progress)]

    @property
    def heartbeats(self) -> list[Progress]:
        return [message for batch in self.batches for message in batch if isinstance(message, Progress)]


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Outbox, threading.Event, threading.Event]]]:
    boxes: list[Outbox] = []

    def make(controller: Controller, heartbeat_s: float = 0.01,
             orphan_timeout_s: float = 60.0) -> tuple[Outbox, threading.Event, threading.Event]:
        orphaned, fenced = threading.Event(), threading.Event()
        box = Outbox("w", Control(), controller.deliver, orphan_timeout_s, orphaned.set, fenced.set, heartbeat_s)
        boxes.append(box)
        box.start()
        return box, orphaned, fenced

    yield make
    for box in boxes:
        box.close()
        box.join(LIMIT_S)
        assert not box.is_alive()


def line(step: int) -> Line:
    return Line(1, "metrics", {"step": step})


def part(step: int) -> Part:
    return Part("w", 1, step, "", 0.0, 0.0)


Start = Callable[..., tuple[Outbox, threading.Event, threading.Event]]


def test_messages_arrive_in_order_and_once(start: Start) -> None:
    controller = Controller(answer=7)
    box, _, _ = start(controller)
    sent = [line(n) if n % 3 else part(n) for n in range(200)]
    for message in sent:
        box.post(message)
    box.flush(LIMIT_S)
    assert controller.messages == sent
    assert not box.pending and box.control.written == 7


def test_every_delivery_ends_with_where_the_worker_is(start: Start) -> None:
    controller = Controller()
    box, _, _ = start(controller)
    box.control.enter(3)
    box.control.at(9, "forward", 2)
    controller.wait(lambda: any(p.step == 9 for p in controller.heartbeats))
    assert controller.heartbeats[-1] == Progress("w", 3, 9, "forward", 0, False, 2)
    assert all(isinstance(batch[-1], Progress) for batch in controller.batches)


def test_lines_wait_for_the_heartbeat_and_anything_else_goes_at_once(start: Start) -> None:
    controller = Controller()
    box, _, _ = start(controller, heartbeat_s=1000.0)
    box.post(line(1))
    assert not controller.batches
    box.post(part(2))
    controller.wait(lambda: len(controller.messages) == 2)
    assert controller.messages == [line(1), part(2)]


def test_what_could_not_be_delivered_is_sent_again(start: Start) -> None:
    controller = Controller(fails=2)
    box, orphaned, _ = start(controller)
    box.post(line(1))
    box.post(line(2))
    box.flush(LIMIT_S)
    assert controller.messages == [line(1), line(2)] and not orphaned.is_set()


def test_what_arrived_but_was_not_acknowledged_is_taken_once(start: Start) -> None:
    """The answer got lost: the whole batch comes again, and the rest behind it."""
    mailbox = Mailbox()

    class Forgetful(Controller):
        lost = 1

        def deliver(self, messages: Sequence[Any], number: int) -> int:
            answer = super().deliver(mailbox.fresh("w", messages, number), number)
            if self.lost and self.messages:
                self.lost -= 1
                raise ConnectionError("it fell after it had heard this")
            return answer

    controller = Forgetful()
    box, _, _ = start(controller)
    for n in range(20):
        box.post(part(n))
    box.flush(LIMIT_S)
    assert controller.messages == [part(n) for n in range(20)] and not controller.lost


def test_steps_on_disk_may_fall(start: Start) -> None:
    controller = Controller(answer=20)
    box, _, _ = start(controller)
    box.post(part(1))
    box.flush(LIMIT_S)
    controller.answer = 10  # the run went back to a checkpoint
    box.post(part(2))
    box.flush(LIMIT_S)
    assert box.control.written == 10


def test_an_orphan_leaves(start: Start) -> None:
    box, orphaned, fenced = start(Controller(fails=10**9), orphan_timeout_s=0.3)
    assert orphaned.wait(LIMIT_S) and not fenced.is_set()
    box.join(LIMIT_S)
    assert not box.is_alive()


def test_a_fenced_worker_is_told_and_says_no_more(start: Start) -> None:
    controller = Controller(answer=-1)
    box, orphaned, fenced = start(controller)
    assert fenced.wait(LIMIT_S) and not orphaned.is_set()
    box.join(LIMIT_S)
    box.post(part(1))
    assert not box.is_alive() and len(controller.batches) == 1 and box.control.written == 0


def test_a_halted_one_is_silent_until_it_goes_on(start: Start) -> None:
    controller = Controller()
    box, _, _ = start(controller)
    controller.wait(lambda: bool(controller.batches))
    box.halted.set()
    box.post(part(1))
    box.flush(0.1)
    assert controller.messages == []
    box.halted.clear()
    box.flush(LIMIT_S)
    assert controller.messages == [part(1)]
