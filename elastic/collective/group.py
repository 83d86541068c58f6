"""The contract of a collective group: one generation's members, and what they may ask of each other.

Any call may raise `GroupBroken`: then the group is finished, every later call raises at once, and every buffer that was
in a call must never be used again (a peer that was only stopped may still write to it). `abort` may be called from
another thread; a waiter notices within `SLICE_S`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from elastic.buffers import copied, empty_like

Buffer = Any
Sums = Sequence[tuple[tuple[int, int], Buffer]]  # nodes of the canonical tree, and what the leaves below each come to

SLICE_S = 0.02  # how long one wait may hold before it looks whether the group was aborted


@dataclass(frozen=True)
class Pending:
    """A call that was started. `finish`, once, waits for its end; after that its buffers are the caller's again. It
    raises as any call does, also where the group was aborted since the start."""

    finish: Callable[[], None]


class CollectiveGroup(Protocol):
    """Buffers are flat arrays (NumPy or torch) of one dtype; all sizes are in elements. What is optional has its
    default in `member.Member`."""

    rank: int
    size: int
    sums_in_order: bool = False  # `all_reduce` adds in rank order
    aborted: threading.Event  # set once the group is given up

    def all_reduce(self, buffer: Buffer) -> None:
        """Sum over the members, in place, in the library's own order."""

    def summed(self, x: Buffer) -> Buffer:
        """The sum over the members in rank order, a new buffer."""
        if self.size <= 2 or self.sums_in_order:  # of two numbers there is but one sum
            total = copied(x)
            self.all_reduce(total)
            return total
        part = -(-x.shape[0] // self.size)
        padded, received, out = (empty_like(x, part * self.size) for _ in range(3))
        padded[:x.shape[0]] = x
        padded[x.shape[0]:] = 0
        self.all_to_all(received, [part] * self.size, padded, [part] * self.size)
        total = copied(received[:part])
        for rank in range(1, self.size):
            total += received[rank * part:(rank + 1) * part]
        self.all_gather(out, total)
        return out[:x.shape[0]]

    def all_gather(self, out: Buffer, part: Buffer) -> None:
        """`out` = the members' parts in rank order; every part has the same size."""

    def all_to_all(self, out: Buffer, out_counts: Sequence[int], buffer: Buffer, counts: Sequence[int]) -> None:
        """`counts[r]` elements go to rank r, `out_counts[r]` come from it; parts lie in rank order; a count may be 0.
        """

    def broadcast(self, buffer: Buffer, root: int) -> None:
        """Every member's `buffer` becomes the root's."""

    def send(self, buffer: Buffer, to: int) -> None:
        """Point to point; the peer calls `receive`."""

    def receive(self, buffer: Buffer, source: int) -> None:
        """The other half of `send`."""

    def subgroup(self, ranks: Sequence[int]) -> CollectiveGroup:
        """The group of these members only; each of them calls it, with the same ranks. It shares this group's fate."""

    def barrier(self) -> None:
        """Returns once every member has entered."""

    def start(self, call: str, *arguments: Any) -> Pending:
        """Begins `call` ("all_reduce" and so on) beside the computation: no other call of this group before it is
        finished, and its buffers are neither read nor written until then. By default all of it is done in `finish`,
        where its wait is in any case."""

    def allocate(self, size: int, plain: Callable[[int], Buffer] = ...) -> Buffer:
        """A zeroed float32 buffer of which `all_reduce` and sums along the tree need no copy; of `plain` where there
        are none. It lives as long as the group."""

    def reduce_tree(self, sums: Sums, num_shards: int, out: Buffer, numel: int, block: int, scratch: Any) -> Buffer:
        """What `reduction.reduce` does, to the bit."""

    def reduce_held(self, sums: Sums, num_shards: int, out: Buffer, cuts: Sequence[int], twin: bool,
                    scratch: Any) -> Buffer:
        """What `reduction.reduce_held` does, to the bit."""

    def cut_short(self, delivered_to: Collection[int], then: Callable[[], None]) -> None:
        """For fault injection: in the next call, the data reaches these ranks alone, or on some transports whom chance
        says; then `then()`, which ends the member."""

    def abort(self) -> None:
        """Gives the group up without waiting for anybody: all calls, running ones too, raise `GroupBroken`."""
