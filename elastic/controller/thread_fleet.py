"""A fleet of threads in one process: the whole platform, with faults, without Ray. For tests and for debugging a model.

Everything but the processes is real: the controller, its state machine, the workers, the loop, the checkpoints. A kill
ends a thread at its next chance; a stop halts it at its next collective until it is continued.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from elastic.chaos import Fault
from elastic.collective.group import CollectiveGroup
from elastic.collective.local import Hub, Killed, die
from elastic.controller import membership as m
from elastic.errors import UserError
from elastic.messages import Generation, Job, Order, Ready
from elastic.worker.loop_control import Control
from elastic.worker.outbox import Outbox
from elastic.worker.worker import Worker

HEARTBEAT_S = 0.02
ORPHAN_TIMEOUT_S = 60.0
FLUSH_S = 1.0  # for the last report of a worker that was let go


class ThreadRim:
    """One thread's surroundings."""

    def __init__(self, fleet: ThreadFleet, name: str, node: str):
        self.fleet, self.name, self.node, self.pid, self.endpoint, self.shares = fleet, name, node, 0, "local", False
        self.rank, self.generation = -1, 0
        self.control, self.dead = Control(), threading.Event()
        self.outbox = Outbox(name, self.control, self.deliver, ORPHAN_TIMEOUT_S, self.control.orphan,
                             lambda: fleet.fenced.append(name), HEARTBEAT_S)
        self.worker: Worker | None = None  # once it is built

    def form(self, generation: Generation, rank: int, control: Control) -> CollectiveGroup:
        self.rank, self.generation = rank, generation.number
        self.outlive()
        return self.fleet.hub.form(generation.number, rank, len(generation.members), control.aborted)

    def outlive(self) -> None:
        if self.dead.is_set():
            raise Killed

    def post(self, message: Any) -> None:
        if threading.current_thread().name == self.name:
            self.outlive()
        self.outbox.post(message)

    def deliver(self, messages: Sequence[Any], number: int) -> int:
        """What a dead process has not sent is lost; the saver's thread may still have something to report."""
        if self.dead.is_set():
            raise ConnectionError("this process is dead.")
        return self.fleet.controller.receive(self.name, messages, number)

    def announce(self, spec: str) -> None:
        while True:
            try:
                return self.fleet.controller.announce(self.name, spec)
            except ConnectionError:
                time.sleep(HEARTBEAT_S)  # the controller is on its way back

    def strike(self, fault: Fault) -> None:
        if fault.kind == "stop":
            self.fleet.hub.stop(self.rank, self.generation)
            self.outbox.halted.set()
            return
        self.dead.set()
        self.fleet.hub.kill(self.rank, self.generation)
        raise Killed

    def cut_short(self, fault: Fault, group: CollectiveGroup) -> CollectiveGroup:
        if fault.kind == "stop":
            self.strike(fault)
            return group
        if group.size == 1:
            self.strike(fault)
        self.dead.set()
        group.cut_short({(group.rank + 1) % group.size}, die)
        return group


class ThreadFleet:
    """`Fleet` on threads. `capacity` is how many workers the "cluster" has room for right now."""

    def __init__(self, job: Job, capacity: int, nodes: int = 1):
        self.job, self.capacity, self.nodes = job, capacity, nodes
        self.hub = Hub()
        self.controller: Any = None  # set by whoever builds both
        self.crash: Callable[[], None] = lambda: None  # ends the controller; whoever builds another one sets it
        self.workers: dict[str, ThreadRim] = {}  # of those that count
        self.rims: dict[str, ThreadRim] = {}  # of all that there ever were
        self.threads: list[threading.Thread] = []
        self.released: set[str] = set()
        self.fenced: list[str] = []  # workers that have learned that they are given up
        self.numbers = itertools.count()
        self.wanted, self.closed = 0, False
        self.lock = threading.RLock()

    def want(self, workers: int, avoid: Sequence[str], near: Sequence[str] = ()) -> None:
        self.wanted = workers
        self.fill()

    def grow(self, capacity: int) -> None:
        """Room appears or goes, as when a node joins or leaves; a loss of room kills nobody."""
        self.capacity = capacity
        self.fill()

    def fill(self) -> None:
        with self.lock:
            new = []
            while not self.closed and len(self.workers) < min(self.wanted, self.capacity):
                number = next(self.numbers)
                name = f"worker-{number}"
                rim = self.workers[name] = self.rims[name] = ThreadRim(self, name, f"node-{number % self.nodes}")
                self.controller.post(m.Starting(name))
                new.append(threading.Thread(target=self.live, args=(name, rim), name=name, daemon=True))
            self.threads += new
            for thread in new:  # once all are announced: the first group waits for those that are known to come
                thread.start()

    def live(self, name: str, rim: ThreadRim) -> None:
        cause, raised = "released", False
        rim.outbox.start()
        try:
            rim.worker = Worker.open(name, self.job, rim, rim.control)
            rim.worker.serve()
        except Killed:
            cause = "killed"
        except UserError as error:  # every other worker would raise the same
            cause = str(error)
            self.controller.post(m.GiveUp(cause))
        except Exception as error:
            cause, raised = f"{type(error).__name__}: {error}", True
        if cause == "released":
            rim.outbox.flush(FLUSH_S)
        rim.dead.set()
        rim.outbox.close()
        if rim.worker is not None:
            rim.worker.training.load_batch.close()  # a process would take its threads with it
        with self.lock:
            self.workers.pop(name, None)
            lost = name not in self.released and not self.closed
        if lost:
            self.controller.post(m.Lost(name, cause, raised))
            self.fill()

    def send(self, worker: str, order: Order) -> None:
        found = self.workers.get(worker)
        if found is not None:
            found.control.take(order)

    def release(self, worker: str) -> None:
        with self.lock:
            self.released.add(worker)
            found = self.workers.pop(worker, None)
        if found is not None:
            found.control.orders.put(None)

    def kill(self, worker: str) -> None:
        """A stopped thread stays stopped until it is continued, like a process that a signal cannot reach yet."""
        rim = self.rims[worker]
        self.release(worker)
        if not rim.outbox.halted.is_set():
            rim.dead.set()
            if rim.rank >= 0:
                self.hub.kill(rim.rank, rim.generation)
        self.fill()

    def transport(self, ready: Sequence[Ready]) -> str:
        return "local"

    def inject(self, fault: Fault, stopped: Ready | None = None) -> None:
        if fault.kind == "controller":
            self.crash()
        elif stopped is not None:
            self.resume(stopped.worker)

    def resume(self, worker: str) -> None:
        """SIGCONT: the thread goes on from where it was stopped, in a group that is long over."""
        rim = self.rims[worker]
        rim.outbox.halted.clear()
        self.hub.cont(rim.rank, rim.generation)

    def adopt(self, known: Iterable[str]) -> list[str]:
        """The threads have not noticed anything: they are this fleet's all along."""
        with self.lock:
            return list(self.workers)

    def resync(self, worker: str) -> None:
        found = self.workers.get(worker)
        if found is not None and found.worker is not None:
            found.worker.resync()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            left = list(self.workers.values())
        for worker in left:
            worker.control.orders.put(None)
        for name, rim in self.rims.items():
            if rim.outbox.halted.is_set():
                self.resume(name)
        for thread in self.threads:
            thread.join()
