"""A file system that fails on purpose, over a real one. For `--chaos disk:...` and for tests.

Calls that reach the storage are counted from 1. The fault (`elastic.chaos.DISK`) comes at call number `at`; with
`only`, at the first call of that name from there on. A crash is for ever: every later call raises too, as in a process
that is gone.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import Any

from elastic.storage.files import Files, Sink

DELAY_S = 0.5


class Crashed(BaseException):
    """The process that made this call is gone: nothing may catch it but whoever plays the machine."""


def crash() -> None:
    raise Crashed


def counted(name: str) -> Any:
    """A call that is counted and passed on."""
    def call(faulty: FaultyFiles, *arguments: str) -> Any:
        faulty.due(name)
        return getattr(faulty.files, name)(*arguments)

    return call


class FaultyFiles:
    """`elastic.storage.files.Files` over another. `at` = 0: no fault. `calls` tells what was asked for, in order."""

    def __init__(self, files: Files, mode: str = "error", at: int = 0, only: str = "", delay_s: float = DELAY_S,
                 crash: Callable[[], None] = crash):
        self.files, self.mode, self.at, self.only, self.delay_s, self.crash = files, mode, at, only, delay_s, crash
        self.renames = files.renames
        self.calls: list[str] = []
        self.fired = threading.Event()
        self.lock = threading.Lock()

    def due(self, name: str) -> bool:
        """Counts a call, and whether the fault comes now. Raises what the fault is; a short write is for the caller."""
        with self.lock:
            if self.fired.is_set() and self.mode == "crash":
                self.crash()
            self.calls.append(name)
            if self.fired.is_set() or not 0 < self.at <= len(self.calls) or self.only not in ("", name):
                return False
            self.fired.set()
        if self.mode == "crash":
            self.crash()
        if self.mode == "delay":
            time.sleep(self.delay_s)
        if self.mode == "error":
            raise OSError(errno.EIO, "Input/output error")
        if self.mode == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.mode == "short"

    make_folder, rename, sync, info, names, remove = map(counted,
                                                         ("make_folder", "rename", "sync", "info", "names", "remove"))

    def create(self, path: str) -> Sink:
        self.due("create")
        return FaultySink(self, self.files.create(path))

    def read(self, path: str, low: int, high: int) -> bytes:
        is_short = self.due("read")
        found = self.files.read(path, low, high)
        return found[:len(found) // 2] if is_short else found


class FaultySink:
    """A short write loses half of what it was given and says nothing."""

    def __init__(self, faulty: FaultyFiles, sink: Sink):
        self.faulty, self.sink = faulty, sink

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self.sink.write(view[:len(view) // 2] if self.faulty.due("write") else view)

    def close(self) -> None:
        self.faulty.due("close")
        self.sink.close()

    def abort(self) -> None:
        self.sink.abort()
