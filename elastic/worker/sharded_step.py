"""A step of workers that each own a stretch of the optimizer's state: what differs from one in which everybody updates everything.

Everybody gets the reduced gradient of what it keeps and updates that; then owners give their parameters to the others. Who falls before
has a twin that made the same update. `elastic.state.holding` says what is kept, `elastic.state.resharding` how it moves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic.boxes import size_of
from elastic.chaos import Injector
from elastic.collective.group import CollectiveGroup
from elastic.collective.reduction import gather_owned, out_size, reduce, reduce_kept
from elastic.messages import Generation, Line
from elastic.model.backend import Buffer
from elastic.parallel.groups import Links
from elastic.state.flat_layout import BLOCK
from elastic.state.ownership import by_twins
from elastic.state.resharding import Resharding, plan, reshard
from elastic.state.state import State
from elastic.worker.gradients import Buffers, PlainSum, sum_shared

if TYPE_CHECKING:
    from elastic.worker.loop import Work


def reduce_own(work: Work, state: State, links: Links, group: CollectiveGroup, buffers: Buffers, sums: Any) -> Buffer:
    """The sum over all shards of what this member keeps, and of the statistics."""
    layout, tail, num_shards = state.layout, state.tail, work.plan.num_shards
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
        take_kept(state, out, plain, 0, layout.trainable)
        out[tail:tail + statistics] = plain[layout.trainable:layout.gradient]
    else:
        reduce_kept(group, sums.nodes(), num_shards, out[:tail], state.holding.cuts, state.twin, buffers.scratch)
        if statistics:
            rest = [(node, buffer[layout.trainable:]) for node, buffer in sums.nodes()]
            reduce(group, rest, num_shards, out[tail:], statistics, BLOCK, buffers.scratch)
    for axis, names in links.shared:
        for place in (layout.places[name] for name in names if name in layout.trainable_set):
            if plain is not None:
                whole = plain[place.offset:place.offset + place.size]
            else:  # the members of one replica keep other stretches of it: all get all
                parts = [(node, buffer[place.offset:place.offset + place.size]) for node, buffer in sums.nodes()]
                space = work.backend.allocate(out_size(place.size, BLOCK, group.size))
                whole = reduce(group, parts, num_shards, space, place.size, BLOCK, buffers.scratch)[:place.size]
            take_kept(state, out, axis.sum(whole), place.offset, place.offset + place.size)
    return out


def take_kept(state: State, out: Buffer, values: Buffer, low: int, high: int) -> None:
    """Of `values`, the elements low..high-1, what is kept."""
    for first, last, at in state.runs(low, high):
        out[at:at + last - first] = values[first - low:last - low]


def block_norms(work: Work, state: State, links: Links) -> np.ndarray:
    """The squared norm of every block of the reduced gradient, each from its owner."""
    cuts = [cut // BLOCK for cut in state.holding.cuts]
    counts = [high - low for low, high in zip(cuts, cuts[1:])]
    most, mine = max(counts), counts[links.data.rank]
    part, out = np.zeros(most), np.empty(most * links.data.size)
    assert work.gradient is not None
    if mine:
        part[:mine] = work.backend.squared_norms(work.gradient[:mine * BLOCK], BLOCK)
    links.data.all_gather(out, part)
    return np.concatenate([row[:count] for row, count in zip(out.reshape(-1, most), counts, strict=True)])


def share(work: Work, links: Links, buffers: Buffers, step: int, injector: Injector) -> None:
    """After a commit, owners give the parameters that they have updated to the others."""
    state = work.state
    if not state.is_sharded or links.data.size == 1 or (state.twin and links.data.size == 2):
        return
    group = injector.cut(links.data, step, "gather")
    with work.control.collective(step, "gather"):
        gather_owned(group, state.param, state.holding.cuts, buffers.scratch)
    state.torn = False


def bring(work: Work, state: State, generation: Generation, links: Links, injector: Injector) -> None:
    """Every member gets what it is to keep, and all parameters, from whoever keeps them."""
    group, mesh, step, seat = links.world, links.mesh, generation.committed, links.replica.rank
    found = [plan_of(state, generation, mesh.line(place, "data"), place == seat) for place in range(mesh.replica_size)]
    moved = sum(move.size for one in found for move in one.slots)
    if generation.healers or moved:
        injector.at(step + 1, "heal")
    started, statistics = time.perf_counter(), 0

    def watch() -> Any:
        return work.control.collective(step, "heal")

    for source, healed in generation.healers:
        if group.rank in (source, *healed):
            with watch():
                statistics = state.heal(group.subgroup([source, *healed]), 0, step)
    reshard(state, links.data, found[seat], step, watch)
    seconds, block = time.perf_counter() - started, 4 * BLOCK
    for source, healed in generation.healers:
        if group.rank == source:
            to = mesh.seat(healed[0]).data
            came = [len(state.slots) * move.size for move in found[seat].slots if move.to == to] + [m.size for m in found[seat].params if m.to == to]
            tell(work, generation, "healed", **{"from": generation.members[source], "to": [generation.members[r] for r in healed],
                                                "bytes": statistics + sum(came) * block, "seconds": seconds})
    if group.rank == 0:
        blocks = sum(size_of(by_twins(one.have)) for one in found)
        if blocks:
            tell(work, generation, "twin_used", blocks=blocks)
        if moved:
            tell(work, generation, "optimizer_resharded", bytes=moved * len(state.slots) * block, seconds=seconds)


def plan_of(state: State, generation: Generation, ranks: Sequence[int], is_own: bool) -> Resharding:
    """For the members at `ranks`, who sit on one seat of as many replicas."""
    have = [generation.kept[rank] for rank in ranks]
    torn = [place for place, rank in enumerate(ranks) if rank in generation.torn]
    num_blocks = state.num_blocks if is_own else max(high for stretches in have for _, high in stretches)
    frozen = (state.layout.size - state.layout.trainable) // BLOCK if is_own else 0  # how others' parameters travel is theirs to know
    return plan(have, torn, state.twin, num_blocks, frozen)


def tell(work: Work, generation: Generation, event: str, **fields: Any) -> None:
    work.post(Line(generation.number, "events", {"event": event, "step": generation.committed, **fields}))
