"""A group of one: nothing to wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

from elastic.collective.group import Buffer
from elastic.collective.member import Member


class SoloGroup(Member):
    sums_in_order = True  # `all_reduce` adds in rank order

    def __init__(self, aborted: threading.Event | None = None):
        super().__init__(0, 1, aborted)

    def all_reduce(self, buffer: Buffer) -> None:
        self._check()

    def all_gather(self, out: Buffer, part: Buffer) -> None:
        self._check()
        out[:] = part

    def all_to_all(self, out: Buffer, out_counts: Sequence[int], buffer: Buffer, counts: Sequence[int]) -> None:
        self._check()
        out[:out_counts[0]] = buffer[:counts[0]]

    def broadcast(self, buffer: Buffer, root: int) -> None:
        self._check()

    def send(self, buffer: Buffer, to: int) -> None:
        raise ValueError(f"rank {to} is no peer in a group of one.")

    def receive(self, buffer: Buffer, source: int) -> None:
        raise ValueError(f"rank {source} is no peer in a group of one.")

    def cut_short(self, delivered_to: Collection[int], then: Callable[[], None]) -> None:
        then()  # at once: nobody could have got anything

    def barrier(self) -> None:
        self._check()

    def subgroup(self, ranks: Sequence[int]) -> SoloGroup:
        self._check()
        return SoloGroup(self._aborted)
