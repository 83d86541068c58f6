"""The contract of a collective group: one generation's members, and what they may ask of each other.

Any call may raise `GroupBroken`: then the group is finished, every later call raises at once, and every buffer that was in a
call must never be used again (a peer that was only stopped may still write to it). `abandon` may be called from another
thread; a waiter notices within `SLICE_S`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

Buffer = Any

SLICE_S = 0.02  # how long one wait may hold before it looks whether the group was abandoned


class CollectiveGroup(Protocol):
    """Buffers are flat arrays (NumPy or torch) of one dtype; all sizes are in elements."""

    rank: int
    size: int

    def all_reduce(self, buffer: Buffer) -> None:
        """Sum over the members, in place, in the library's own order."""

    def reduce_scatter(self, out: Buffer, buffer: Buffer) -> None:
        """`out` = this rank's of `size` equal parts of the sum, summed in rank order."""

    def all_gather(self, out: Buffer, part: Buffer) -> None:
        """`out` = the members' parts in rank order; every part has the same size."""

    def all_to_all(self, out: Buffer, out_counts: Sequence[int], buffer: Buffer, counts: Sequence[int]) -> None:
        """`counts[r]` elements go to rank r, `out_counts[r]` come from it; parts lie in rank order; a count may be 0."""

    def broadcast(self, buffer: Buffer, root: int) -> None:
        """Every member's `buffer` becomes the root's."""

    def send(self, buffer: Buffer, to: int) -> None:
        """Point to point; the peer calls `receive`."""

    def receive(self, buffer: Buffer, source: int) -> None:
        """The other half of `send`."""

    def subgroup(self, ranks: Sequence[int]) -> CollectiveGroup:
        """The group of these members only; each of them calls it, with the same ranks. It shares this group's fate."""

    def allocator(self, otherwise: Callable[[int], Buffer]) -> Callable[[int], Buffer]:
        """Where buffers for its reductions are best allocated, by their size: `otherwise` where any memory will do."""

    def cut_short(self, delivered_to: Collection[int], then: Callable[[], None]) -> None:
        """For fault injection: in the next call only the ranks in `delivered_to` get what this member gives, as far as the transport can tell them
        apart; then `then()`, which ends the member.
        """

    def barrier(self) -> None:
        """Returns once every member has entered."""

    def abandon(self) -> None:
        """Gives the group up without waiting for anybody: all calls, running ones too, raise `GroupBroken`."""
