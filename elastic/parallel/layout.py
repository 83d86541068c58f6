"""How a model lies on a mesh: which pieces a stage runs, which box of each array a worker holds. Pure functions of names and numbers.

A dim that the layout maps to an axis is split along it, as evenly as it goes; a parameter's dims name its axes. Pieces
of the model go to the stages of the pipeline, each a contiguous range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

from elastic.boxes import Box
from elastic.errors import RecipeError
from elastic.mesh import Coordinate, Mesh
from elastic.model.backend import Spec, is_chain
from elastic.parallel.axis import span

UNEVEN = ("vocab", "table_row")  # dims whose parts may differ by one: nothing but memory depends on them
SPLITTING = ("tensor", "expert")  # axes along which a dim can be split


@dataclass(frozen=True)
class Shared:
    """Parameters that several coordinates of a replica hold, and whose gradient is the sum of what each of them finds.
    """

    coordinates: tuple[Coordinate, ...]  # of replica 0
    names: tuple[str, ...]


class Layout:
    """One model on one mesh. RecipeError where it does not fit."""

    def __init__(self, model: Any, mesh: Mesh, dims: Mapping[str, str] | None = None, costs: Mapping[str, float]
                 | None = None,
                 num_chunks: int = 1):
        """`dims`: dim -> axis in place of the model's own; `costs`: of each piece, in any unit, to balance the stages;
        else they count alike."""
        self.mesh, self.num_chunks = mesh, num_chunks
        self.parameters: Mapping[str, Spec] = model.parameters
        chain = model if is_chain(model) else None
        for axis in ("pipeline", "tensor", "expert"):
            if getattr(mesh, axis) > 1 and chain is None:
                raise RecipeError(f"mesh.{axis} = {getattr(mesh, axis)} needs a model in pieces with named dims, which "
                                  f"this model.kind is not; write mesh.{axis} = 1, or offer what "
                                  "elastic.model.backend.Chain asks for.")
        own = dict(chain.layout) if chain else {}
        check_dims(dims or {}, own)
        self.dims = {dim: axis for dim, axis in (dims or own).items() if getattr(mesh, axis) > 1}
        self._check_divides()
        self.depths: tuple[tuple[str, ...], ...] = ((),)
        self.reads = [tuple(self.parameters)]  # by depth: the parameters that the chunk there reads
        if chain:
            self.depths = self._cut(chain.pieces, costs)
            self.reads = [tuple(dict.fromkeys(name for piece in pieces for name in chain.names(piece)))
                          for pieces in self.depths]

    def _cut(self, pieces: Sequence[str], costs: Mapping[str, float] | None) -> tuple[tuple[str, ...], ...]:
        """By depth. RecipeError where there are too few pieces."""
        depths = self.mesh.pipeline * self.num_chunks
        if len(pieces) < depths:
            most = len(pieces) // self.num_chunks
            remedy = f"mesh.pipeline = {most} or less" if self.num_chunks == 1 or most > 1 else "fewer mesh.chunks, or another mesh.schedule"
            raise RecipeError(f"mesh.pipeline = {self.mesh.pipeline}"
                              + (f" with mesh.chunks = {self.num_chunks}" if self.num_chunks > 1 else "") +
                              f" needs {depths} pieces, and the model has {len(pieces)} ({', '.join(pieces[:4])}, "
                              f"...); write {remedy}.")
        weights = [1.0 if costs is None else costs[piece] for piece in pieces]
        return tuple(tuple(pieces[low:high]) for low, high in balanced(weights, depths))

    def _check_divides(self) -> None:
        for name, spec in self.parameters.items():
            for dim, length in zip(spec.dims, spec.shape, strict=False):
                axis = self.dims.get(dim)
                size = getattr(self.mesh, axis) if axis else 1
                if length < size and dim in UNEVEN:
                    raise RecipeError(f"mesh.{axis} = {size} is more than {dim} = {length} of {name}; write "
                                      f"mesh.{axis} = {length} or less.")
                if length % size and dim not in UNEVEN:
                    fits = [n for n in range(1, length + 1) if length % n == 0]
                    raise RecipeError(f"mesh.{axis} = {size} does not divide {dim} = {length} of {name}; write one of "
                                      f"{', '.join(map(str, fits[:6]))}.")
        for axis in SPLITTING:
            if getattr(self.mesh, axis) > 1 and not any(self.dims.get(dim) == axis for spec in self.parameters.values()
                                                        for dim in spec.dims):
                raise RecipeError(f"mesh.{axis} = {getattr(self.mesh, axis)} splits nothing: no dim of the model is "
                                  f"laid out on it; write mesh.{axis} = 1.")

    def stage_depths(self, stage: int) -> tuple[int, ...]:
        """The depths whose chunks a stage runs."""
        return tuple(stage + chunk * self.mesh.pipeline for chunk in range(self.num_chunks))

    def held(self, stage: int) -> tuple[str, ...]:
        """The parameters of a stage, in the model's order."""
        mine = {name for depth in self.stage_depths(stage) for name in self.reads[depth]}
        return tuple(name for name in self.parameters if name in mine)

    @cached_property
    def stages_of(self) -> dict[str, tuple[int, ...]]:
        """The stages that hold each parameter."""
        return {name: tuple(stage for stage in range(self.mesh.pipeline) if name in set(self.held(stage)))
                for name in self.parameters}

    def axes(self, name: str) -> tuple[str, ...]:
        """The axes along which a parameter is split."""
        return tuple(dict.fromkeys(self.dims[dim] for dim in self.parameters[name].dims if dim in self.dims))

    def box(self, name: str, coordinate: Coordinate) -> Box:
        """The part of a parameter that the worker on `coordinate` holds, if its stage holds it."""
        spec = self.parameters[name]
        start, count = [0] * len(spec.shape), list(spec.shape)
        for i, dim in enumerate(spec.dims):
            axis = self.dims.get(dim)
            if axis:
                start[i], count[i] = span(spec.shape[i], getattr(self.mesh, axis), getattr(coordinate, axis))
        return Box(tuple(spec.shape), tuple(start), tuple(count))

    def boxes(self, coordinate: Coordinate) -> dict[str, Box]:
        """By name, of all that a coordinate holds, in the model's order."""
        return {name: self.box(name, coordinate) for name in self.held(coordinate.pipeline)}

    def specs(self, coordinate: Coordinate) -> dict[str, Spec]:
        """The parameters of a coordinate with the shapes that it holds."""
        return {name: replace(self.parameters[name], shape=box.count) for name, box in self.boxes(coordinate).items()}

    def owners(self, name: str) -> tuple[Coordinate, ...]:
        """The coordinates of replica 0 that hold all of the parameter once among them: who counts it in a norm, and
        saves it."""
        axes = self.axes(name)
        return tuple(Coordinate(0, self.stages_of[name][0], expert, tensor)
                     for expert in range(self.mesh.expert if "expert" in axes else 1)
                     for tensor in range(self.mesh.tensor if "tensor" in axes else 1))

    def is_owner(self, name: str, coordinate: Coordinate) -> bool:
        return replace(coordinate, data=0) in self.owners(name)

    def shared(self, coordinate: Coordinate) -> tuple[Shared, ...]:
        """The parameters of a coordinate whose gradients must be summed over a replica, by who holds them.

        Tied parameters over their stages; what is not split over the expert axis, where every worker has other rows,
        over that.
        """
        found: dict[tuple[Coordinate, ...], list[str]] = {}
        for name in self.held(coordinate.pipeline):
            experts = (coordinate.expert,) if "expert" in self.axes(name) else range(self.mesh.expert)
            coordinates = tuple(Coordinate(0, stage, expert, coordinate.tensor) for stage in self.stages_of[name]
                                for expert in experts)
            if len(coordinates) > 1:
                found.setdefault(coordinates, []).append(name)
        return tuple(Shared(coordinates, tuple(names)) for coordinates, names in found.items())


def check_dims(dims: Mapping[str, str], own: Mapping[str, str]) -> None:
    """RecipeError for a layout that splits what the model is not written to split, or along another axis than it is
    written for."""
    for dim, axis in dims.items():
        if own.get(dim) != axis:
            known = ", ".join(f'{name} = "{along}"' for name, along in own.items())
            remedy = f"write some of {known}" if known else "leave mesh.layout out: it can split nothing"
            raise RecipeError(f'mesh.layout.{dim} = "{axis}" is no split that the model can make; {remedy}.')


def balanced(weights: Sequence[float], parts: int) -> list[tuple[int, int]]:
    """Cuts a row into contiguous ranges, none empty, whose heaviest is as light as possible; of equals the one with the
    earliest cuts."""
    total, size = list(accumulate(weights, initial=0.0)), len(weights)

    @cache
    def best(low: int, left: int) -> tuple[float, int]:
        """Of so many parts from `low` on: how heavy the heaviest must be, and where the first ends."""
        if left == 1:
            return total[size] - total[low], size
        return min((max(total[high] - total[low], best(high, left - 1)[0]), high)
                   for high in range(low + 1, size - left + 2))

    cuts = [0]
    for left in range(parts, 0, -1):
        cuts.append(best(cuts[-1], left)[1])
    return list(zip(cuts, cuts[1:]))


class Portion:
    """What a backend is built over. Where a replica is one worker, all of the model."""

    def __init__(self, model: Any, layout: Layout, coordinate: Coordinate):
        self.model, self.layout, self.coordinate = model, layout, coordinate
        self.parameters: Mapping[str, Spec] = layout.specs(coordinate)
        self.buffers: Mapping[str, Spec] = model.buffers
        self.whole: Mapping[str, Spec] = layout.parameters
        self.boxes: dict[str, Box] = layout.boxes(coordinate)
        self.shared: tuple[Shared, ...] = layout.shared(coordinate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh

    @property
    def is_first(self) -> bool:
        """Keeps what every worker of a replica has alike."""
        return (self.coordinate.pipeline, self.coordinate.expert, self.coordinate.tensor) == (0, 0, 0)

    def keeps(self, name: str) -> bool:
        """Whether this worker is the one that counts its part of a parameter in norms, and saves it."""
        return self.layout.is_owner(name, self.coordinate)
