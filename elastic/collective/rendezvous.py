"""How torch.distributed's process groups form: at our own store, and in a thread, so that a blocking call can be left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from elastic.collective.group import SLICE_S
from elastic.collective.store import Endpoint, StoreClient
from elastic.errors import GroupBroken

__all__ = ["Door", "Endpoint", "call_leaving", "drop"]
T = TypeVar("T")


class Door(dist.Store):
    """A `StoreClient` as the library wants it."""

    def __init__(self, client: StoreClient, prefix: str = ""):
        super().__init__()
        self._client, self._prefix = client, prefix

    def under(self, *parts: Any) -> Door:
        return Door(self._client, self._prefix + "/".join(map(str, parts)) + "/")

    def set(self, key: str, value: bytes | str) -> None:
        self._client.set(self._prefix + key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._client.get(self._prefix + key)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._client.get(self._prefix + key)

    def check(self, keys: Sequence[str]) -> bool:
        return all(self._client.check(self._prefix + key) for key in keys)


def call_leaving(blocking: Callable[[], T], abandoned: threading.Event, timeout_s: float, what: str) -> T:
    """`blocking()` in a daemon thread. Raises `GroupBroken` if it fails, takes too long, or `abandoned` is set meanwhile.

    A call that was left ends by its own time limit; what it made dies in its thread, for dropping a group can block.
    """
    made: list[T] = []
    failed: list[BaseException] = []
    left, done, lock = threading.Event(), threading.Event(), threading.Lock()

    def work() -> None:
        result = None
        try:
            result = blocking()
        except (RuntimeError, OSError, ValueError, GroupBroken) as error:  # what torch.distributed and our store raise
            failed.append(error)
        with lock:
            if result is not None and not left.is_set():
                made.append(result)
        done.set()

    threading.Thread(target=work, name=f"elastic-{what}", daemon=True).start()
    deadline = time.monotonic() + timeout_s
    while not done.wait(SLICE_S) and not abandoned.is_set() and time.monotonic() < deadline:
        continue
    with lock:
        if made:
            return made.pop()
        left.set()
    if abandoned.is_set():
        raise GroupBroken(f"{what} was abandoned.")
    if failed:
        raise GroupBroken(f"{what} failed: {failed[0]}") from failed[0]
    raise GroupBroken(f"{what} took more than {timeout_s:g} s.")


def drop(things: list[object]) -> None:
    """Forgets `things`, last first, in a daemon thread: freeing a group whose peer hangs blocks until the peer is gone."""

    def work() -> None:
        while things:
            things.pop()

    threading.Thread(target=work, name="elastic-drop", daemon=True).start()
