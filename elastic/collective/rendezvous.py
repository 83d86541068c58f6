"""Where processes meet: each worker's own TCP store, and blocking library calls that a waiter can leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from elastic.collective.group import SLICE_S
from elastic.errors import GroupBroken

T = TypeVar("T")


class Endpoint:
    """This worker's own store server on a free port, for the worker's lifetime: any generation may meet here."""

    def __init__(self, host: str = "127.0.0.1"):
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self.address = f"{host}:{self._store.port}"


def join_store(address: str, prefix: str, timeout_s: float) -> dist.Store:
    """A new client of the store at host:port; blocks until the store answers."""
    host, _, port = address.rpartition(":")
    return dist.PrefixStore(prefix, dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s)))


def sub_store(store: dist.Store, kind: str, ranks: Sequence[int]) -> dist.Store:
    """Where some members of a group meet to form one of their own."""
    return dist.PrefixStore("/".join([kind, *map(str, ranks)]), store)


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
        except (RuntimeError, OSError, ValueError) as error:  # what torch.distributed raises
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
    if failed:
        raise GroupBroken(f"{what} failed: {failed[0]}") from failed[0]
    if abandoned.is_set():
        raise GroupBroken(f"{what} was abandoned.")
    raise GroupBroken(f"{what} took more than {timeout_s:g} s.")


def drop(things: list[object]) -> None:
    """Forgets `things`, last first, in a daemon thread: freeing a group whose peer hangs blocks until the peer is gone."""

    def work() -> None:
        while things:
            things.pop()

    threading.Thread(target=work, name="elastic-drop", daemon=True).start()
