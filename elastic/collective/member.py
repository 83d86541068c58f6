"""What every implementation of `CollectiveGroup` keeps: its place, whether the group is finished, and what is optional."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np

from elastic.collective import reduction
from elastic.collective.group import Buffer, CollectiveGroup, Pending
from elastic.errors import GroupBroken


def zeros(size: int) -> Buffer:
    return np.zeros(size, np.float32)


class Member(CollectiveGroup):
    """One member's end of a group. `aborted` may be set by any thread; waiters look at it every slice."""

    def __init__(self, rank: int, size: int, aborted: threading.Event | None = None):
        self.rank, self.size = rank, size
        self.aborted = self._aborted = aborted or threading.Event()
        self._reason = ""

    def _check(self) -> None:
        """Raises if the group is finished; before every call and in every slice of a wait."""
        if self._reason:
            raise GroupBroken(self._reason)
        if self._aborted.is_set():
            raise self._break("was aborted")

    def _break(self, what: str) -> GroupBroken:
        """The error to raise now and ever after."""
        if not self._reason:
            self._reason = f"Rank {self.rank} of {self.size}: the group {what}."
        self._leave()
        return GroupBroken(self._reason)

    def _leave(self) -> None:
        """Tells the peers, where that can be done at once, not to wait for this member any more; else they learn of it
        by the broken connection."""
        return

    def abort(self) -> None:
        self._aborted.set()
        self._leave()

    def start(self, call: str, *arguments: Any) -> Pending:
        self._check()
        return Pending(partial(getattr(self, call), *arguments))

    def allocate(self, size: int, plain: Callable[[int], Buffer] = zeros) -> Buffer:
        return plain(size)

    reduce_tree, reduce_held = reduction.reduce, reduction.reduce_held


class Meeting(Member):
    """A member of a group whose processes meet at a store: pairs and subgroups are groups of their own, formed there.
    """

    def __init__(self, rank: int, size: int, aborted: threading.Event):
        super().__init__(rank, size, aborted)
        self._pairs: dict[tuple[int, ...], Self] = {}
        self._formed: dict[tuple[int, ...], int] = {}

    @abstractmethod
    def _form_at(self, key: str, ranks: Sequence[int]) -> Self:
        """The group of these members, who meet under `key` behind this group's own: ranks are within it, and others
        have them too."""

    def _form_sub(self, ranks: tuple[int, ...], kind: str) -> Self:
        self._check()
        try:
            return self._form_at("/".join([kind, *map(str, ranks), ""]), ranks)
        except GroupBroken as error:
            raise self._break(f"fell apart: {error}") from error

    def send(self, buffer: Buffer, to: int) -> None:
        self._pair(to).broadcast(buffer, int(self.rank > to))

    def receive(self, buffer: Buffer, source: int) -> None:
        self._pair(source).broadcast(buffer, int(source > self.rank))

    def _pair(self, peer: int) -> Self:
        ranks = (min(self.rank, peer), max(self.rank, peer))
        if ranks not in self._pairs:
            self._pairs[ranks] = self._form_sub(ranks, "pair")
        return self._pairs[ranks]

    def subgroup(self, ranks: Sequence[int]) -> Self:
        number = self._formed[tuple(ranks)] = self._formed.get(tuple(ranks), 0) + 1
        return self._form_sub(tuple(ranks), f"sub{number}")

    def abort(self) -> None:
        super().abort()
        for pair in list(self._pairs.values()):
            pair.abort()
