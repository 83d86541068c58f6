"""Workers as threads of one process, for tests of what a model computes across them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from elastic.collective.local import Hub

WAIT_S = 60.0  # for what must happen, on a busy machine; a failure is a hang


def together(size: int, work: Callable[[int, Any], Any], limit_s: float = WAIT_S) -> list[Any]:
    """`work(rank, group)` in as many threads, by rank; the first error of a worker is raised, and one that waits for
    ever is an error."""
    hub = Hub()
    groups = [hub.form(0, rank, size) for rank in range(size)]
    found: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank, groups[rank])
        except BaseException as error:
            errors.append(error)
            groups[rank].abort()  # or the others would wait for it

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit_s)
    if any(thread.is_alive() for thread in threads):
        for group in groups:
            group.abort()
        raise TimeoutError(f"a worker of {size} still waits after {limit_s:g} s")
    if errors:
        raise errors[0]
    return found
