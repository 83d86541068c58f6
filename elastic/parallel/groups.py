"""One generation's groups: the world, and this worker's axis groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from elastic.buffers import copied
from elastic.collective.group import Buffer, CollectiveGroup, Pending
from elastic.collective.solo import SoloGroup
from elastic.errors import GroupBroken
from elastic.mesh import Coordinate, Mesh
from elastic.parallel.axis import Axis
from elastic.parallel.layout import SPLITTING, Layout, Portion

Watch = Callable[[], AbstractContextManager[Any]]


class MeshGroups:
    """Every member makes its own, all in the same order: a group forms when all of its members have come to it.

    `watch()` surrounds each call inside a replica: who has not entered one that others wait in is the suspect of a
    hang.
    """

    def __init__(self, group: CollectiveGroup, mesh: Mesh, portion: Portion | None, watch: Watch):
        if mesh.world_size != group.size:
            raise ValueError(f"a mesh of {mesh.world_size} workers on a group of {group.size}.")
        self.world, self.mesh, self.coordinate = group, mesh, mesh.coordinate(group.rank)
        self.broken: list[GroupBroken] = []
        self.counts: Counter[str] = Counter()
        self.data = self._group(mesh.axis_ranks(group.rank, "data"))
        lines = {axis: self._group(mesh.axis_ranks(group.rank, axis), watch) for axis in (*SPLITTING, "pipeline")}
        self.pipeline = lines["pipeline"]
        self.axes = {axis: Axis(axis, lines[axis], self.counts) for axis in SPLITTING}
        self.replica = self._group(mesh.replica(group.rank))
        self.shared: list[tuple[Axis, tuple[str, ...]]] = []
        for one in sorted(portion.shared, key=lambda shared: [mesh.rank(coordinate)
                                                              for coordinate in shared.coordinates]) if portion else ():
            ranks = [mesh.rank(replace(coordinate, data=self.coordinate.data)) for coordinate in one.coordinates]
            self.shared.append((Axis("shared", self._group(ranks, watch), self.counts), one.names))

    def _group(self, ranks: Sequence[int], watch: Watch | None = None) -> CollectiveGroup:
        if len(ranks) == 1 < self.world.size:
            return SoloGroup(self.world.aborted)
        group = self.world if len(ranks) == self.world.size else self.world.subgroup(tuple(ranks))
        return Watched(group, watch, self.broken) if watch and group.size > 1 else group  # type: ignore[return-value]

    def dims(self, layout: dict[str, str]) -> dict[str, Axis]:
        """The axis of every dim that is split."""
        return {dim: self.axes[axis] for dim, axis in layout.items() if self.axes[axis].size > 1}

    @property
    def reports_losses(self) -> bool:
        """Whether this worker says what its replica's losses are: of those that know the same, one."""
        return self.coordinate.tensor == 0 and self.coordinate.pipeline == self.mesh.pipeline - 1


class Watched:
    """A group whose calls are seen to wait. `broken` keeps its end: a framework may turn the error into one of its own.
    """

    def __init__(self, group: CollectiveGroup, watch: Watch, broken: list[GroupBroken]):
        self._group, self._watch, self._broken = group, watch, broken
        self.rank, self.size = group.rank, group.size

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._group, name)
        return partial(self._seen, self._watch, call) if callable(call) else call

    def start(self, call: str, *arguments: Any) -> Pending:
        """The wait is in `finish`."""
        pending = self._seen(nullcontext, self._group.start, call, *arguments)
        return Pending(partial(self._seen, self._watch, pending.finish))

    def _seen(self, watch: Watch, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            with watch():
                return call(*arguments, **named)
        except GroupBroken as error:
            self._broken.append(error)
            raise


class Mirror:
    """A group whose every member is this worker, for a first run that compiles and allocates: what the others would
    send is what it gave."""

    def __init__(self, size: int, rank: int):
        self.rank, self.size = rank, size

    def summed(self, x: Buffer) -> Buffer:
        return copied(x)

    def all_gather(self, out: Buffer, part: Buffer) -> None:
        for rank in range(self.size):
            out[rank * part.shape[0]:(rank + 1) * part.shape[0]] = part

    def all_to_all(self, out: Buffer, out_counts: Sequence[int], buffer: Buffer, counts: Sequence[int]) -> None:
        out[:] = buffer[:out.shape[0]] if out.shape[0] <= buffer.shape[0] else 0


def mirrored(layout: Layout, coordinate: Coordinate) -> dict[str, Axis]:
    """Axes that lead nowhere, of every dim that is split."""
    return {dim: Axis(axis, Mirror(getattr(layout.mesh, axis), getattr(coordinate, axis)))  # type: ignore[arg-type]
            for dim, axis in layout.dims.items()}
