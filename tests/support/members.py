"""Members of a group, as threads of this process or as processes of their own, which a test can start, kill, stop and abort."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from elastic.collective.local import Hub, Killed
from elastic.collective.solo import SoloGroup
from elastic.errors import GroupBroken

WAIT_S = 30.0  # for what must happen, on a busy machine; a failure is a hang
KILLED = "killed"


def form(transport: str, rank: int, size: int, address: str, prefix: str, aborted: threading.Event,
         timeout_s: float) -> Any:
    if transport == "gloo":
        from elastic.collective.gloo import GlooGroup
        return GlooGroup.form(rank, size, address, prefix, aborted, timeout_s, "127.0.0.1")
    from elastic.collective.shared import SharedGroup
    return SharedGroup.form(rank, size, address, prefix, aborted, timeout_s)


def run_case(case: str, make: Callable[[], Any], keep: dict[str, Any], args: tuple[Any, ...]) -> tuple[str, Any]:
    """What a member's thread does; `keep` lives as long as the member."""
    function = getattr(importlib.import_module("tests.support.group_cases"), case)
    try:
        return "ok", function(make(), keep, *args)
    except GroupBroken as error:
        return "broken", str(error)
    except Killed:
        return KILLED, None
    except Exception:
        text = traceback.format_exc()
        return "failed", text


def serve(pipe: Any, transport: str) -> None:
    """A member process: runs cases in threads, so that it can be told to abort one."""
    keep: dict[str, Any] = {}
    flags: dict[str, threading.Event] = {}
    groups: dict[str, Any] = {}
    lock = threading.Lock()

    def work(name: str, rank: int, size: int, address: str, timeout_s: float, case: str, args: tuple[Any, ...]) -> None:
        def make() -> Any:
            groups[name] = form(transport, rank, size, address, name, flags[name], timeout_s)
            with lock:
                pipe.send((name, "formed", None))
            return groups[name]

        outcome = run_case(case, make, keep, args)
        groups.pop(name, None)
        with lock, contextlib.suppress(BrokenPipeError):
            pipe.send((name, *outcome))

    while True:
        try:
            order, name, *rest = pipe.recv()
        except EOFError:
            os._exit(0)
        if order == "abort":
            group = groups.get(name)
            group.abort() if group else flags[name].set()
            del group
            continue
        flags[name] = threading.Event()
        threading.Thread(target=work, args=(name, *rest), daemon=True).start()


class Place:
    """One member as the test sees it: what it reported, by group name."""

    def __init__(self) -> None:
        self.reports: queue.Queue[tuple[str, str, Any]] = queue.Queue()
        self.early: list[tuple[str, str, Any]] = []

    def result(self, name: str, kinds: tuple[str, ...] = ("ok", "broken", "failed", KILLED),
               timeout_s: float = WAIT_S) -> tuple[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            for report in self.early:
                if report[0] in (name, "") and report[1] in kinds:
                    self.early.remove(report)
                    return report[1], report[2]
            try:
                self.early.append(self.reports.get(timeout=max(0.001, deadline - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"no word of {kinds} about {name!r} within {timeout_s} s") from None


class Threads:
    """Members as threads of this process."""

    transport = "local"

    def __init__(self) -> None:
        self.hub, self.places, self.numbers = Hub(), {}, {}
        self.groups: dict[tuple[str, int], Any] = {}
        self.flags: dict[tuple[str, int], threading.Event] = {}
        self.keeps: dict[int, dict[str, Any]] = {}

    def start(self, name: str, member: int, rank: int, size: int, case: str, args: tuple[Any, ...] = (),
              timeout_s: float = WAIT_S,
              address: str = "") -> None:
        place = self.places.setdefault(member, Place())
        number = self.numbers.setdefault(name, len(self.numbers))
        flag = self.flags[name, member] = threading.Event()

        def make() -> Any:
            group = self.groups[name, member] = self.hub.form(number, rank, size, flag) if size > 1 else SoloGroup(flag)
            self.groups[name, member, "rank"] = rank
            place.reports.put((name, "formed", None))
            return group

        threading.Thread(target=lambda: place.reports.put((name,
                                                           *run_case(case, make, self.keeps.setdefault(member, {}),
                                                                     args))),
                         daemon=True).start()

    def _newest(self, member: int) -> tuple[int, int]:
        name = [key[0] for key in self.groups if key[1] == member][-1]
        return self.groups[name, member, "rank"], self.numbers[name]

    def kill(self, member: int) -> None:
        self.hub.kill(*self._newest(member))

    def stop(self, member: int) -> None:
        self.hub.stop(*self._newest(member))

    def cont(self, member: int, name: str) -> None:
        self.hub.cont(self.groups[name, member, "rank"], self.numbers[name])

    def abort(self, name: str, member: int) -> None:
        self.groups[name, member].abort()

    def close(self) -> None:
        for key, group in self.groups.items():
            if len(key) == 2:
                group.abort()


class Processes:
    """Members as spawned processes, made on demand and kept from test to test; a killed one is made anew."""

    def __init__(self, transport: str) -> None:
        from elastic.collective.kv_store import Endpoint
        self.transport, self.endpoint = transport, Endpoint("127.0.0.1")
        self.places: dict[int, Place] = {}
        self.processes: dict[int, Any] = {}
        self.pipes: dict[int, Any] = {}
        # each alone reaps its process: of two that do, one may find nothing and call it alive
        self.listeners: dict[int, threading.Thread] = {}

    def _ensure(self, member: int) -> None:
        if member in self.processes and self.listeners[member].is_alive():
            return
        context = multiprocessing.get_context("spawn")
        self.pipes[member], theirs = context.Pipe()
        self.processes[member] = context.Process(target=serve, args=(theirs, self.transport), daemon=True)
        self.processes[member].start()
        theirs.close()
        self.places[member] = Place()
        self.listeners[member] = threading.Thread(target=self._listen, daemon=True,
                                                  args=(self.pipes[member], self.places[member],
                                                        self.processes[member]))
        self.listeners[member].start()

    @staticmethod
    def _listen(pipe: Any, place: Place, process: Any) -> None:
        while True:
            try:
                place.reports.put(pipe.recv())
            except (EOFError, OSError):
                process.join(WAIT_S)  # its pipe closes a moment before it is dead
                place.reports.put(("", KILLED, None))
                return

    def start(self, name: str, member: int, rank: int, size: int, case: str, args: tuple[Any, ...] = (),
              timeout_s: float = WAIT_S,
              address: str = "") -> None:
        self._ensure(member)
        self.pipes[member].send(("run", name, rank, size, address or self.endpoint.address, timeout_s, case, args))

    def _signal(self, member: int, number: int) -> None:
        os.kill(self.processes[member].pid, number)

    def kill(self, member: int) -> None:
        self._signal(member, signal.SIGKILL)
        self.listeners[member].join(WAIT_S)

    def stop(self, member: int) -> None:
        self._signal(member, signal.SIGSTOP)

    def cont(self, member: int, name: str) -> None:
        self._signal(member, signal.SIGCONT)

    def abort(self, name: str, member: int) -> None:
        self.pipes[member].send(("abort", name))

    def close(self) -> None:
        for member, listener in self.listeners.items():
            if listener.is_alive():
                self._signal(member, signal.SIGKILL)
        for listener in self.listeners.values():
            listener.join(WAIT_S)
