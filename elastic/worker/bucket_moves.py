"""How a member comes by the buckets of the embedding tables that it is to hold: between two steps, some at a time, beside the training.

`elastic.tables.moving` says what moves when, and why nothing is lost whoever falls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from elastic.messages import Moved
from elastic.tables.buckets import bits_of
from elastic.tables.held import HeldTables
from elastic.tables.moving import Move, Moving, roles_of
from elastic.tables.rows import Rows
from elastic.tables.wire import exchange
from elastic.worker.context import StepContext

# what moves between two steps, by the seconds of a step: rows move at 150 to 300 MB/s on one busy node (benchmarks/reshard.py), and
# that is to take half as long as the step
STEP_BYTES_S = 80e6


def held_buckets(tables: HeldTables | None, has_state: bool) -> dict[str, Any]:
    """What a `Standing` says of it."""
    if tables is None or not has_state:
        return {}
    size = tables.tables.num_buckets
    return {"buckets": size, "owned": bits_of(tables.owned, size), "twins": bits_of(tables.twins, size),
            "stale": bits_of(tables.stale, size)}


def begin_moves(context: StepContext) -> None:
    """When all members are at the generation's step: what lies here beside what it says of this one may be of another past
    and goes, and all agree upon how much moves at a time, so that no step takes twice as long for it. How large buckets
    are only their holders know, and each has looked at one, so that is a number of buckets."""
    tables, buckets = context.tables, context.generation.buckets
    assert tables is not None and buckets is not None
    owned, twins = roles_of(context.group.rank, context.moving.first)
    assert {*owned, *twins} <= {*tables.held}, "a bucket is not where the generation says that it is"
    tables.keep(owned, twins)
    tables.committed = context.step
    if buckets.moves:
        first = next((bucket for bucket, source, _ in buckets.moves if source == context.group.rank), None)
        size = 0 if first is None else sum(array.nbytes for array in exported(tables, first))
        found = context.gather("move", np.array([float(size), min(context.member.steps_s, default=math.inf)]))
        largest, most = found[:, 0].max(), min(tables.tables.move_bytes, STEP_BYTES_S * found[:, 1].min())
        context.moving = Moving(buckets, context.step, max(1, int(most / max(1.0, largest))))


def move_buckets(context: StepContext) -> None:
    """What is due before the step at hand, copied as of the commit before it."""
    tables, step, started = context.tables, context.step, time.perf_counter()
    if tables is None or not (chunks := context.moving.before(step)):
        return
    context.fire("move")
    if context.look_ahead:
        context.look_ahead.idle()  # the rows are this thread's alone
    owned, twins = roles_of(context.group.rank, context.moving.at(step))
    for moves in chunks:
        carry_out(context, tables, moves)
        # only when all of a chunk is here does this member stand by with it
        coming = {bucket for bucket, _, to in moves if to == context.group.rank}
        tables.owned = tuple(sorted({*tables.owned, *coming.intersection(owned)}))
        tables.twins = tuple(sorted({*tables.twins, *coming.intersection(twins)}))
    tables.next = owned, twins
    context.moving_s += time.perf_counter() - started
    if context.moving.is_last(step):
        tell(context)


def carry_out(context: StepContext, tables: HeldTables, moves: Sequence[Move]) -> None:
    rank, group = context.group.rank, context.groups.world
    parts = [[array for bucket, *ends in moves if ends == [rank, to] for array in exported(tables, bucket)]
             for to in range(group.size)]
    context.sent += sum(array.nbytes for part in parts for array in part)
    tables.take(bucket for bucket, _, to in moves if to == rank)
    with context.waiting("move", group) as cut:
        received = exchange(cut, parts)
    for part in received:
        tables.load(rows_of(part))


def exported(tables: HeldTables, bucket: int) -> list[np.ndarray]:
    """All tables' rows of it; `rows_of` finds them again."""
    return [array for spec in tables.specs for array in tables.stores[spec.name].export(bucket).arrays]


def tell(context: StepContext) -> None:
    """All moves are done: the controller may let those go who were there to hand over."""
    total = context.gather("move", np.array([float(context.sent)])).sum()
    generation = context.generation
    if context.group.rank == 0 and generation.buckets:
        context.member.post(Moved(generation.members[0], generation.number, context.step - 1, len(generation.buckets.moves),
                                  int(total), context.moving_s, len(context.moving.rounds)))


def rows_of(arrays: Sequence[np.ndarray]) -> list[Rows]:
    """What one member has sent, from what it is sent as."""
    each = len(fields(Rows))
    return [Rows(*arrays[at:at + each]) for at in range(0, len(arrays), each)]
