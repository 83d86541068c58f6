"""The optimizer's state on its way from old keepers to new ones, and parameters to those that lack them, when a generation begins.

Everybody computes the same from who has what. Until all have what they are to keep, nobody gives up what it kept: whoever is
lost on the way, it is as if the move had not begun, or had been done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from elastic.collective.group import CollectiveGroup
from elastic.model.backend import Buffer
from elastic.state.flat_layout import BLOCK
from elastic.state.ownership import Move, Stretch, kept, moves, rounds
from elastic.state.sharded import ShardedState

GRAIN = 64  # blocks that one member sends another in one piece
ROUND = 256  # blocks that travel at a time, of all members together: bounds the buffers

Take = Callable[[int, int], Buffer]  # elements low..high-1
Put = Callable[[int, int, Buffer], None]


@dataclass(frozen=True)
class Resharding:
    """What one seat's members have and have to get, in blocks. `have` is () for who has no state."""

    have: tuple[tuple[Stretch, ...], ...]
    want: tuple[tuple[Stretch, ...], ...]
    slots: tuple[Move, ...]
    params: tuple[Move, ...]


def plan(have: Sequence[Sequence[Stretch]], torn: Collection[int], twin: bool, num_blocks: int, num_frozen: int) -> Resharding:
    """`torn`: who has only what it keeps, and what is frozen (blocks behind `num_blocks`), of the parameters at the step that counts."""
    size, total = len(have), num_blocks + num_frozen
    want = tuple(kept(rank, size, num_blocks, twin) for rank in range(size))
    params: list[list[Stretch]] = []
    for rank, stretches in enumerate(have):
        params.append([] if not stretches else [*stretches, (num_blocks, total)] if rank in torn else [(0, total)])
    return Resharding(tuple(tuple(stretches) for stretches in have), want, tuple(moves(have, want, GRAIN)),
                      tuple(moves(params, [[(0, total)]] * size, GRAIN)))


def reshard(state: ShardedState, group: CollectiveGroup, found: Resharding, committed: int,
            watch: Callable[[], AbstractContextManager[Any]]) -> None:
    """Carries a plan out, to the end that this member is whole at step `committed`. `group`: the members of this seat.

    `watch()` surrounds each exchange.
    """
    rank, store = group.rank, state.store
    if found.have[rank] != found.want[rank]:
        store = state.make(rank, group.size)
        if found.have[rank]:
            keep_own(state, store.slots, store.stretches, found.have[rank])

    for slot in sorted(store.slots):
        carry(state, group, found.slots, partial(state.find, slot), partial(store.put, slot), watch)

    def put_parameters(low: int, high: int, values: Buffer) -> None:
        state.param[low:high] = values

    carry(state, group, found.params, lambda low, high: state.param[low:high], put_parameters, watch)
    state.spare, state.committed, state.torn = store, committed, False
    if found.slots or found.params:
        with watch():
            group.barrier()
    state.hold(store, rank, group.size)


def keep_own(state: ShardedState, slots: dict[str, Buffer], stretches: Sequence[Stretch], have: Sequence[Stretch]) -> None:
    """What stays where it is."""
    at = 0
    for low, high in stretches:
        for begin, end in have:
            first, last = max(low, begin * BLOCK), min(high, end * BLOCK)
            if first < last:
                for slot, buffer in slots.items():
                    buffer[at + first - low:at + last - low] = state.find(slot, first, last)
        at += high - low


def carry(state: ShardedState, group: CollectiveGroup, plan: Sequence[Move], take: Take, put: Put,
          watch: Callable[[], AbstractContextManager[Any]]) -> None:
    """Sends and receives this member's part of some moves, a few at a time."""
    for some in rounds(plan, ROUND):
        sent = sorted((move for move in some if move.source == group.rank), key=lambda move: move.to)
        due = sorted((move for move in some if move.to == group.rank), key=lambda move: move.source)
        counts = [BLOCK * sum(move.size for move in sent if move.to == rank) for rank in range(group.size)]
        out_counts = [BLOCK * sum(move.size for move in due if move.source == rank) for rank in range(group.size)]
        buffer, received = (state.backend.allocate(max(1, sum(some)))[:sum(some)] for some in (counts, out_counts))
        at = 0
        for move in sent:
            buffer[at:at + BLOCK * move.size] = take(BLOCK * move.low, BLOCK * move.high)
            at += BLOCK * move.size
        with watch():
            group.all_to_all(received, out_counts, buffer, counts)
        at = 0
        for move in due:
            put(BLOCK * move.low, BLOCK * move.high, received[at:at + BLOCK * move.size])
            at += BLOCK * move.size
