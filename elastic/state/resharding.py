"""A sharded optimizer's state on its way from old holders to new ones, and parameters to those that lack them, when a generation begins.

Everybody computes the same from who has what. Until all have what they are to hold, nobody gives up what it held:
whoever is lost on the way, it is as if the move had not begun, or had been done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from elastic.boxes import Range, scaled
from elastic.buffers import fill
from elastic.collective.group import CollectiveGroup
from elastic.model.backend import Buffer
from elastic.state.exchange import exchange
from elastic.state.flat_layout import BLOCK
from elastic.state.ownership import Transfer, held, moves, rounds
from elastic.state.state import State

GRAIN = 64  # blocks that one member sends another in one piece
ROUND = 256  # blocks that travel at a time, of all members together: bounds the buffers


@dataclass(frozen=True)
class Resharding:
    """What one coordinate's members have and have to get, in blocks. `have` is () for who has no state."""

    have: tuple[tuple[Range, ...], ...]
    want: tuple[tuple[Range, ...], ...]
    slots: tuple[Transfer, ...]
    params: tuple[Transfer, ...]


def plan(have: Sequence[Sequence[Range]], torn: Collection[int], twin: bool, num_blocks: int,
         num_frozen: int) -> Resharding:
    """`torn`: who has only what it holds, and what is frozen (blocks behind `num_blocks`), of the parameters at the
    step that counts."""
    size, total = len(have), num_blocks + num_frozen
    want = tuple(held(rank, size, num_blocks, twin) for rank in range(size))
    params: list[list[Range]] = []
    for rank, ranges in enumerate(have):
        params.append([] if not ranges else [*ranges, (num_blocks, total)] if rank in torn else [(0, total)])
    return Resharding(tuple(tuple(ranges) for ranges in have), want, tuple(moves(have, want, GRAIN)),
                      tuple(moves(params, [[(0, total)]] * size, GRAIN)))


def reshard(state: State, group: CollectiveGroup, found: Resharding, committed: int,
            watch: Callable[[], AbstractContextManager[Any]]) -> None:
    """Carries a plan out, to the end that this member is whole at step `committed`. `group`: the members of this
    coordinate.

    `watch()` surrounds each exchange.
    """
    rank, holding, store = group.rank, state.holding, state.holding.store
    if found.have[rank] != found.want[rank]:
        store = holding.make(rank, group.size)
        for have in scaled(found.have[rank], BLOCK):  # what stays where it is
            for low, high, _ in store.runs(*have):
                for slot in store.slots:
                    store.put(slot, low, high, holding.find(slot, low, high))

    def empty(size: int) -> Buffer:
        return state.backend.allocate(max(1, size))[:size]

    def carry(plan: Sequence[Transfer], give: Callable[[int, int], Buffer],
              take: Callable[[int, int, Buffer], None]) -> None:
        """A few moves at a time. `give` and `take` have them in elements."""
        for some in rounds(plan, ROUND):
            exchange(group, some, lambda move: give(BLOCK * move.low, BLOCK * move.high),
                     lambda move, values: take(BLOCK * move.low, BLOCK * move.high, values), empty, BLOCK, watch)

    for slot in sorted(store.slots):
        carry(found.slots, partial(holding.find, slot), partial(store.put, slot))

    carry(found.params, lambda low, high: state.param[low:high], lambda low, high,
          values: fill(state.param[low:high], values))
    holding.spare, state.committed, state.torn = store, committed, False
    if found.slots or found.params:
        with watch():
            group.barrier()
    holding.hold(store, group.size)
