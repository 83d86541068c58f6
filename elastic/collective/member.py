"""What every implementation of `CollectiveGroup` keeps: its place, and whether the group is finished."""

from __future__ import annotations

import threading

from elastic.collective.group import CollectiveGroup
from elastic.errors import GroupBroken


class Member(CollectiveGroup):
    """One member's end of a group. `abandoned` may be set by any thread; waiters look at it every slice."""

    def __init__(self, rank: int, size: int, abandoned: threading.Event | None = None):
        self.rank, self.size = rank, size
        self.abandoned = self._abandoned = abandoned or threading.Event()
        self._reason = ""

    def _check(self) -> None:
        """Raises if the group is finished; before every call and in every slice of a wait."""
        if self._reason:
            raise GroupBroken(self._reason)
        if self._abandoned.is_set():
            raise self._break("was abandoned")

    def _break(self, what: str) -> GroupBroken:
        """The error to raise now and ever after."""
        if not self._reason:
            self._reason = f"Rank {self.rank} of {self.size}: the group {what}."
        return GroupBroken(self._reason)

    def abandon(self) -> None:
        self._abandoned.set()
