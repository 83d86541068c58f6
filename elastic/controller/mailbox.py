"""What waits for the controller, from any thread; and how a sender learns that its report was handled."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

LOOK_S = 0.1  # how often a waiting sender looks whether the controller is gone


class Mailbox:
    """A queue of events and of (worker, message). `gone` is set when nothing is handled any more, `over` if that is as
    it should be."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.gone, self.over = threading.Event(), False
        self.received: dict[str, int] = {}  # how many messages of a worker have come in

    def put(self, item: Any) -> None:
        self.items.put(item)

    def get(self, timeout_s: float) -> Any:
        """The next one, or None if there is none. Senders who wait for those before it are woken."""
        try:
            while isinstance(item := self.items.get(timeout=timeout_s), threading.Event):
                item.set()
        except queue.Empty:
            return None
        return item

    def empty(self) -> bool:
        return self.items.empty()

    def fresh(self, worker: str, messages: Sequence[Any], number: int) -> Sequence[Any]:
        """Those that have not come in before, of a batch that may be a repetition. See `Outbox` for `number`; the last
        one is a heartbeat."""
        known = self.received.get(worker, number)
        self.received[worker] = max(known, number + len(messages) - 1)
        return messages[min(max(0, known - number), len(messages) - 1):]

    def wait(self) -> None:
        """Returns when all that is here now was handled. ConnectionError where the controller ends before that."""
        handled = threading.Event()
        self.put(handled)
        while not handled.wait(LOOK_S):
            if self.gone.is_set():
                if self.over:
                    return
                raise ConnectionError("this controller is gone.")
