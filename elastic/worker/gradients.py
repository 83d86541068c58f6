"""The gradients of one member's logical shards, added along the canonical tree: a shard at a time, or through a pipeline of stages.

Over the members they are reduced by `elastic.collective.reduction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from elastic.buffers import empty_like
from elastic.collective.reduction import SubtreeSums
from elastic.data.collate import num_rows, sliced
from elastic.model.backend import Batch, Buffer, ShardResult
from elastic.model.user_code import users
from elastic.parallel.axis import span
from elastic.parallel.groups import MeshGroups
from elastic.state.flat_layout import FlatLayout
from elastic.worker.context import StepContext
from elastic.worker.embedding import TableStep


class Shards:
    """A member's logical shards in one step: the sums of their gradients along the tree (`sums`) or, for `reduction =
    "fast"`, in its own order (`plain`), and each shard's loss sum and weight, as far as it is to say them.
    """

    def __init__(self, context: StepContext):
        plan, buffers = context.plan, context.buffers
        buffers.reset()
        self.context, self.run, self.layout = context, context.run, context.state.layout
        apart = context.place.habits.apart or plan.micro_batches > 1
        self.sums = SubtreeSums(self.run, plan.num_shards, buffers.take, buffers.give, apart) if plan.exact else None
        self.plain = None if plan.exact else buffers.take()
        self.losses, self.weights = np.zeros(plan.num_shards), np.zeros(plan.num_shards)
        self.tables = TableStep(context) if context.tables else None
        self.loaded = -1
        self.batch: Batch = {}
        self.buffer: Buffer = None

    def compute(self) -> None:
        """A shard at a time, by a member that has the whole depth of the model."""
        backend, state = self.context.backend, self.context.state
        for shard in self.run:
            into = self.begin(shard)
            with users(self.context.training.is_own):
                for micro in range(self.context.plan.micro_batches):
                    result = backend.gradients(*self.rows(shard, micro), into)
                    if result.buffers:
                        state.add_statistics(self.buffer, result.buffers, result.weight)
                    self.add(shard, result)
            if self.tables:
                self.tables.add(shard, result.slopes)
            self.end(shard)

    def rows(self, shard: int, micro: int) -> tuple[Batch, int]:
        """This member's rows of one micro-batch, and a counter-based seed for whatever is random in it."""
        context, groups, each = self.context, self.context.groups, self.context.plan.micro_batches
        parts, part = groups.mesh.expert * each, groups.coordinate.expert * each + micro
        if shard != self.loaded:
            context.at("forward", shard)
            context.fire("forward")
            self.batch = {}  # not two at a time
            with users(context.training.is_own):
                load = self.tables.take if self.tables else partial(context.training.load_batch, context.step)
                self.batch, self.loaded = load(shard), shard
        return part_of(self.batch, parts, part), shard_seed(context.plan.seed, context.step, shard,
                                                            *([part] if parts > 1 else []))

    def begin(self, shard: int) -> Mapping[str, Buffer]:
        """Where a shard's gradients go."""
        self.buffer = self.sums.begin(shard) if self.sums else self.plain
        return self.layout.views(self.buffer, self.layout.trainable_names)

    def add(self, shard: int, result: ShardResult) -> None:
        """One micro-batch's loss; they come in order."""
        if self.context.groups.reports_losses:
            self.losses[shard] += result.loss_sum
            self.weights[shard] += result.weight

    def end(self, shard: int) -> None:
        if self.sums:
            self.sums.end(shard)
        self.context.fire("backward")


def add_up_shards(context: StepContext) -> Shards:
    shards, pipeline = Shards(context), context.place.pipeline
    if pipeline is None:
        shards.compute()
    else:
        pipeline.run(context.groups.pipeline, shards)
    shards.batch = {}  # the rest of the step needs no rows
    return shards


def sum_shared(groups: MeshGroups, layout: FlatLayout, gradient: Buffer) -> None:
    """Parameters that several members of a replica hold, each of which has found a part of the gradient: in rank order,
    the same for all."""
    for axis, names in groups.shared:
        places = [layout.places[name] for name in names if name in layout.trainable_set]
        if not places:
            continue
        ends = np.cumsum([place.size for place in places]).tolist()
        runs = [(slice(end - place.size, end), slice(place.offset, place.offset + place.size))
                for place, end in zip(places, ends)]
        packed = empty_like(gradient, ends[-1])
        for here, there in runs:
            packed[here] = gradient[there]
        total = axis.sum(packed)
        for here, there in runs:
            gradient[there] = total[here]


def part_of(batch: Batch, parts: int, part: int) -> Batch:
    """A part of a batch's rows: of a shard, a micro-batch is one on each member along the expert axis."""
    if parts == 1:
        return batch
    low, count = span(num_rows(batch), parts, part)
    return sliced(batch, low, low + count)


def shard_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
