"""A worker's stage at work: all micro-batches of its replica's shards through its chunks of the model, by a schedule.

One schedule runs over all shards of a step, so a pipeline fills and empties once a step; the interleaved one, whose chunks pass
from shard to shard at different times, runs shard by shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.collective.group import CollectiveGroup
from elastic.model.backend import Backend, Batch, Buffer, ShardResult
from elastic.model.shape_ops import MeterOps, Shape
from elastic.parallel.executor import Executor
from elastic.parallel.layout import Portion
from elastic.parallel.schedules import build


@dataclass(frozen=True)
class Shards:
    """What a stage needs of a step, by the shard's place in the run or by micro-batch of the step."""

    rows: Callable[[int], tuple[Batch, int]]  # of a micro-batch: this worker's rows and the seed
    begin: Callable[[int], Mapping[str, Buffer]]  # of a shard: where its gradients go, zeros
    end: Callable[[int], None]
    add: Callable[[int, ShardResult], None]  # a micro-batch's loss, to its shard's


class Pipeline:
    """The chunks of one seat. Receive buffers belong to a group and are dropped with it."""

    def __init__(self, portion: Portion, backend: Backend, schedule: str, micro_batches: int):
        self.portion, self.backend, self.schedule, self.micro_batches = portion, backend, schedule, micro_batches
        layout = portion.layout
        self.depths = layout.stage_depths(portion.seat.pipeline)
        self.last = len(layout.depths) - 1
        self._shapes: dict[int, list[tuple[int, ...]]] = {}
        self._group: CollectiveGroup | None = None
        self._executors: dict[tuple[int, int], Executor] = {}

    def pieces(self, depth: int) -> tuple[str, ...]:
        return self.portion.layout.depths[depth]

    def shapes(self, batch: Batch) -> list[tuple[int, ...]]:
        """Of what travels between depths d and d + 1, for a batch of so many rows."""
        rows = len(next(iter(batch.values())))
        if rows not in self._shapes:
            self._shapes[rows] = boundaries(self.portion, batch)
        return self._shapes[rows]

    def run(self, group: CollectiveGroup, shards: Sequence[int], work: Shards) -> None:
        """Forward and backward. When it raises, what was kept is let go."""
        if group is not self._group:
            self._group, self._executors = group, {}
        per = 1 if self.schedule == "interleaved" else len(shards)
        try:
            for first in range(0, len(shards), per):
                stage = AtWork(self, work, first, shards[first:first + per])
                shapes = self.shapes(work.rows(first * self.micro_batches)[0])
                self._executor(per * self.micro_batches, shapes).run(stage)
        except BaseException:
            self._executors = {}
            self.backend.forget()
            raise

    def _executor(self, count: int, shapes: Sequence[Sequence[int]]) -> Executor:
        sizes = tuple(size_of(shape) for shape in shapes)
        key = count, sum(sizes)
        if key not in self._executors:
            assert self._group is not None
            schedule = build(self.schedule, self._group.size, count, self.portion.layout.num_chunks, PACE)  # type: ignore[arg-type]
            self._executors[key] = Executor(schedule, self._group, sizes, self.backend.allocate)
        return self._executors[key]

    def infer(self, group: CollectiveGroup, batch: Batch) -> Any:
        """Metrics of one evaluation batch at the model's end; None on the other stages."""
        shapes, stages, rank = self.shapes(batch), group.size, group.rank
        found = None
        for depth in self.depths:
            inputs: Buffer | None = None
            shape: tuple[int, ...] = ()
            if depth:
                shape = shapes[depth - 1]
                inputs = self.backend.allocate(size_of(shape))
                group.receive(inputs, (rank - 1) % stages)
            found = self.backend.infer(self.pieces(depth), inputs, shape, batch)
            if depth < self.last:
                group.send(found, (rank + 1) % stages)
                found = None
        return found

    def warm_up(self, batch: Batch, into: Mapping[str, Buffer]) -> None:
        """A micro-batch through this stage's chunks alone, for what compiles and allocates."""
        shapes = self.shapes(batch)
        for depth in self.depths:
            inputs = self.backend.allocate(size_of(shapes[depth - 1])) if depth else None
            self.backend.forward((0, 0), self.pieces(depth), inputs, shapes[depth - 1] if depth else (), batch, 0)
            gradient = self.backend.allocate(size_of(shapes[depth])) if depth < self.last else None
            names = self.portion.layout.read_at(depth)
            self.backend.backward((0, 0), gradient, {name: into[name] for name in names if name in into})


PACE = (1, 1, 1)  # the same on all stages: it decides at which points messages pass


class AtWork:
    """`elastic.parallel.executor.Stage` for a run of shards of one step; micro-batches count from the run's first."""

    def __init__(self, pipeline: Pipeline, work: Shards, first: int, shards: Sequence[int]):
        self.pipeline, self.work, self.first, self.shards = pipeline, work, first, shards
        self.left = dict.fromkeys(range(len(shards)), pipeline.micro_batches * len(pipeline.depths))
        self.into: Mapping[str, Buffer] = {}

    def _micro(self, micro_batch: int) -> int:
        return self.first * self.pipeline.micro_batches + micro_batch

    def forward(self, chunk: int, micro_batch: int, inputs: Buffer | None) -> Buffer | None:
        depth = self.pipeline.depths[chunk]
        rows, seed = self.work.rows(self._micro(micro_batch))
        shape = self.pipeline.shapes(rows)[depth - 1] if depth else ()
        found = self.pipeline.backend.forward((chunk, micro_batch), self.pipeline.pieces(depth), inputs, shape, rows, seed)
        if depth < self.pipeline.last:
            return found
        self.work.add(self._micro(micro_batch), found)
        return None

    def backward(self, chunk: int, micro_batch: int, output_gradients: Buffer | None) -> Buffer | None:
        return self._summing(micro_batch, lambda: self.pipeline.backend.backward((chunk, micro_batch), output_gradients, self._own(chunk)))

    def backward_input(self, chunk: int, micro_batch: int, output_gradients: Buffer | None) -> Buffer | None:
        return self.pipeline.backend.backward_input((chunk, micro_batch), output_gradients)

    def backward_weight(self, chunk: int, micro_batch: int) -> None:
        self._summing(micro_batch, lambda: self.pipeline.backend.backward_weight((chunk, micro_batch), self._own(chunk)))

    def _own(self, chunk: int) -> Mapping[str, Buffer]:
        names = self.pipeline.portion.layout.read_at(self.pipeline.depths[chunk])
        return {name: self.into[name] for name in names if name in self.into}

    def _summing(self, micro_batch: int, act: Callable[[], Any]) -> Any:
        """Weight gradients come shard after shard, so one shard's buffer is open at a time."""
        shard = micro_batch // self.pipeline.micro_batches
        if self.left[shard] == self.pipeline.micro_batches * len(self.pipeline.depths):
            self.into = self.work.begin(self.first + shard)
        found = act()
        self.left[shard] -= 1
        if not self.left[shard]:
            self.work.end(self.first + shard)
        return found


def boundaries(portion: Portion, batch: Batch) -> list[tuple[int, ...]]:
    """The shape of what each depth but the last gives, found without values. It passes between workers with the same part of every split dim,
    and may be such a part itself.
    """
    ops, layout = MeterOps(), portion.layout
    params = {name: Shape(layout.box(name, portion.seat).count, True, owned=False) for name in portion.whole}
    columns = {name: Shape(np.shape(column), False, owned=False) for name, column in batch.items()}
    shapes: list[tuple[int, ...]] = []
    x = None
    for pieces in layout.depths[:-1]:
        for piece in pieces:
            x = portion.model.run(ops, params, piece, x, columns, 0)
        assert x is not None
        shapes.append(tuple(x.shape))
    return shapes


def size_of(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
