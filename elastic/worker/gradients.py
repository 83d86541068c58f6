"""The gradients of one member's logical shards, added along the canonical tree: a shard at a time, or through a pipeline of stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic.buffers import empty_like
from elastic.chaos import Injector
from elastic.collective.group import CollectiveGroup
from elastic.collective.reduction import Scratch, SubtreeSums, out_size
from elastic.data.collate import num_rows, sliced
from elastic.mesh import shards_of
from elastic.model.backend import Buffer, ShardResult
from elastic.model.user_code import users
from elastic.parallel.axis import span
from elastic.parallel.groups import Links
from elastic.parallel.pipeline import Pipeline, Shards
from elastic.state.flat_layout import BLOCK, FlatLayout

if TYPE_CHECKING:
    from elastic.worker.loop import Work


class Buffers:
    """One generation's communication buffers. A broken group's are never used again: a stopped peer may still write to them."""

    def __init__(self, work: Work, group: CollectiveGroup):
        allocate = getattr(group, "allocate", work.backend.allocate)
        self.layout = work.state.layout
        self.numel = self.layout.gradient
        state, rest = work.state, self.numel - self.layout.trainable
        size = state.tail + out_size(rest, BLOCK, group.size) if state.num_blocks else out_size(self.numel, BLOCK, group.size)
        self.out = allocate(size) if group.size > 1 else None
        self.scratch = Scratch(work.backend.allocate)
        self._allocate = allocate
        self._all: list[Buffer] = []
        self._free: list[Buffer] = []

    def reset(self) -> None:
        self._free = list(self._all)

    def take(self) -> Buffer:
        """A zeroed buffer for gradients."""
        if not self._free:
            self._all.append(self._allocate(self.numel))
            return self._all[-1]
        buffer = self._free.pop()
        buffer[:] = 0
        return buffer

    def give(self, buffer: Buffer) -> None:
        self._free.append(buffer)


class PlainSum:
    """For `reduction = "fast"`: all shards of a member in one buffer, in its own order."""

    def __init__(self, take: Callable[[], Buffer]):
        self.buffer = take()

    def begin(self, shard: int) -> Buffer:
        return self.buffer

    def end(self, shard: int) -> None:
        return None


@dataclass
class Found:
    """What a member's shards gave: `sums` of gradients, and each shard's loss sum and weight as far as this member is to say them."""

    sums: Any
    losses: dict[int, float] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)

    def add(self, shard: int, result: ShardResult) -> None:
        """One micro-batch; they come in order."""
        self.losses[shard] = self.losses.get(shard, 0.0) + result.loss_sum
        self.weights[shard] = self.weights.get(shard, 0.0) + result.weight


def add_up_shards(work: Work, links: Links, buffers: Buffers, step: int, injector: Injector) -> Found:
    """The gradients of this member's shards, added along the tree; the losses of those shards, if it is the one to say them."""
    run = shards_of(links.data.rank, links.data.size, work.plan.num_shards)
    buffers.reset()
    several = work.apart or work.plan.micro_batches > 1
    found = Found(SubtreeSums(run, work.plan.num_shards, buffers.take, buffers.give, several) if work.plan.exact else PlainSum(buffers.take))
    if work.pipeline is not None:
        through_stages(work, work.pipeline, links, buffers, found, run, step, injector)
    else:
        for shard in run:
            one_shard(work, links, buffers, found, step, shard, injector)
    if not links.speaks:
        found.losses, found.weights = {}, {}
    return found


def one_shard(work: Work, links: Links, buffers: Buffers, found: Found, step: int, shard: int, injector: Injector) -> None:
    work.control.at(step, "forward", shard)
    injector.at(step, "forward")
    buffer = found.sums.begin(shard)
    views = buffers.layout.views(buffer, buffers.layout.trainable_names)
    with users(work.is_own):
        batch = work.load_batch(step, shard)
        for micro in range(work.plan.micro_batches):
            rows = rows_of(batch, links, micro, work.plan.micro_batches)
            result = work.backend.gradients(rows, micro_seed(work, links, step, shard, micro), views)
            if result.buffers:
                work.state.add_statistics(buffer, result.buffers, result.weight)
            found.add(shard, result)
    found.sums.end(shard)
    injector.at(step, "backward")


def through_stages(work: Work, pipeline: Pipeline, links: Links, buffers: Buffers, found: Found, run: range, step: int,
                   injector: Injector) -> None:
    """This member's stage of all its shards."""
    each = work.plan.micro_batches
    loaded: dict[int, Mapping[str, Any]] = {}

    def rows(number: int) -> tuple[Mapping[str, Any], int]:
        shard, micro = run[number // each], number % each
        if shard not in loaded:
            work.control.at(step, "forward", shard)
            injector.at(step, "forward")
            loaded.clear()
            loaded[shard] = work.load_batch(step, shard)
        return rows_of(loaded[shard], links, micro, each), micro_seed(work, links, step, shard, micro)

    def begin(index: int) -> Mapping[str, Buffer]:
        return buffers.layout.views(found.sums.begin(run[index]), buffers.layout.trainable_names)

    def end(index: int) -> None:
        found.sums.end(run[index])
        injector.at(step, "backward")

    pipeline.run(links.pipeline, run, Shards(rows, begin, end, lambda number, result: found.add(run[number // each], result)))


def sum_shared(links: Links, layout: FlatLayout, gradient: Buffer) -> None:
    """Parameters that several members of a replica hold, each of which has found a part of the gradient: in rank order, the same for all."""
    for axis, names in links.shared:
        places = [layout.places[name] for name in names if name in layout.trainable_set]
        if not places:
            continue
        packed = empty_like(gradient, sum(place.size for place in places))
        at = 0
        for place in places:
            packed[at:at + place.size] = gradient[place.offset:place.offset + place.size]
            at += place.size
        total, at = axis.sum(packed), 0
        for place in places:
            gradient[place.offset:place.offset + place.size] = total[at:at + place.size]
            at += place.size


def rows_of(batch: Mapping[str, Any], links: Links, micro: int, micro_batches: int) -> Mapping[str, Any]:
    """This member's rows of one micro-batch: the members along the expert axis share a shard's rows."""
    parts = links.mesh.expert * micro_batches
    if parts == 1:
        return batch
    low, count = span(num_rows(batch), parts, links.seat.expert * micro_batches + micro)
    return sliced(batch, low, low + count)


def micro_seed(work: Work, links: Links, step: int, shard: int, micro: int) -> int:
    """A counter-based seed for whatever is random in one micro-batch of one shard of one step."""
    place = links.seat.expert * work.plan.micro_batches + micro
    return shard_seed(work.plan.seed, step, shard, *([place] if links.mesh.expert * work.plan.micro_batches > 1 else []))


def shard_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
