"""Who holds which range of the optimizer's state, and what moves when that changes. Pure functions of numbers.

The trainable part of a flat buffer is cut into one range of blocks a member: it is the range's owner. With a twin the
member after it holds the range too, so whoever is lost, all of it is still there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import groupby
from operator import itemgetter

from elastic.boxes import Range, without
from elastic.mesh import shards_of

NONE: Range = (0, 0)


def owned(rank: int, size: int, num_blocks: int) -> Range:
    """What member `rank` of `size` owns; the first ones own one block more where it does not go evenly."""
    run = shards_of(rank, size, num_blocks)
    return run.start, run.stop


def cuts(size: int, num_blocks: int) -> list[int]:
    """Where each member's range begins, and at last where all ends."""
    return [owned(rank, size, num_blocks)[0] for rank in range(size)] + [num_blocks]


def held(rank: int, size: int, num_blocks: int, twin: bool) -> tuple[Range, Range]:
    """What a member owns, and that of which it is the twin."""
    own = owned(rank, size, num_blocks)
    return own, owned((rank - 1) % size, size, num_blocks) if twin and size > 1 else NONE


def lacking(have: Iterable[Iterable[Range]], length: int) -> list[Range]:
    """The places up to `length` that nobody has."""
    return without([(0, length)], (one for ranges in have for one in ranges))


@dataclass(frozen=True)
class Transfer:
    """One range that one member sends to another."""

    source: int
    to: int
    low: int
    high: int

    @property
    def size(self) -> int:
        return self.high - self.low


def moves(have: Sequence[Sequence[Range]], want: Sequence[Sequence[Range]], grain: int) -> list[Transfer]:
    """What has to be sent so that everybody has what it wants, in pieces of at most `grain`, from whoever has sent
    least so far.

    ValueError where somebody wants what nobody has.
    """
    sent = [0] * len(have)
    found: list[Transfer] = []
    for begin, end, holders, takers in stretches(have, want):
        if not holders:
            raise ValueError(f"nobody has {begin} to {end}, which member {takers[0]} wants.")
        least = [(sent[rank], rank) for rank in holders]
        heapify(least)
        for to in takers:
            for low in range(begin, end, grain):
                high, (_, source) = min(end, low + grain), least[0]
                sent[source] += high - low
                heapreplace(least, (sent[source], source))
                found.append(Transfer(source, to, low, high))
    return found


def stretches(have: Sequence[Sequence[Range]], want: Sequence[Sequence[Range]]) -> Iterator[tuple[int, int, set[int], list[int]]]:
    """In order, each stretch that somebody wants and has not, with those who have it and those who want it: one pass over
    the sorted edges of all ranges."""
    edges = sorted((edge, side, rank, change) for side, members in enumerate((have, want))
                   for rank, ranges in enumerate(members) for one in ranges for edge, change in zip(one, (1, -1)))
    inside = [0] * len(have), [0] * len(want)  # of each member, in how many of its ranges the stretch lies
    holders, takers, before = set[int](), set[int](), 0
    for at, group in groupby(edges, key=itemgetter(0)):
        if takers:
            yield before, at, holders, sorted(takers)
        changed = set()
        for _, side, rank, change in group:
            inside[side][rank] += change
            changed.add(rank)
        for rank in changed:
            has, wants = (members[rank] > 0 for members in inside)
            (holders.add if has else holders.discard)(rank)
            (takers.add if wants and not has else takers.discard)(rank)
        before = at


def rounds(found: Sequence[Transfer], most: int) -> list[list[Transfer]]:
    """Moves that go at the same time: at most `most` in all, and at least one."""
    out: list[list[Transfer]] = []
    size = most
    for move in found:
        if size + move.size > most:
            out.append([])
            size = 0
        out[-1].append(move)
        size += move.size
    return out


def by_twins(have: Sequence[Sequence[Range]]) -> list[Range]:
    """The places of which only twins are left. Ranges of `have` come in pairs, as `held` gives them."""
    own, twins = ([one for ranges in have for one in ranges[half::2]] for half in (0, 1))
    return without(twins, own)
