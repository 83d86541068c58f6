"""A worker's stage at work: all micro-batches of its replica's shards through its chunks of the model, by a schedule.

One schedule runs over all shards of a step, so a pipeline fills and empties once a step; the interleaved one, whose
chunks pass from shard to shard at different times, runs shard by shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Protocol

from elastic.collective.group import CollectiveGroup
from elastic.model.backend import Backend, Batch, Buffer, ShardResult
from elastic.parallel.executor import Executor
from elastic.parallel.layout import Portion
from elastic.parallel.measure import pieces
from elastic.parallel.schedules import build


class Shards(Protocol):
    """What a stage needs of a step: its replica's shards, of which each is begun and ended once."""

    @property
    def run(self) -> Sequence[int]:
        """Their numbers."""

    def rows(self, shard: int, micro: int) -> tuple[Batch, int]:
        """Of a micro-batch: this worker's rows and the seed."""

    def begin(self, shard: int) -> Mapping[str, Buffer]:
        """Where its gradients go, zeros."""

    def add(self, shard: int, result: ShardResult) -> None:
        """A micro-batch's loss; they come in order."""

    def end(self, shard: int) -> None:
        """Its gradients are all there."""


class Pipeline:
    """The chunks of one coordinate, and `elastic.parallel.executor.Stage` for the shards that it runs. Receive buffers
    belong to a group and are dropped with it.
    """

    def __init__(self, portion: Portion, backend: Backend, schedule: str, micro_batches: int):
        self.portion, self.backend, self.schedule, self.micro_batches = portion, backend, schedule, micro_batches
        self.depths = portion.layout.stage_depths(portion.coordinate.pipeline)
        self.pieces = portion.layout.depths
        self.last = len(self.pieces) - 1
        self._shapes: dict[int, list[tuple[int, ...]]] = {}
        self._group: CollectiveGroup | None = None
        self._executors: dict[tuple[int, int], Executor] = {}
        self._shards: Shards
        # those of the shards that are on their way; the executor counts micro-batches from the first on
        self._run: Sequence[int] = ()
        self._into: Mapping[str, Buffer] = {}
        self._left = 0  # backward passes, or their second halves, of the shard whose gradients are being added

    def shapes(self, batch: Batch) -> list[tuple[int, ...]]:
        """Of what comes to each depth, for a batch of so many rows; nothing comes to the first. It passes between
        workers with the same part of every split dim, and may be such a part itself.
        """
        rows = len(next(iter(batch.values())))
        if rows not in self._shapes:
            made = pieces(self.portion.model, batch, self.portion.layout, self.portion.coordinate)
            self._shapes[rows] = [(), *(made[names[-1]].out_shape for names in self.pieces[:-1])]
        return self._shapes[rows]

    def run(self, group: CollectiveGroup, shards: Shards) -> None:
        """Forward and backward. When it raises, what was held is let go."""
        if group is not self._group:
            self._group, self._executors = group, {}
        per = 1 if self.schedule == "interleaved" else len(shards.run)
        self._shards = shards
        try:
            for first in range(0, len(shards.run), per):
                self._run, self._left = shards.run[first:first + per], 0
                sizes = tuple(map(prod, self.shapes(shards.rows(self._run[0], 0)[0])[1:]))
                self._executor(group, per * self.micro_batches, sizes).run(self)
        except BaseException:
            self._executors = {}
            self.backend.forget()
            raise
        finally:
            del self._shards  # and with them a generation's buffers
            self._into = {}

    def _executor(self, group: CollectiveGroup, count: int, sizes: tuple[int, ...]) -> Executor:
        key = count, sum(sizes)
        if key not in self._executors:
            schedule = build(self.schedule, group.size, count, self.portion.layout.num_chunks)  # type: ignore[arg-type]
            self._executors[key] = Executor(schedule, group, sizes, self.backend.allocate)
        return self._executors[key]

    def forward(self, chunk: int, micro_batch: int, inputs: Buffer | None) -> Buffer | None:
        number, micro = divmod(micro_batch, self.micro_batches)
        rows, seed = self._shards.rows(self._run[number], micro)
        depth = self.depths[chunk]
        found = self.backend.forward((chunk, micro_batch), self.pieces[depth], inputs, self.shapes(rows)[depth], rows,
                                     seed)
        if depth < self.last:
            return found
        self._shards.add(self._run[number], found)
        return None

    def backward(self, chunk: int, micro_batch: int, output_gradients: Buffer | None) -> Buffer | None:
        with self._adding(chunk, micro_batch) as into:
            return self.backend.backward((chunk, micro_batch), output_gradients, into)

    def backward_input(self, chunk: int, micro_batch: int, output_gradients: Buffer | None) -> Buffer | None:
        return self.backend.backward_input((chunk, micro_batch), output_gradients)

    def backward_weight(self, chunk: int, micro_batch: int) -> None:
        with self._adding(chunk, micro_batch) as into:
            self.backend.backward_weight((chunk, micro_batch), into)

    @contextmanager
    def _adding(self, chunk: int, micro_batch: int) -> Iterator[Mapping[str, Buffer]]:
        """Weight gradients come shard after shard, so one shard's buffer is open at a time."""
        shard = self._run[micro_batch // self.micro_batches]
        if not self._left:
            self._into, self._left = self._shards.begin(shard), self.micro_batches * len(self.depths)
        yield self._own(self.depths[chunk], self._into)
        self._left -= 1
        if not self._left:
            self._shards.end(shard)

    def _own(self, depth: int, into: Mapping[str, Buffer]) -> Mapping[str, Buffer]:
        return {name: into[name] for name in self.portion.layout.reads[depth] if name in into}

    def infer(self, group: CollectiveGroup, batch: Batch) -> Any:
        """Metrics of one evaluation batch at the model's end; None on the other stages."""
        shapes, stages, rank = self.shapes(batch), group.size, group.rank
        found = None
        for depth in self.depths:
            inputs = self._inputs(depth, shapes)
            if depth:
                group.receive(inputs, (rank - 1) % stages)
            found = self.backend.infer(self.pieces[depth], inputs, shapes[depth], batch)
            if depth < self.last:
                group.send(found, (rank + 1) % stages)
                found = None
        return found

    def warm_up(self, batch: Batch, into: Mapping[str, Buffer]) -> None:
        """A micro-batch through this stage's chunks alone, for what compiles and allocates."""
        shapes = self.shapes(batch)
        for depth in self.depths:
            self.backend.forward((0, 0), self.pieces[depth], self._inputs(depth, shapes), shapes[depth], batch, 0)
            self.backend.backward((0, 0), self._inputs(depth + 1, shapes) if depth < self.last else None,
                                  self._own(depth, into))

    def _inputs(self, depth: int, shapes: Sequence[Sequence[int]]) -> Buffer | None:
        """Room for what comes to a depth; None at the model's beginning."""
        return self.backend.allocate(prod(shapes[depth])) if depth else None
