"""Which meshes a model can be laid out on: the degrees that `Layout` accepts, and how much of everything a worker then holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from elastic.errors import RecipeError
from elastic.mesh import Coordinate, Mesh, useful_sizes
from elastic.model.backend import is_chain
from elastic.parallel.layout import Layout
from elastic.planning.costs import StageState
from elastic.recipe import Recipe
from elastic.state.flat_layout import FlatLayout

MOST_TURNS = 8  # micro-batches a stage: more shrink the bubble by less than they cost


@dataclass(frozen=True)
class Rules:
    """What a recipe says of where its model may lie. `layout`: dim -> axis in place of the model's own, if any."""

    layout: Mapping[str, str] | None = None
    num_chunks: int = 1
    freeze: tuple[str, ...] = ()
    no_decay: tuple[str, ...] = ()
    decayed: tuple[str, ...] = ("*",)
    thaw: tuple[str, ...] = ()
    is_whole: bool = False  # a replica is one worker: rows of embedding tables lie along data alone


def rules_of(recipe: Recipe) -> Rules:
    mesh = recipe.mesh
    return Rules(mesh.layout or None, mesh.chunks if mesh.schedule == "interleaved" else 1, recipe.model.freeze,
                 recipe.optimizer.no_decay,
                 recipe.optimizer.decayed, recipe.model.thaw)


def check_rows(rows: int, mesh: Mesh, micro_batches: int) -> None:
    """RecipeError where a shard's rows cannot be shared out."""
    if rows % (mesh.expert * micro_batches):
        what = f"mesh.micro_batches = {micro_batches}"
        if mesh.expert > 1:
            what = f"mesh.expert = {mesh.expert}" + (f" times {what}" if micro_batches > 1 else "")
        raise RecipeError(f"{what} does not divide the {rows} samples of a logical shard; lower it, or write a larger "
                          "data.batch_size or fewer elastic.logical_shards.")


def lay(model: Any, mesh: Mesh, rules: Rules, costs: Mapping[str, float] | None) -> Layout:
    """RecipeError where it does not fit."""
    return Layout(model, mesh, rules.layout, costs, rules.num_chunks if mesh.pipeline > 1 else 1)


def replicas(model: Any, most: int, rows: int, rules: Rules, costs: Mapping[str, float] | None) -> Iterator[Layout]:
    """Every way to lay one replica out on at most `most` workers; members of the expert axis share the `rows` of a
    shard."""
    most = 1 if rules.is_whole else most
    # more stages must make the longest shorter
    depths = useful_sizes(len(model.pieces) if is_chain(model) else 1, most)
    for tensor in range(1, most + 1):
        for expert in (n for n in range(1, most // tensor + 1) if rows % n == 0):
            if fitting(model, Mesh(1, 1, tensor, expert), rules, costs):
                found = (fitting(model, Mesh(1, pipeline, tensor, expert), rules, costs) for pipeline in depths
                         if pipeline * tensor * expert <= most)
                yield from (layout for layout in found if layout)


def fitting(model: Any, mesh: Mesh, rules: Rules, costs: Mapping[str, float] | None) -> Layout | None:
    try:
        return lay(model, mesh, rules, costs)
    except RecipeError:
        return None


def micro_batches(rows: int, mesh: Mesh) -> list[int]:
    """Into how many a worker's rows of a shard can be cut."""
    own = rows // mesh.expert
    return [n for n in range(1, min(own, MOST_TURNS * mesh.pipeline) + 1) if own % n == 0]


def holdings(layout: Layout, model: Any, rules: Rules) -> tuple[StageState, ...]:
    """One a stage, of the worker that holds most: the first has one place more of a dim that does not divide, the last
    keeps copies apart."""
    mesh = layout.mesh
    corners = [(expert, tensor) for expert in {0, mesh.expert - 1} for tensor in {0, mesh.tensor - 1}]
    return tuple(max((holding(layout, model, rules, Coordinate(0, stage, *corner)) for corner in corners),
                     key=lambda one: (one.size, one.gradient))
                 for stage in range(mesh.pipeline))


def holding(layout: Layout, model: Any, rules: Rules, coordinate: Coordinate) -> StageState:
    """As its state lays it out."""
    specs = layout.specs(coordinate)
    copies = {name for name in specs if not layout.is_owner(name, coordinate)}
    flat = FlatLayout(specs, model.buffers, rules.freeze, rules.no_decay, copies, layout.parameters, rules.decayed,
                      rules.thaw)
    shared = tuple((len(one.coordinates), sum(flat.places[name].size for name in one.names
                                              if name in flat.trainable_set))
                   for one in layout.shared(coordinate))
    return StageState(flat.size, flat.trainable, flat.gradient, shared)
