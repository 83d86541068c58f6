"""The head node's disk for those who do not see it: one actor there does what `Files` asks for.

Where a run's directory is on the head alone, a worker's checkpoints lie at head://RUN/PATH. What is written and read
travels in chunks through Ray's object stores, a few at a time, so neither end holds more than those of a file.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from functools import cache
from typing import Any, Protocol
from urllib.parse import quote, unquote

import numpy as np
import ray

from elastic.messages import NAMESPACE
from elastic.storage.files import AT_HEAD, Info, LocalFiles

HEAD = {"node:__internal_head__": 0.001}  # a resource that Ray gives to the head node alone: who needs it runs there
CHUNK = 16 << 20  # bytes in one call
IN_FLIGHT = 4  # calls with a chunk that one file waits for
ANSWER_S = 60.0  # for a call: the disk may be slow, but a head that is cut off must not look like one


class HeadStorage(LocalFiles):
    """The actor. It keeps no file open between calls, so one that Ray has started anew knows as much as the one before."""

    def begin(self, path: str) -> None:
        """An empty file."""
        with open(path, "wb"):
            pass

    def write(self, path: str, low: int, data: Any) -> None:
        """Bytes from `low` on, whatever has come before: chunks arrive in any order."""
        view = memoryview(data).cast("B")
        is_full = len(view) >= CHUNK
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            while view:
                done = os.pwrite(descriptor, view, low)
                low, view = low + done, view[done:]
            if is_full:  # else a large file's last call would wait for all of it
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def chunk(self, path: str, low: int, high: int) -> np.ndarray:
        """As `read`, in pages that the system gets back at once: what a thread frees its allocator would keep for the next."""
        with open(path, "rb", buffering=0) as file:
            size = max(0, min(high, os.fstat(file.fileno()).st_size) - low)
            room = np.frombuffer(mmap.mmap(-1, size), np.uint8) if size else np.empty(0, np.uint8)
            done = 0
            while done < size and (more := os.preadv(file.fileno(), [room.data[done:]], low + done)):
                done += more
        return room[:done]


class Calls(Protocol):
    """A way to a `HeadStorage`. Calls that are under way at once may be carried out in any order."""

    def start(self, method: str, *arguments: Any) -> Any: ...

    def result(self, call: Any) -> Any:
        """Waits for a call that was started; OSError where it failed or nobody answers."""


class HeadFiles:
    """`elastic.storage.files.Files` of the head node."""

    renames = True

    def __init__(self, calls: Calls):
        self.calls = calls

    def ask(self, method: str, *arguments: Any) -> Any:
        return self.calls.result(self.calls.start(method, *arguments))

    def make_folder(self, path: str) -> None:
        self.ask("make_folder", path)

    def create(self, path: str) -> HeadSink:
        self.ask("begin", path)
        return HeadSink(self, path)

    def rename(self, source: str, target: str) -> None:
        self.ask("rename", source, target)

    def sync(self, folder: str) -> None:
        self.ask("sync", folder)

    def info(self, path: str) -> Info | None:
        found: Info | None = self.ask("info", path)
        return found

    def read(self, path: str, low: int, high: int) -> bytes:
        waiting, found = deque[Any](), list[Any]()
        for begin in range(low, max(high, low + 1), CHUNK):
            waiting.append(self.calls.start("chunk", path, begin, min(begin + CHUNK, high)))
            if len(waiting) == IN_FLIGHT:
                found.append(bytes(self.calls.result(waiting.popleft())))
        found += [bytes(self.calls.result(call)) for call in waiting]
        return found[0] if len(found) == 1 else b"".join(found)

    def names(self, folder: str) -> list[str]:
        found: list[str] = self.ask("names", folder)
        return found

    def remove(self, path: str) -> None:
        self.ask("remove", path)


class HeadSink:
    """Buffers that were given to `write` need not be kept. `low`: where in the file it begins."""

    def __init__(self, files: HeadFiles, path: str, low: int = 0):
        self.files, self.path, self.low = files, path, low
        self.waiting = deque[Any]()

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), CHUNK):
            if len(self.waiting) == IN_FLIGHT:
                self.files.calls.result(self.waiting.popleft())
            piece = np.frombuffer(view[begin:begin + CHUNK], np.uint8)
            self.waiting.append(self.files.calls.start("write", self.path, self.low, piece))
            self.low += len(piece)

    def flush(self) -> None:
        """Returns when all of it is in the file."""
        while self.waiting:
            self.files.calls.result(self.waiting.popleft())

    def close(self) -> None:
        self.flush()
        self.files.ask("sync", self.path)

    def abort(self) -> None:
        self.waiting.clear()


class RayCalls:
    """To the storage actor of a run, which the first that needs it starts."""

    def __init__(self, run_id: str):
        self.actor = ray.remote(HeadStorage).options(
            name=name_of(run_id), namespace=NAMESPACE, get_if_exists=True, lifetime="detached", num_cpus=0,
            resources=HEAD, max_restarts=-1, max_concurrency=8).remote()

    def start(self, method: str, *arguments: Any) -> Any:
        return getattr(self.actor, method).remote(*arguments)

    def result(self, call: Any) -> Any:
        try:
            return ray.get(call, timeout=ANSWER_S)
        except ray.exceptions.RayTaskError as failed:
            if isinstance(failed.cause, OSError):
                raise failed.cause from None
            raise OSError(errno.EIO, f"The head node's storage fails: {failed.cause}") from failed
        except ray.exceptions.RayError as gone:
            raise OSError(errno.EIO, f"The head node's storage does not answer: {type(gone).__name__}") from gone


def name_of(run_id: str) -> str:
    return f"{run_id}/storage"


@cache
def head_files(run_id: str) -> HeadFiles:
    return HeadFiles(RayCalls(run_id))


def at_head(run_id: str, path: str) -> str:
    """Where a path of the head node is for a run's workers that do not see it."""
    return f"{AT_HEAD}://{quote(run_id, safe='')}{quote(path)}"


def parted_head(location: str) -> tuple[str, str]:
    """A run's id and the head's path."""
    run_id, _, path = location.partition("://")[2].partition("/")
    return unquote(run_id), f"/{unquote(path)}"


def end_storage(run_id: str) -> None:
    """When the run is over."""
    try:
        ray.kill(ray.get_actor(name_of(run_id), NAMESPACE))
    except ValueError:  # nobody has needed it
        pass
