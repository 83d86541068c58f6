"""What a model's work costs a worker: counted from its operations, or timed in this process on the part that a worker would hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from elastic.data.collate import sliced
from elastic.mesh import Coordinate
from elastic.model.backend import Backend, Batch, UpdateRule, is_neutral
from elastic.parallel.groups import mirrored
from elastic.parallel.layout import Layout, Portion
from elastic.parallel.measure import Measure, pieces, together
from elastic.planning.costs import Part
from elastic.recipe import Recipe
from elastic.state.flat_layout import BLOCK, FlatLayout
from elastic.workload import create_backend, open_state

TIMES = 5
COPY = 1 << 23  # elements
ENOUGH_S = 1.0  # of one trial


class Counted:
    """Operations at so many a second. `flops_s` 0: nothing takes time, and bytes alone are of interest."""

    def __init__(self, model: Any, batch: Batch, flops_s: float):
        self.model, self.batch, self.flops_s = model, batch, flops_s
        self._found: dict[Any, Mapping[str, Measure]] = {}

    def measured(self, layout: Layout, rows: int) -> list[Measure]:
        """By depth. A module of the user's own keeps what nobody counts."""
        if not is_neutral(self.model):
            return [Measure(3, 0, forward=1)]
        key = layout.mesh.tensor, layout.mesh.expert, rows
        if key not in self._found:
            self._found[key] = pieces(self.model, sliced(self.batch, 0, rows), layout, Coordinate())
        found = self._found[key]
        return [together([found[name] for name in names or found]) for names in layout.depths]

    def depths(self, layout: Layout, rows: int) -> tuple[Part, ...]:
        second = 1 / self.flops_s if self.flops_s else 0.0
        return tuple(part(one, one.forward * second, (one.flops - one.forward) * second)
                     for one in self.measured(layout, rows))


class Timed(Counted):
    """Trials in this process: collectives give back what they are given, and what they cost is the planner's business.
    """

    def __init__(self, recipe: Recipe, model: Any, batch: Batch):
        super().__init__(model, batch, 0.0)
        self.recipe = recipe
        self._parts: dict[Any, tuple[Part, ...]] = {}

    def depths(self, layout: Layout, rows: int) -> tuple[Part, ...]:
        mesh = layout.mesh
        key = mesh.tensor, mesh.expert, layout.depths, rows
        if key not in self._parts:
            measured = self.measured(layout, rows)
            portion = Portion(self.model, Layout(self.model, replace(mesh, pipeline=1), layout.dims),
                              Coordinate()) if mesh.replica_size > 1 else None
            backend, _, room = at_work(self.recipe, portion or self.model)
            if portion:
                backend.connect(mirrored(portion.layout, portion.coordinate))
            batch, views = sliced(self.batch, 0, rows), room()
            if mesh.pipeline > 1:
                taken = staged(backend, layout, measured, batch, views)
            else:  # in one go, forward and backward in the ratio of their operations
                spent, share = seconds(lambda: backend.gradients(batch, 0,
                                                                 views)), measured[0].forward / measured[0].flops
                taken = [(spent * share, spent * (1 - share))]
            self._parts[key] = tuple(part(one, *each) for one, each in zip(measured, taken, strict=True))
        return self._parts[key]

    def update_s(self) -> float:
        """The optimizer's seconds for one element."""
        backend = create_backend(self.recipe, self.model)
        state, optimizer = open_state(self.recipe, backend), self.recipe.optimizer
        gradient, end = backend.allocate(state.layout.trainable), state.layout.trainable
        rule = UpdateRule(optimizer.name, 0.0, 0.0, 1.0, 1, optimizer.beta1, optimizer.beta2, optimizer.eps,
                          optimizer.momentum)
        return seconds(lambda: backend.update(rule, state.param[:end], gradient, state.slots, BLOCK)) / end


def part(one: Measure, forward_s: float, backward_s: float) -> Part:
    return Part(forward_s, backward_s, one.kept_bytes, one.again_bytes, one.out_bytes, one.moves)


def staged(backend: Backend, layout: Layout, measured: Sequence[Measure], batch: Batch,
           views: Mapping[str, Any]) -> list[tuple[float, float]]:
    """A pass, one part a depth, as the stages of a pipeline do it."""
    taken: list[list[tuple[float, float]]] = []

    def once() -> None:
        x, ways = None, []
        shape: tuple[int, ...] = ()
        for depth, names in enumerate(layout.depths):
            started = time.perf_counter()
            x = backend.forward(depth, names, x, shape, batch, 0)
            ways.append([time.perf_counter() - started, 0.0])
            shape = measured[depth].out_shape
        gradient = None
        for depth in reversed(range(len(layout.depths))):
            started = time.perf_counter()
            gradient = backend.backward(depth, gradient,
                                        {name: views[name] for name in layout.reads[depth] if name in views})
            ways[depth][1] = time.perf_counter() - started
        taken.append([(forward, backward) for forward, backward in ways])

    seconds(once)
    return [tuple(statistics.median(way) for way in zip(*runs, strict=True)) for runs in zip(*taken[1:], strict=True)]  # type: ignore[misc]


def seconds(function: Callable[[], Any], times: int = TIMES, enough_s: float = ENOUGH_S) -> float:
    """The median of some calls after one that may compile. Members that meet in the calls need `enough_s` without end:
    all make as many."""
    taken: list[float] = []
    while len(taken) <= times and (len(taken) < 2 or sum(taken[1:]) < enough_s):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def copied_bytes_s() -> float:
    """This machine's memory."""
    source, target = np.ones(COPY, np.float32), np.empty(COPY, np.float32)
    return source.nbytes / seconds(lambda: np.copyto(target, source))


def at_work(recipe: Recipe, model: Any) -> tuple[Backend, FlatLayout, Callable[[], Mapping[str, Any]]]:
    """A backend over a model, bound to its first state, and what gives zeroed room for gradients."""
    backend = create_backend(recipe, model)
    state = open_state(recipe, backend)
    state.start(recipe.run.seed)
    return backend, state.layout, lambda: state.layout.views(backend.allocate(state.layout.gradient),
                                                             state.layout.trainable_names)
