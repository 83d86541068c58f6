"""A worker's way to the controller: messages in order, kept until acknowledged, with a heartbeat while there is nothing to say."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from elastic.messages import Line, Progress
from elastic.worker.loop_control import Control

# how often a worker reports where it is; hang_timeout_s is counted in seconds, so this is fine enough
HEARTBEAT_S = 0.5
RETRY_S = 0.2  # between tries while the controller cannot be reached


class Outbox(threading.Thread):
    """Sends batches through `deliver(messages, number) -> steps on disk, or -1 if this worker is fenced off`.

    `number` counts the messages acknowledged so far, by which a repeated one is known; a heartbeat, not counted, comes
    last.

    Lines wait for the next heartbeat; anything else goes at once. `orphaned()` is called when nothing could be
    delivered for
    `orphan_timeout_s`, `fenced()` when the controller has given this worker up.
    """

    def __init__(self, worker: str, control: Control, deliver: Callable[[Sequence[Any], int], int],
                 orphan_timeout_s: float,
                 orphaned: Callable[[], None], fenced: Callable[[], None], heartbeat_s: float = HEARTBEAT_S):
        super().__init__(name="outbox", daemon=True)
        self.worker, self.control, self.deliver = worker, control, deliver
        self.orphan_timeout_s, self.orphaned, self.fenced = orphan_timeout_s, orphaned, fenced
        self.pending: deque[Any] = deque()
        self.wake = threading.Event()
        self.drained = threading.Condition()
        self.closing, self.heartbeat_s = False, heartbeat_s
        self.halted = threading.Event()  # a thread that plays a stopped process says nothing

    def post(self, message: Any) -> None:
        self.pending.append(message)
        if not isinstance(message, Line):
            self.wake.set()

    def flush(self, timeout_s: float) -> None:
        """Waits until everything posted so far is acknowledged."""
        self.wake.set()
        with self.drained:
            self.drained.wait_for(lambda: not self.pending, timeout_s)

    def close(self) -> None:
        """Ends the thread after at most one more delivery."""
        self.closing = True
        self.wake.set()

    def run(self) -> None:
        answered, number = time.monotonic(), 0
        while not self.closing:
            self.wake.wait(self.heartbeat_s)
            self.wake.clear()
            if self.halted.is_set():
                continue
            batch = list(self.pending)
            c = self.control
            heartbeat = Progress(self.worker, c.generation, c.step, c.phase, c.inside, c.waiting, c.detail)
            try:
                written = self.deliver([*batch, heartbeat], number)
            except Exception as error:
                if time.monotonic() - answered > self.orphan_timeout_s:
                    print(f"The controller has not answered for {self.orphan_timeout_s} s ({error}); this worker "
                          "leaves.", flush=True)
                    self.orphaned()
                    return
                time.sleep(RETRY_S)
                self.wake.set()
                continue
            answered = time.monotonic()
            if written < 0:
                self.fenced()
                return
            number += len(batch)
            self.control.written = written  # falls when the run goes back to a checkpoint
            with self.drained:
                for _ in batch:
                    self.pending.popleft()
                self.drained.notify_all()
