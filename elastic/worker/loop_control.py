"""What other threads may ask of a worker, from its first moment on, and what it reports: orders, stop requests, and where it is."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elastic.errors import GroupBroken
from elastic.messages import GO, Abort, Generation, Order, RequestStop, Save

ORPHAN_S = 600.0  # for an orphan to write its state


class Control:
    """Shared between a worker's thread and those that take the controller's orders. `orders`: generations to take part
    in, what is to be saved, and None to release it.
    """

    def __init__(self) -> None:
        self.orders: queue.SimpleQueue[Generation | Save | None] = queue.SimpleQueue()
        self.is_orphan = False  # nobody answers: its release is its own
        self.is_gone = threading.Event()  # an orphan has written its state, as far as it can
        self._lock = threading.Lock()
        self._stops: dict[int, int] = {}
        self._aborted = -1
        self._group: Any = None
        self.aborted = threading.Event()  # of the current generation; a group that is being formed watches it
        self.generation = 0
        self.written = 0  # steps that the controller has on disk
        self.repeat = threading.Event()  # a new controller may lack lines that the one before it had taken
        self.step, self.phase, self.inside, self.waiting, self.detail = 0, "start", 0, False, 0

    def take(self, order: Order) -> None:
        """What is to be done now, from any thread; what is to be done next waits for the worker's own."""
        if isinstance(order, Abort):
            self.abort(order.generation)
        elif isinstance(order, RequestStop):
            self.request_stop(order.generation, order.code)
        else:
            self.orders.put(order)

    def enter(self, generation: int, written: int = 0) -> None:
        """The loop takes up a generation. One that was aborted before it began stays so."""
        with self._lock:
            self.generation, self.inside, self.phase, self._group = generation, 0, "start", None
            self.written = written
            self.aborted = threading.Event()
            if self._aborted >= generation:
                self.aborted.set()

    def attach(self, group: Any) -> None:
        """The group of the current generation: `abort` reaches into its waits."""
        with self._lock:
            self._group = group
            gone = self.aborted.is_set()
        if gone:
            group.abort()

    def abort(self, generation: int) -> None:
        with self._lock:
            self._aborted = max(self._aborted, generation)
            if generation < self.generation:
                return
            if generation == self.generation:
                self.aborted.set()
            group = self._group if generation == self.generation else None
        if group is not None:
            group.abort()

    def orphan(self) -> None:
        """Nobody has answered for too long. Returns when the worker's state is on disk, or cannot be."""
        self.is_orphan = True
        self.orders.put(None)
        self.abort(self.generation)
        self.is_gone.wait(ORPHAN_S)

    def request_stop(self, generation: int, code: int) -> None:
        with self._lock:
            self._stops[generation] = max(code, self._stops.get(generation, GO))

    def stop_request(self) -> int:
        return self._stops.get(self.generation, GO)

    def at(self, step: int, phase: str, detail: int = 0) -> None:
        """Says where the loop is; raises `GroupBroken` if its generation was aborted meanwhile."""
        self.step, self.phase, self.detail = step, phase, detail
        if self.aborted.is_set():
            raise GroupBroken(f"Generation {self.generation} was aborted.")

    def note(self, detail: int) -> None:
        """How far a long phase is, from inside a wait that an aborted generation does not end."""
        self.detail = detail

    @contextmanager
    def collective(self, step: int | None = None, phase: str = "", detail: int = 0) -> Iterator[None]:
        """Marks the time inside a collective, of the step and phase at hand unless given: who has not entered one that
        others wait in is the suspect of a hang.
        """
        self.at(self.step if step is None else step, phase or self.phase, detail)
        self.inside += 1
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
