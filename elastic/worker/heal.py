"""How every member comes by the state of its coordinate when a generation begins: from whoever holds it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from elastic.boxes import size_of
from elastic.messages import Generation
from elastic.state.flat_layout import BLOCK
from elastic.state.ownership import by_twins
from elastic.state.resharding import Resharding, plan, reshard
from elastic.state.state import State
from elastic.worker.context import StepContext


def heal(context: StepContext) -> None:
    """A source sends its state to the members of its coordinate that have none; of a sharded optimizer's each then gets
    what it is to hold, and all parameters. Who has nothing to do with it goes on to the first collective and waits
    there.
    """
    generation, state, groups, step = context.generation, context.state, context.groups, context.step
    group, mesh, coordinate = groups.world, groups.mesh, groups.replica.rank
    event, found = partial(context.member.event, generation), list[Resharding]()
    sharded = state if state.is_sharded and not generation.load else None
    if sharded:
        found = [plan_of(sharded, generation, mesh.axis_ranks(place, "data"), place == coordinate)
                 for place in range(mesh.replica_size)]
    moved = sum(move.size for one in found for move in one.slots)
    if generation.healers or moved:
        context.injector.at(step + 1, "heal")
    started, received = time.perf_counter(), 0
    for source, healed in generation.healers:
        if group.rank in (source, *healed):
            with context.waiting("heal"):
                received = state.heal(group.subgroup([source, *healed]), 0, step)
    if sharded:
        reshard(sharded, groups.data, found[coordinate], step, partial(context.waiting, "heal"))
    seconds, block = time.perf_counter() - started, 4 * BLOCK
    for source, healed in generation.healers:
        if group.rank == source:
            to = mesh.coordinate(healed[0]).data
            came = sum(len(state.slots) * move.size for one in found[coordinate:coordinate + 1] for move in one.slots
                       if move.to == to)
            came += sum(move.size for one in found[coordinate:coordinate + 1] for move in one.params if move.to == to)
            event("healed", **{"from": generation.members[source], "to": [generation.members[r] for r in healed],
                               "bytes": received + came * block, "seconds": seconds})
    if group.rank == 0:
        blocks = sum(size_of(by_twins(one.have)) for one in found)
        if blocks:
            event("twin_used", blocks=blocks)
        if moved:
            event("optimizer_resharded", bytes=moved * len(state.slots) * block, seconds=seconds)


def plan_of(state: State, generation: Generation, ranks: Sequence[int], is_own: bool) -> Resharding:
    """For the members at `ranks`, who are on one coordinate of as many replicas."""
    have = [generation.held[rank] for rank in ranks]
    torn = [place for place, rank in enumerate(ranks) if rank in generation.torn]
    num_blocks = state.num_blocks if is_own else max(high for ranges in have for _, high in ranges)
    # how others' parameters travel is theirs to know
    frozen = (state.layout.size - state.layout.trainable) // BLOCK if is_own else 0
    return plan(have, torn, state.twin, num_blocks, frozen)
