"""A step of workers that each own a range of the optimizer's state: what differs from one in which everybody updates everything.

Everybody gets the reduced gradient of what it holds and updates that; then owners give their parameters to the others.
Who falls before has a twin that made the same update. `elastic.state.holding` says what is held,
`elastic.state.resharding` how it moves.
"""

from __future__ import annotations

import numpy as np

from elastic.collective.group import CollectiveGroup
from elastic.collective.reduction import gather_owned, out_size
from elastic.model.backend import Buffer
from elastic.state.flat_layout import BLOCK
from elastic.state.state import State
from elastic.worker.context import StepContext
from elastic.worker.gradients import Shards


def reduce_own(context: StepContext, state: State, group: CollectiveGroup, shards: Shards) -> Buffer:
    """The sum over all shards of what this member holds, and of the statistics, in a group of several."""
    layout, tail, num_shards, buffers, groups = state.layout, state.holding.store.size, context.plan.num_shards, context.buffers, context.groups
    out, statistics, plain = buffers.out, layout.gradient - layout.trainable, shards.plain
    nodes = shards.sums.nodes() if shards.sums else []
    assert out is not None
    if plain is not None:
        group.all_reduce(plain)
        take_held(state, out, plain, 0, layout.trainable)
        out[tail:tail + statistics] = plain[layout.trainable:layout.gradient]
    else:
        group.reduce_held(nodes, num_shards, out[:tail], state.holding.cuts, state.twin, buffers.scratch)
        if statistics:
            rest = [(node, buffer[layout.trainable:]) for node, buffer in nodes]
            group.reduce_tree(rest, num_shards, out[tail:], statistics, BLOCK, buffers.scratch)
    for axis, names in groups.shared:
        for place in (layout.places[name] for name in names if name in layout.trainable_set):
            if plain is not None:
                whole = plain[place.offset:place.offset + place.size]
            else:  # the members of one replica hold other ranges of it: all get all
                parts = [(node, buffer[place.offset:place.offset + place.size]) for node, buffer in nodes]
                space = context.backend.allocate(out_size(place.size, BLOCK, group.size))
                whole = group.reduce_tree(parts, num_shards, space, place.size, BLOCK, buffers.scratch)[:place.size]
            take_held(state, out, axis.sum(whole), place.offset, place.offset + place.size)
    return out


def take_held(state: State, out: Buffer, values: Buffer, low: int, high: int) -> None:
    """Of `values`, the elements low..high-1, what is held."""
    for first, last, at in state.holding.store.runs(low, high):
        out[at:at + last - first] = values[first - low:last - low]


def block_norms(context: StepContext, state: State, gradient: Buffer) -> np.ndarray:
    """The squared norm of every block of the reduced gradient, of which each owner has its own."""
    group, cuts = context.groups.data, [cut // BLOCK for cut in state.holding.cuts]
    counts = [high - low for low, high in zip(cuts, cuts[1:])]
    most, mine = max(counts), counts[group.rank]
    part, out = np.zeros(most), np.empty(most * group.size)
    with context.waiting("vote"):
        if mine:
            part[:mine] = context.backend.squared_norms(gradient[:mine * BLOCK], BLOCK)
        group.all_gather(out, part)
    return np.concatenate([row[:count] for row, count in zip(out.reshape(-1, most), counts, strict=True)])


def share(context: StepContext) -> None:
    """After a commit, owners give the parameters that they have updated to the others."""
    state, data = context.state, context.groups.data
    if state.is_sharded and data.size > 1 and not (state.twin and data.size == 2):
        with context.waiting("gather", data) as group:
            gather_owned(group, state.param, state.holding.cuts, context.buffers.scratch)
        state.torn = False
