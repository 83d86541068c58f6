"""A worker as a Ray actor: one process that owns one device, and its surroundings."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from elastic.chaos import Fault, strike_process
from elastic.errors import UserError
from elastic.messages import NAMESPACE, Generation, Job, Line, Order
from elastic.worker.loop_control import Control

LOOPBACK = "127.0.0.1"
RETRY_S = 0.2  # between tries to reach a controller that is away
DELIVER_S = 5.0  # for the controller to take a batch of messages
WATCH_S = 10.0  # how long one call waits for a worker's end
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP_BYTES, MAPPED_BYTES = 256 << 20, 32 << 20  # the second: the most that glibc takes
FLUSH_S = 10.0  # how long a released worker waits for its last lines to be acknowledged


def prepare_process(threads: int, sys_path: Sequence[str]) -> None:
    """Before any framework is imported: bits depend on the thread count and on MKL's strict mode, both read at load
    time."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["MKL_CBWR"] = "AUTO,STRICT"
    reuse_freed_memory()
    sys.path[:0] = [p for p in sys_path if p not in sys.path]


def write_to(log: Path) -> None:
    """All that this process says, at the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdout, sys.stderr = (io.TextIOWrapper(Forgiving(stream, "w", closefd=False), "utf-8", "backslashreplace",
                                               line_buffering=True)
                              for stream in (1, 2))


def reuse_freed_memory() -> None:
    """glibc would give what a shard has freed back to the system, and get it again for the next one page by page: up to
    a tenth of a step of a few million parameters, by the luck of where blocks lie. Up to KEEP_BYTES of each
    of its arenas stay with the process."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_MMAP_THRESHOLD, MAPPED_BYTES)
        set_option(M_TRIM_THRESHOLD, KEEP_BYTES)


class Forgiving(io.FileIO):
    """A log. What a full disk does not take is lost, and nobody fails for that."""

    def write(self, content: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(content)
        return len(content)


class ProcessRim:
    """A Ray worker process's surroundings. `orphaned()` is called when no controller has answered for
    `orphan_timeout_s`."""

    def __init__(self, name: str, job: Job, control: Control, timeout_s: float, orphan_timeout_s: float,
                 orphaned: Callable[[], None]):
        from elastic.collective.kv_store import Endpoint
        from elastic.collective.segment import usable
        from elastic.worker.outbox import Outbox

        self.shares = usable()
        if not (job.is_local and self.shares):
            import elastic.collective.gloo  # noqa: F401 - torch, whose import takes a second: not when a node has joined
        self.name, self.run_id, self.secret, self.timeout_s = name, job.run_id, job.secret, timeout_s
        self.controller = controller = ray.get_actor(f"{job.run_id}/controller", NAMESPACE)
        self.node = ray.get_runtime_context().get_node_id()
        self.pid = os.getpid()
        self.host = LOOPBACK if job.is_local else ray.util.get_node_ip_address()
        self.store = Endpoint(self.host, job.secret)
        self.endpoint = self.store.place
        self.outbox = Outbox(name, control, lambda messages,
                             number: ray.get(controller.receive.remote(name, messages, number), timeout=DELIVER_S),
                             orphan_timeout_s, orphaned, leave)
        self.outbox.start()
        self.post = self.outbox.post

    def form(self, generation: Generation, rank: int, control: Control) -> Any:
        from elastic.collective.connect import form

        self.store.drop_before(self.run_id, generation.number)
        return form(generation.transport, rank, len(generation.members), f"{self.secret}@{generation.endpoint}",
                    f"{self.run_id}/{generation.number}", control.aborted, self.timeout_s, self.host)

    def announce(self, spec: str) -> None:
        """Again and again while the controller is away: one that comes back knows what was announced before."""
        while True:
            try:
                return ray.get(self.controller.announce.remote(self.name, spec))
            except ray.exceptions.RayError as error:
                print(f"The controller could not be told of {spec}: {type(error).__name__}", flush=True)
                time.sleep(RETRY_S)

    strike = staticmethod(strike_process)

    def cut_short(self, fault: Fault, group: Any) -> Any:
        """Where the group can, exactly one peer receives; else as many as it comes to. Alone there is none."""
        if group.size == 1:
            strike_process(fault)
        else:
            group.cut_short({(group.rank + 1) % group.size}, partial(strike_process, fault))
        return group


class WorkerActor:
    """The actor. `serve` runs for the worker's life; the other calls come beside it, on other threads."""

    def __init__(self, name: str, job: Job, threads: int, hang_timeout_s: float, orphan_timeout_s: float):
        prepare_process(threads, job.sys_path)
        from elastic.worker.home import Log, checkpoints_of  # NumPy, which this loads, reads the environment too

        self.log = Log.of(job, name)
        write_to(self.log.path)
        self.log.start()
        self.name, self.job = name, replace(job, checkpoints=checkpoints_of(job))
        self.control = Control()
        self.worker: Any = None
        self.idle, self.over = threading.Lock(), threading.Event()
        self.error: Exception | None = None
        self.hang_timeout_s, self.orphan_timeout_s = hang_timeout_s, orphan_timeout_s

    def serve(self) -> None:
        """Works until released, whoever asked for it may be gone by then. `watch` reports how it ended."""
        from elastic.model.user_code import describe

        if not self.idle.acquire(blocking=False):
            return  # asked for a second time, by a controller that came back
        try:
            from elastic.worker.worker import Worker

            rim = ProcessRim(self.name, self.job, self.control, self.hang_timeout_s, self.orphan_timeout_s, self.orphan)
            if self.log.target:
                rim.post(Line(0, "events", {"event": "noted", "why": self.log.note(rim.node)}))
            self.worker = Worker.open(self.name, self.job, rim, self.control)
            self.worker.serve()
            rim.outbox.flush(FLUSH_S)
        except UserError as error:
            self.error = error
        except Exception as error:
            traceback.print_exc()
            self.error = RuntimeError(describe(error))  # a framework's own may not pickle
        finally:
            self.log.close()
            self.over.set()

    def watch(self) -> bool:
        """Waits a while for the end of `serve`: True, or its error, once it has ended. A caller that is gone leaves no
        thread behind."""
        over = self.over.wait(WATCH_S)
        if self.error is not None:
            raise self.error
        return over

    def orphan(self) -> None:
        """Nobody has answered for too long: this worker writes down what it has, and goes."""
        self.control.orphan()
        self.log.close()
        leave()

    def take(self, order: Order) -> None:
        self.control.take(order)

    def resync(self) -> None:
        if self.worker is not None:
            self.worker.resync()

    def release(self) -> None:
        if self.worker is None:
            os._exit(0)  # still building: nothing is lost
        self.control.orders.put(None)


def leave() -> None:
    """Ends this process and gives its place back: a fenced worker has no business here, an orphan nobody who would do
    it."""
    place = ray.util.get_current_placement_group()
    if place is not None:
        ray.util.remove_placement_group(place)
    os._exit(0)
