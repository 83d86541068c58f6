"""A run whose workers are processes forked after the imports: light enough for more of them than a segment has counters for.

    python -m tests.support.forked RUN_DIR RECIPE WORKERS [FAULT ...]

starts so many, of which half are spares until a fault of the kind "scale" asks for them, and ends with the run.
Controller, workers, store and transports are those of a run on Ray. The children are forked before the first thread: a
lock would stay locked in them.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch.distributed  # noqa: F401 - imported once, for all

from elastic.chaos import Fault
from elastic.collective.connect import form, transport_of
from elastic.collective.kv_store import Endpoint
from elastic.collective.segment import usable
from elastic.controller import membership as m
from elastic.messages import Generation, Job, Order, Ready
from elastic.recipe import loads
from elastic.worker.actor import LOOPBACK
from elastic.worker.loop_control import Control
from elastic.worker.outbox import Outbox
from elastic.worker.worker import Worker
from tests.support.inprocess import Run

FORM_S = 120.0


class ForkedRim:
    """A child's surroundings."""

    node, shares = "node", usable()

    def __init__(self, job: Job, words: Any):
        self.job, self.words, self.pid = job, words, os.getpid()
        self.store = Endpoint(LOOPBACK, job.secret)
        self.endpoint = self.store.place
        self.control = Control()
        self.outbox: Any = None
        self.asking = threading.Lock()

    def ask(self, method: str, *arguments: Any) -> Any:
        with self.asking:
            self.words.send((method, *arguments))
            return self.words.recv()

    def form(self, generation: Generation, rank: int, control: Any) -> Any:
        self.store.drop_before(self.job.run_id, generation.number)
        return form(generation.transport, rank, len(generation.members), f"{self.job.secret}@{generation.endpoint}",
                    f"{self.job.run_id}/{generation.number}", control.aborted, FORM_S, LOOPBACK)

    def post(self, message: Any) -> None:
        self.outbox.post(message)

    def announce(self, spec: str) -> None:
        self.ask("announce", spec)

    def strike(self, fault: Fault) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def cut_short(self, fault: Fault, group: Any) -> Any:
        self.strike(fault)


def be_worker(orders: Any, words: Any) -> None:
    """A child's life: it waits until somebody wants it."""
    name, job = orders.recv()
    rim = ForkedRim(job, words)
    rim.outbox = Outbox(name, rim.control, lambda messages, number: rim.ask("receive", messages, number), FORM_S,
                        lambda: os._exit(1),
                        lambda: os._exit(1))

    def listen() -> None:
        while True:
            if (order := orders.recv()) is None:
                rim.control.orders.put(None)
            else:
                rim.control.take(order)

    threading.Thread(target=listen, daemon=True).start()
    rim.outbox.start()
    Worker.open(name, job, rim, rim.control).serve()
    rim.outbox.flush(10.0)


class ForkedFleet:
    """`elastic.controller.controller.Fleet` on children that are there already."""

    def __init__(self, number: int):
        self.idle: queue.SimpleQueue[tuple[int, Any, Any]] = queue.SimpleQueue()
        self.living: dict[str, tuple[int, Any]] = {}
        self.names, self.released = iter(f"worker-{n}" for n in range(10 * number)), set[str]()
        self.job: Any = None
        self.controller: Any = None
        self.lock = threading.RLock()
        for _ in range(number):
            (orders, theirs), (words, ours) = Pipe(), Pipe()
            pid = os.fork()
            if not pid:
                try:
                    be_worker(theirs, ours)
                finally:
                    os._exit(0)
            theirs.close()
            ours.close()
            self.idle.put((pid, orders, words))

    def want(self, workers: int, avoid: Sequence[str] = (), near: Sequence[str] = ()) -> None:
        with self.lock:
            while len(self.living) < workers and not self.idle.empty():
                pid, orders, words = self.idle.get()
                name = next(self.names)
                self.living[name] = pid, orders
                self.controller.post(m.Starting(name))
                orders.send((name, self.job))
                threading.Thread(target=self.hear, args=(name, pid, words), daemon=True).start()

    def hear(self, name: str, pid: int, words: Any) -> None:
        while True:
            try:
                method, *arguments = words.recv()
                words.send(getattr(self.controller, method)(name, *arguments))
            except (EOFError, OSError):
                break
        os.waitpid(pid, 0)
        with self.lock:
            self.living.pop(name, None)
        if name not in self.released:
            self.controller.post(m.Lost(name, "its process ended"))

    def tell(self, worker: str, order: Order | None) -> None:
        found = self.living.get(worker)
        if found is not None:
            try:
                found[1].send(order)
            except OSError:
                return  # it is gone, and its end is on its way

    def send(self, worker: str, order: Order) -> None:
        self.tell(worker, order)

    def release(self, worker: str) -> None:
        self.released.add(worker)
        self.tell(worker, None)

    def kill(self, worker: str) -> None:
        self.released.add(worker)
        os.kill(self.living[worker][0], signal.SIGKILL)

    def transport(self, ready: Sequence[Ready]) -> str:
        return transport_of(ready)

    def inject(self, fault: Fault, stopped: Ready | None = None) -> None:
        raise NotImplementedError(fault.spec)

    def adopt(self, known: Iterable[str]) -> list[str]:
        return list(self.living)

    def resync(self, worker: str) -> None:
        raise NotImplementedError(worker)

    def close(self) -> None:
        for worker in list(self.living):
            self.release(worker)
        until = time.monotonic() + 30.0
        while self.living and time.monotonic() < until:
            time.sleep(0.05)
        for pid, _ in list(self.living.values()):
            os.kill(pid, signal.SIGKILL)
        while not self.idle.empty():
            os.kill(self.idle.get()[0], signal.SIGKILL)


class ForkedRun(Run):
    """`Run` with the fleet exchanged; `fleet` was made before there was any thread."""

    def __init__(self, fleet: ForkedFleet, *arguments: Any, **options: Any):
        self.forked = fleet
        super().__init__(*arguments, **options)

    def build(self, run_log: Any) -> Any:
        self.fleet = self.forked  # type: ignore[assignment]
        controller = super().build(run_log)
        self.fleet.job = replace(self.job, secret=controller.journal.secret)
        return controller


def main(run_dir: str, recipe: str, workers: str, *faults: str) -> None:
    number = int(workers)
    run = ForkedRun(ForkedFleet(number), Path(run_dir), loads(Path(recipe).read_text(), locate=False), faults)
    run.scale(number // 2)
    outcome = run.fit().outcome
    print(outcome.status, outcome.error)


if __name__ == "__main__":
    main(*sys.argv[1:])
