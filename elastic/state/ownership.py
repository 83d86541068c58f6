"""Who keeps which stretch of the optimizer's state, and what moves when that changes. Pure functions of numbers.

The trainable part of a flat buffer is cut into one stretch of blocks a member: it is the stretch's owner. With a twin the member
after it keeps the stretch too, so whoever is lost, all of it is still there. A stretch is (low, high), in whatever unit is counted in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from elastic.mesh import shards_of

Stretch = tuple[int, int]
NONE: Stretch = (0, 0)


def owned(rank: int, size: int, num_blocks: int) -> Stretch:
    """What member `rank` of `size` owns; the first ones own one block more where it does not go evenly."""
    run = shards_of(rank, size, num_blocks)
    return run.start, run.stop


def cuts(size: int, num_blocks: int) -> list[int]:
    """Where each member's stretch begins, and at last where all ends."""
    return [owned(rank, size, num_blocks)[0] for rank in range(size)] + [num_blocks]


def kept(rank: int, size: int, num_blocks: int, twin: bool) -> tuple[Stretch, Stretch]:
    """What a member owns, and that of which it is the twin."""
    own = owned(rank, size, num_blocks)
    return own, owned((rank - 1) % size, size, num_blocks) if twin and size > 1 else NONE


def union(stretches: Iterable[Stretch]) -> list[Stretch]:
    """The same places, in order, none twice, with neighbours joined."""
    found: list[Stretch] = []
    for low, high in sorted(s for s in stretches if s[0] < s[1]):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def without(stretches: Iterable[Stretch], others: Iterable[Stretch]) -> list[Stretch]:
    """The places of `stretches` that are not in `others`."""
    left = union(stretches)
    for low, high in union(others):
        left = [piece for a, b in left for piece in ((a, min(b, low)), (max(a, high), b)) if piece[0] < piece[1]]
    return left


def lacking(have: Iterable[Iterable[Stretch]], length: int) -> list[Stretch]:
    """The places up to `length` that nobody has."""
    return without([(0, length)], (stretch for stretches in have for stretch in stretches))


@dataclass(frozen=True)
class Move:
    """One stretch that one member sends to another."""

    source: int
    to: int
    low: int
    high: int

    @property
    def size(self) -> int:
        return self.high - self.low


def moves(have: Sequence[Sequence[Stretch]], want: Sequence[Sequence[Stretch]], grain: int) -> list[Move]:
    """What has to be sent so that everybody has what it wants, in pieces of at most `grain`, from whoever has sent least so far.

    ValueError where somebody wants what nobody has.
    """
    edges = sorted({edge for stretches in (*have, *want) for stretch in stretches for edge in stretch})
    sent = [0] * len(have)
    found: list[Move] = []
    for begin, end in zip(edges, edges[1:]):
        holders = [rank for rank, stretches in enumerate(have) if any(low <= begin and end <= high for low, high in stretches)]
        takers = [rank for rank, stretches in enumerate(want)
                  if rank not in holders and any(low <= begin and end <= high for low, high in stretches)]
        if takers and not holders:
            raise ValueError(f"nobody has {begin} to {end}, which member {takers[0]} wants.")
        for to in takers:
            for low in range(begin, end, grain):
                high = min(end, low + grain)
                source = min(holders, key=lambda rank: (sent[rank], rank))
                sent[source] += high - low
                found.append(Move(source, to, low, high))
    return found


def rounds(found: Sequence[Move], most: int) -> list[list[Move]]:
    """Moves that go at the same time: at most `most` in all, and at least one."""
    out: list[list[Move]] = []
    size = most
    for move in found:
        if size + move.size > most:
            out.append([])
            size = 0
        out[-1].append(move)
        size += move.size
    return out


def by_twins(have: Iterable[Sequence[Stretch]]) -> list[Stretch]:
    """The places of which only twins are left. Stretches of `have` come in pairs, as `kept` gives them."""
    own: list[Stretch] = []
    twins: list[Stretch] = []
    for stretches in have:
        own += stretches[0::2]
        twins += stretches[1::2]
    return without(twins, own)


def size_of(stretches: Iterable[Stretch]) -> int:
    return sum(high - low for low, high in stretches)


def scaled(stretches: Iterable[Stretch], factor: int) -> tuple[Stretch, ...]:
    """In another unit: blocks as elements."""
    return tuple((low * factor, high * factor) for low, high in stretches)
