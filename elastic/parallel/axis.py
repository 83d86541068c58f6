"""One axis of the mesh as a model's kernels see it: its size, this worker's place, and the collectives, with a count of what moved.

Sums are in rank order on every transport, so their bits depend on the degree alone. Buffers are flat arrays, NumPy or
torch, of any dtype that the group moves; what is given is not written to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce

from elastic.buffers import empty_like, maximum
from elastic.collective.group import Buffer, CollectiveGroup
from elastic.mesh import shards_of


class Axis:
    """`name`: "tensor" and so on; `counts`: bytes that this worker gave to each kind of collective, by "AXIS.KIND"."""

    def __init__(self, name: str, group: CollectiveGroup, counts: Counter[str] | None = None):
        self.name, self.group = name, group
        self.size, self.rank = group.size, group.rank
        self.counts: Counter[str] = Counter() if counts is None else counts

    def sum(self, x: Buffer) -> Buffer:
        """The sum over the axis in rank order, a new buffer."""
        self._count("all_reduce", x)
        return self.group.summed(x)

    def max(self, x: Buffer) -> Buffer:
        """The elementwise maximum over the axis, a new buffer."""
        self._count("all_reduce", x)
        return reduce(maximum, self._gathered(x))

    def gather(self, x: Buffer) -> list[Buffer]:
        """Everybody's buffer, in rank order; all have the same length."""
        self._count("all_gather", x)
        return self._gathered(x)

    def exchange(self, x: Buffer, counts: Sequence[int], out_counts: Sequence[int]) -> Buffer:
        """`counts[r]` elements go to place r, `out_counts[r]` come from it, in rank order."""
        self._count("all_to_all", x)
        out = empty_like(x, sum(out_counts))
        self.group.all_to_all(out, list(out_counts), x, list(counts))
        return out

    def span(self, length: int) -> tuple[int, int]:
        """(start, count) of this place's share of a dim of this length."""
        return span(length, self.size, self.rank)

    def _gathered(self, x: Buffer) -> list[Buffer]:
        out = empty_like(x, self.size * x.shape[0])
        self.group.all_gather(out, x)
        return [out[r * x.shape[0]:(r + 1) * x.shape[0]] for r in range(self.size)]

    def _count(self, kind: str, x: Buffer) -> None:
        self.counts[f"{self.name}.{kind}"] += int(x.nbytes)


def span(length: int, size: int, rank: int) -> tuple[int, int]:
    """(start, count) of part `rank` of `size` of a dim; the first parts are one longer where it does not divide."""
    run = shards_of(rank, size, length)
    return run.start, len(run)
