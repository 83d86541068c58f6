"""A step of workers that each own a range of the optimizer's state: what differs from one in which everybody updates everything.

Everybody gets the reduced gradient of what it holds and updates that; then owners give their parameters to the others. Who falls before
has a twin that made the same update. `elastic.state.holding` says what is held, `elastic.state.resharding` how it moves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from elastic.boxes import size_of
from elastic.collective.group import CollectiveGroup
from elastic.collective.reduction import gather_owned, out_size
from elastic.messages import Generation
from elastic.model.backend import Buffer
from elastic.state.flat_layout import BLOCK
from elastic.state.ownership import by_twins
from elastic.state.resharding import Resharding, plan, reshard
from elastic.state.state import State
from elastic.worker.context import StepContext
from elastic.worker.gradients import PlainSum, sum_shared


def reduce_own(context: StepContext, state: State, group: CollectiveGroup, sums: Any) -> Buffer:
    """The sum over all shards of what this member holds, and of the statistics."""
    layout, tail, num_shards, buffers, links = state.layout, state.tail, context.plan.num_shards, context.buffers, context.links
    plain = sums.buffer if isinstance(sums, PlainSum) else None
    if plain is not None:
        group.all_reduce(plain)
    if group.size == 1:
        gradient = sums.nodes()[0][1] if plain is None else plain
        sum_shared(links, layout, gradient)
        return gradient
    out, statistics = buffers.out, layout.gradient - layout.trainable
    assert out is not None
    if plain is not None:
        take_held(state, out, plain, 0, layout.trainable)
        out[tail:tail + statistics] = plain[layout.trainable:layout.gradient]
    else:
        group.reduce_kept(sums.nodes(), num_shards, out[:tail], state.cuts, state.twin, buffers.scratch)
        if statistics:
            rest = [(node, buffer[layout.trainable:]) for node, buffer in sums.nodes()]
            group.reduce_tree(rest, num_shards, out[tail:], statistics, BLOCK, buffers.scratch)
    for axis, names in links.shared:
        for place in (layout.places[name] for name in names if name in layout.trainable_set):
            if plain is not None:
                whole = plain[place.offset:place.offset + place.size]
            else:  # the members of one replica hold other ranges of it: all get all
                parts = [(node, buffer[place.offset:place.offset + place.size]) for node, buffer in sums.nodes()]
                space = context.backend.allocate(out_size(place.size, BLOCK, group.size))
                whole = group.reduce_tree(parts, num_shards, space, place.size, BLOCK, buffers.scratch)[:place.size]
            take_held(state, out, axis.sum(whole), place.offset, place.offset + place.size)
    return out


def take_held(state: State, out: Buffer, values: Buffer, low: int, high: int) -> None:
    """Of `values`, the elements low..high-1, what is held."""
    for first, last, at in state.runs(low, high):
        out[at:at + last - first] = values[first - low:last - low]


def block_norms(context: StepContext, state: State, gradient: Buffer) -> np.ndarray:
    """The squared norm of every block of the reduced gradient, of which each owner has its own."""
    group, cuts = context.links.data, [cut // BLOCK for cut in state.cuts]
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
    state, data = context.state, context.links.data
    if state.is_sharded and data.size > 1 and not (state.twin and data.size == 2):
        with context.waiting("gather", data) as group:
            gather_owned(group, state.param, state.cuts, context.buffers.scratch)
        state.torn = False


def bring(context: StepContext, state: State) -> None:
    """Every member gets what it is to hold, and all parameters, from whoever holds them."""
    generation, links, step = context.generation, context.links, context.step
    group, mesh, seat = links.world, links.mesh, links.replica.rank
    found = [plan_of(state, generation, mesh.line(place, "data"), place == seat) for place in range(mesh.replica_size)]
    moved = sum(move.size for one in found for move in one.slots)
    if generation.healers or moved:
        context.injector.at(step + 1, "heal")
    started, statistics = time.perf_counter(), 0
    for source, healed in generation.healers:
        if group.rank in (source, *healed):
            with context.waiting("heal"):
                statistics = state.heal(group.subgroup([source, *healed]), 0, step)
    reshard(state, links.data, found[seat], step, partial(context.waiting, "heal"))
    seconds, block, event = time.perf_counter() - started, 4 * BLOCK, partial(context.member.event, generation)
    for source, healed in generation.healers:
        if group.rank == source:
            to = mesh.seat(healed[0]).data
            came = [len(state.slots) * move.size for move in found[seat].slots if move.to == to] + [m.size for m in found[seat].params if m.to == to]
            event("healed", **{"from": generation.members[source], "to": [generation.members[r] for r in healed],
                               "bytes": statistics + sum(came) * block, "seconds": seconds})
    if group.rank == 0:
        blocks = sum(size_of(by_twins(one.have)) for one in found)
        if blocks:
            event("twin_used", blocks=blocks)
        if moved:
            event("optimizer_resharded", bytes=moved * len(state.slots) * block, seconds=seconds)


def plan_of(state: State, generation: Generation, ranks: Sequence[int], is_own: bool) -> Resharding:
    """For the members at `ranks`, who are on one coordinate of as many replicas."""
    have = [generation.kept[rank] for rank in ranks]
    torn = [place for place, rank in enumerate(ranks) if rank in generation.torn]
    num_blocks = state.num_blocks if is_own else max(high for ranges in have for _, high in ranges)
    frozen = (state.layout.size - state.layout.trainable) // BLOCK if is_own else 0  # how others' parameters travel is theirs to know
    return plan(have, torn, state.twin, num_blocks, frozen)
