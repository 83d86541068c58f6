"""Sums of which every member gets its own stretch alone, and the gathering of what members made of theirs.

`cuts` says whose is what: member r owns elements cuts[r]..cuts[r+1]-1. With a twin it also gets the stretch of the member before it, from
that member once it is summed: 1 / (2 (size - 1)) more than an all-reduce moves. Bits are those of `reduction.reduce`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elastic.collective.group import Buffer, CollectiveGroup
from elastic.collective.reduction import CHUNK, Node, Scratch, add_into, checked_nodes, fold
from elastic.keeping import Stretch


def wanted(rank: int, size: int, twin: bool) -> list[int]:
    """Whose stretches a member gets, its own first."""
    return [rank, (rank - 1) % size] if twin and size > 1 else [rank]


def stretches(cuts: Sequence[int], size: int, chunk: int) -> Iterator[list[Stretch]]:
    """A part of everybody's stretch at a time."""
    stride = max(1, chunk // size)
    longest = max(high - low for low, high in zip(cuts, cuts[1:]))
    for begin in range(0, longest, stride):
        yield [(min(high, low + begin), min(high, low + begin + stride)) for low, high in zip(cuts, cuts[1:])]


def reduce_kept(group: CollectiveGroup, sums: Sequence[tuple[Node, Buffer]], num_shards: int, out: Buffer, cuts: Sequence[int], twin: bool,
                scratch: Scratch, chunk: int = CHUNK) -> Buffer:
    """The sum over all shards along the canonical tree, of this member's stretch and behind it of the one whose twin it is.

    `sums` and what may be used after `GroupBroken` are as for `reduction.reduce`. Returns `out`, or in a group of one a buffer of `sums`.
    """
    if group.size == 1:
        return sums[0][1]
    native = getattr(group, "reduce_kept", None)
    if native is not None:
        return native(sums, num_shards, out, cuts, twin)
    owned = checked_nodes(group, sums, num_shards)
    own, before, after = cuts[group.rank + 1] - cuts[group.rank], (group.rank - 1) % group.size, (group.rank + 1) % group.size
    done, doubled = 0, own
    for spans in stretches(cuts, group.size, chunk):
        lengths = [high - low for low, high in spans]
        mine = lengths[group.rank]
        part = out[done:done + mine]
        part[:] = exchange_and_add(group, sums, owned, num_shards, spans, scratch)
        if twin:
            theirs = lengths[before]
            group.all_to_all(out[doubled:doubled + theirs], alone(before, theirs, group.size), part, alone(after, mine, group.size))
            doubled += theirs
        done += mine
    return out


def alone(rank: int, count: int, size: int) -> list[int]:
    """All for one."""
    return [count if r == rank else 0 for r in range(size)]


def exchange_and_add(group: CollectiveGroup, sums: Sequence[tuple[Node, Buffer]], owned: Sequence[Sequence[Node]], num_shards: int,
                     spans: Sequence[Stretch], scratch: Scratch) -> Buffer:
    """This member's span, summed along the tree."""
    lengths = [high - low for low, high in spans]
    mine = lengths[group.rank]
    received = scratch.get(sum(lengths) + mine * sum(len(nodes) for nodes in owned))
    packed, received = received[:sum(lengths)], received[sum(lengths):]
    pieces: list[tuple[Node, Buffer]] = []
    used = 0
    for index in range(max(len(nodes) for nodes in owned)):
        senders = [rank for rank in range(group.size) if index < len(owned[rank])]
        has = index < len(sums)
        if has:
            at = 0
            for low, high in spans:
                packed[at:at + high - low] = sums[index][1][low:high]
                at += high - low
        out_counts = [mine if rank in senders else 0 for rank in range(group.size)]
        group.all_to_all(received[used:used + sum(out_counts)], out_counts, packed if has else packed[:0], lengths if has else [0] * group.size)
        for rank in senders:
            pieces.append((owned[rank][index], received[used:used + mine]))
            used += mine
    pieces.sort(key=lambda piece: piece[0])
    return fold(pieces, num_shards, add_into)[0][1]


def gather_owned(group: CollectiveGroup, buffer: Buffer, cuts: Sequence[int], scratch: Scratch, chunk: int = CHUNK) -> None:
    """Everybody's stretch of `buffer` becomes its owner's. What was received is copied in piece by piece: after `GroupBroken` the others'
    stretches are of no one time, this member's own and `scratch` apart.
    """
    if group.size == 1:
        return
    for spans in stretches(cuts, group.size, chunk):
        most = max(high - low for low, high in spans)
        low, high = spans[group.rank]
        space = scratch.get(most * (group.size + 1))
        mine, out = space[:most], space[most:most * (group.size + 1)]
        mine[:high - low] = buffer[low:high]
        group.all_gather(out, mine)
        for rank, (low, high) in enumerate(spans):
            if rank != group.rank:
                buffer[low:high] = out[rank * most:rank * most + high - low]
