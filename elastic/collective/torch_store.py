"""How torch.distributed's process groups form: at our own store, and in a thread, so that a blocking call can be left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from elastic.collective.group import SLICE_S
from elastic.collective.kv_store import StoreClient
from elastic.errors import GroupBroken, UserError

T = TypeVar("T")


class Door(dist.Store):
    """A `StoreClient` as the library wants it."""

    def __init__(self, client: StoreClient, prefix: str = "", is_sound: Callable[[bytes, bytes], bool] | None = None):
        super().__init__()
        self._client, self._prefix, self._is_sound, self._mine = client, prefix, is_sound, b""
        self._clones: list[Door] = []  # the library's own reference does not keep the Python half alive

    def under(self, prefix: str) -> Door:
        return Door(self._client, self._prefix + prefix)

    def clone(self) -> Door:
        """A door with a connection of its own, for the library's threads."""
        self._clones.append(Door(self._client.clone(), self._prefix))
        return self._clones[-1]

    def checked(self, is_sound: Callable[[bytes, bytes], bool]) -> Door:
        """A door for a library that believes all it reads: `is_sound(found, what this member set last)`."""
        self._clones.append(Door(self._client, self._prefix, is_sound))
        return self._clones[-1]

    def set(self, key: str, value: bytes | str) -> None:
        self._mine = value.encode() if isinstance(value, str) else bytes(value)
        self._client.set(self._prefix + key, self._mine)

    def get(self, key: str) -> bytes:
        found = self._client.get(self._prefix + key)
        if self._is_sound is not None and not self._is_sound(found, self._mine):
            raise GroupBroken(f"What a member has left under {key} is malformed.")
        return found

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._client.get(self._prefix + key)

    def check(self, keys: Sequence[str]) -> bool:
        return all(self._client.check(self._prefix + key) for key in keys)


def call_leaving(blocking: Callable[[], T], aborted: threading.Event, timeout_s: float, what: str) -> T:
    """`blocking()` in a daemon thread. Raises `GroupBroken` if it fails, takes too long, or `aborted` is set meanwhile.

    A call that was left ends by its own time limit; what it made dies in its thread, for dropping a group can block.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            result = blocking()
        except Exception as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(result)

    threading.Thread(target=work, name=f"elastic-{what}", daemon=True).start()
    deadline = time.monotonic() + timeout_s
    while not wait([future], SLICE_S).done and not aborted.is_set() and time.monotonic() < deadline:
        continue
    is_left = future.cancel()
    if not is_left and not future.exception():
        return future.result()
    if aborted.is_set():
        raise GroupBroken(f"{what} was aborted.")
    if is_left:
        raise GroupBroken(f"{what} took more than {timeout_s:g} s.")
    if isinstance(error := future.exception(), UserError):
        raise error
    raise GroupBroken(f"{what} failed: {error}") from error


def drop(things: list[object], *first: Callable[[], None]) -> None:
    """Calls `first`, then forgets `things`, last first, in a daemon thread: freeing a group whose peer hangs blocks
    until it is gone."""

    def work() -> None:
        for call in first:
            call()
        while things:
            things.pop()

    threading.Thread(target=work, name="elastic-drop", daemon=True).start()
