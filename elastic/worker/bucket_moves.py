"""How every member comes by the buckets of the tables that it is to hold when a generation begins: from whoever has them.

What a member held stays whole until all have theirs: a move that is cut off changes nothing that anybody stands by
with.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from elastic.messages import Buckets
from elastic.tables.buckets import bits_of
from elastic.tables.held import HeldTables
from elastic.tables.rows import Rows
from elastic.tables.wire import exchange
from elastic.worker.context import StepContext

Move = tuple[int, int, int]  # bucket, source and receiver


def owned_by(rank: int, buckets: Buckets) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a rank owns, and what it keeps as a twin."""
    return tuple(tuple(bucket for bucket, holder in enumerate(holders) if holder == rank)
                 for holders in (buckets.owners, buckets.twins))  # type: ignore[return-value]


def held_buckets(tables: HeldTables | None, has_state: bool) -> dict[str, Any]:
    """What a `Standing` says of it."""
    if tables is None or not has_state:
        return {}
    size = tables.tables.num_buckets
    return {"buckets": size, "owned": bits_of(tables.owned, size), "twins": bits_of(tables.twins, size)}


def take_buckets(context: StepContext) -> None:
    """Moves what the generation says, before its first step; afterwards everybody holds what it is to hold."""
    tables, buckets, generation = context.tables, context.generation.buckets, context.generation
    assert tables is not None and buckets is not None
    group, rank = context.groups.world, context.group.rank
    owned, twins = owned_by(rank, buckets)
    coming = {bucket for bucket, _, to in buckets.moves if to == rank}  # what lies here of them may be of another past
    tables.owned, tables.twins = (tuple(bucket for bucket in held if bucket not in coming)
                                  for held in (tables.owned, tables.twins))
    tables.trim()
    if buckets.moves:
        context.injector.at(context.step + 1, "heal")
    started, sent = time.perf_counter(), 0
    tables.take(coming)
    for moves in rounds(context, tables, buckets.moves):
        parts = [[array for move in moves if move[1:] == (rank, to) for spec in tables.specs
                  for array in tables.stores[spec.name].export(move[0]).arrays] for to in range(group.size)]
        sent += sum(array.nbytes for part in parts for array in part)
        with context.waiting("heal", group) as cut:
            received = exchange(cut, parts)
        for part in received:
            tables.load(rows_of(part))
    tables.owned = tuple(sorted({*tables.owned, *owned}))
    tables.twins = tuple(sorted({*tables.twins, *twins} - {*tables.owned}))
    total = context.gather("heal", np.array([float(sent)])).sum()  # and by now all have theirs
    tables.owned, tables.twins, tables.committed = owned, twins, context.step
    tables.trim()
    if rank == 0 and buckets.moves:
        context.member.event(generation, "tables_resharded", buckets=len(buckets.moves), bytes=int(total),
                             seconds=time.perf_counter() - started)


def rounds(context: StepContext, tables: HeldTables, moves: Sequence[Move]) -> Iterator[list[Move]]:
    """The moves in the order of their buckets, as many at a time for all members as keep each one's share small. How
    large buckets are only their holders know, so a round is a number of buckets, agreed upon."""
    if not moves:
        return
    mine = tables.row_bytes / len(tables.held) if tables.held else 0.0  # a joiner has room alone
    largest = context.gather("heal", np.array([mine])).max()
    each = max(1, int(tables.tables.move_bytes / max(1.0, largest)))
    for low in range(0, len(moves), each):
        yield list(moves[low:low + each])


def rows_of(arrays: Sequence[np.ndarray]) -> list[Rows]:
    """What one member has sent, from what it is sent as."""
    each = len(fields(Rows))
    return [Rows(*arrays[at:at + each]) for at in range(0, len(arrays), each)]
