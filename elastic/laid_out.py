"""How a run lies on a mesh, as a person reads it: every parameter's dims, part and stage, and what a step's collectives carry. Computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from elastic.collective.reduction import all_nodes
from elastic.errors import UserError
from elastic.mesh import AXES, Mesh, Seat, rounds
from elastic.observe.words import size
from elastic.parallel import costs, meshes
from elastic.parallel.costs import FLOAT
from elastic.parallel.layout import Layout
from elastic.parallel.measure import totals
from elastic.parallel.planner import Question
from elastic.trial import Counted


@dataclass(frozen=True)
class Traffic:
    """What one worker gives to a kind of collective in a step. `what`: "AXIS.KIND"."""

    what: str
    calls: int
    bytes: int


def parsed(text: str) -> Mesh:
    """data=2,tensor=2 as a mesh."""
    degrees = {}
    for item in text.split(","):
        axis, _, number = item.strip().partition("=")
        if axis not in AXES or not number.isdecimal() or int(number) < 1 or axis in degrees:
            raise UserError(f'--mesh "{text}" is not of the form data=2,tensor=2; the axes are {", ".join(AXES)}, each once, with a number of at '
                            "least 1.")
        degrees[axis] = int(number)
    return Mesh(**{"data": 1, **degrees})


def show(asked: Question, work: Counted, mesh: Mesh, micro_batches: int) -> Iterator[Any]:
    """Both tables. UserError where the model does not lie on the mesh."""
    if mesh.data > asked.task.num_shards:
        raise UserError(f"--mesh data={mesh.data} is more replicas than elastic.logical_shards = {asked.task.num_shards} feed; write "
                        f"data={asked.task.num_shards} or less.")
    meshes.check_rows(asked.task.shard_rows, mesh, micro_batches)
    layout = meshes.lay(asked.model, mesh, asked.rules, asked.balance)
    yield parameters(layout)
    yield ""
    yield collectives(asked, layout, work, micro_batches)


def parameters(layout: Layout) -> Table:
    """A row for every parameter."""
    out = Table("parameter", "dims", "split along", "bytes a worker", "stage", box=None, pad_edge=False)
    for name, spec in layout.parameters.items():
        dims = ", ".join(f"{dim} {length}" for dim, length in zip(spec.dims or ("?",) * len(spec.shape), spec.shape, strict=False))
        split = ", ".join(f"{dim}: {layout.dims[dim]}" for dim in spec.dims if dim in layout.dims)
        part = math.prod(layout.box(name, Seat(pipeline=layout.stages_of[name][0])).count) * FLOAT
        out.add_row(name, dims, split, size(part), ", ".join(map(str, layout.stages_of[name])))
    return out


def traffic(asked: Question, layout: Layout, work: Counted, seat: Seat, micro_batches: int) -> Iterator[Traffic]:
    """Of one step, of the worker on a seat."""
    task, mesh = asked.task, layout.mesh
    shards = rounds(task.num_shards, mesh.data)
    each, measured = shards * micro_batches, work.measured(layout, task.shard_rows // mesh.expert // micro_batches)
    for key, (calls, moved) in sorted(totals([move for depth in layout.stage_depths(seat.pipeline) for move in measured[depth].moves]).items()):
        yield Traffic(key, each * calls, each * moved)
    last = len(measured) - 1
    onward = [measured[depth].out_bytes for depth in layout.stage_depths(seat.pipeline) if depth < last]
    back = [measured[depth - 1].out_bytes for depth in layout.stage_depths(seat.pipeline) if depth]
    for what, sizes in (("pipeline.activation", onward), ("pipeline.gradient", back)):
        if sizes:
            yield Traffic(what, each * len(sizes), each * sum(sizes))
    held = meshes.holding(layout, asked.model, asked.rules, seat)
    if held.shared:
        yield Traffic("shared.all_reduce", len(held.shared), sum(elements for _, elements in held.shared) * FLOAT)
    if mesh.data > 1:
        sums = len(all_nodes(mesh.data, task.num_shards)[0]) if task.is_exact else 1
        yield Traffic("data.reduction", sums + 1, int(costs.sent_bytes(task, mesh.data, held.gradient)))


def collectives(asked: Question, layout: Layout, work: Counted, micro_batches: int) -> Table:
    """A row for every kind and stage."""
    out = Table("stage", "collective", "calls a step", "bytes a step and worker", box=None, pad_edge=False)
    for stage in range(layout.mesh.pipeline):
        for one in traffic(asked, layout, work, Seat(pipeline=stage), micro_batches):
            out.add_row(str(stage), one.what, str(one.calls), size(one.bytes))
    return out
