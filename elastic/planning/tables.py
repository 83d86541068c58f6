"""A plan as a person reads it: how a run lies on one mesh, parameter by parameter, and all meshes compared."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table

from elastic.collective.reduction import all_nodes
from elastic.errors import UserError
from elastic.humanize import count, duration, size
from elastic.mesh import AXES, Coordinate, Mesh, rounds
from elastic.parallel.layout import Layout
from elastic.planning import candidates as meshes
from elastic.planning import costs
from elastic.planning.costs import FLOAT, Cluster
from elastic.planning.profile import Counted
from elastic.planning.search import Forecast, Question, best_of, choose, enough_shards, over, ranked, verdict
from elastic.recipe import Recipe


def parsed(text: str) -> Mesh:
    """data=2,tensor=2 as a mesh."""
    degrees = {}
    for item in text.split(","):
        axis, _, number = item.strip().partition("=")
        if axis not in AXES or not number.isdecimal() or int(number) < 1 or axis in degrees:
            raise UserError(f'--mesh "{text}" is not of the form data=2,tensor=2; the axes are {", ".join(AXES)}, each '
                            'once, with a number of at '
                            "least 1.")
        degrees[axis] = int(number)
    return Mesh(**{"data": 1, **degrees})


def show(asked: Question, work: Counted, mesh: Mesh, micro_batches: int) -> Iterator[Any]:
    """Both tables. UserError where the model does not lie on the mesh."""
    if mesh.data > asked.task.num_shards:
        raise UserError(f"--mesh data={mesh.data} is more replicas than elastic.logical_shards = "
                        f"{asked.task.num_shards} feed; write data={asked.task.num_shards} or less.")
    meshes.check_rows(asked.task.shard_rows, mesh, micro_batches)
    layout = meshes.lay(asked.model, mesh, asked.rules, asked.balance)
    yield parameters(layout)
    yield ""
    yield collectives(asked, layout, work, micro_batches)


def parameters(layout: Layout) -> Table:
    """A row for every parameter."""
    out = Table("parameter", "dims", "split along", "bytes a worker", "stage", box=None, pad_edge=False)
    for name, spec in layout.parameters.items():
        dims = ", ".join(f"{dim} {length}" for dim, length in zip(spec.dims or ("?",) * len(spec.shape), spec.shape,
                                                                  strict=False))
        split = ", ".join(f"{dim}: {layout.dims[dim]}" for dim in spec.dims if dim in layout.dims)
        part = math.prod(layout.box(name, Coordinate(pipeline=layout.stages_of[name][0])).count) * FLOAT
        out.add_row(name, dims, split, size(part), ", ".join(map(str, layout.stages_of[name])))
    return out


def traffic(asked: Question, layout: Layout, work: Counted, coordinate: Coordinate,
            micro_batches: int) -> Iterator[tuple[str, int, int]]:
    """What the worker on a coordinate gives to each kind of collective in one step: ("AXIS.KIND", calls, bytes)."""
    task, mesh = asked.task, layout.mesh
    shards = rounds(task.num_shards, mesh.data)
    each, measured = shards * micro_batches, work.measured(layout, task.shard_rows // mesh.expert // micro_batches)
    depths, sizes = layout.stage_depths(coordinate.pipeline), defaultdict[str, list[int]](list)
    for move in sorted((move for depth in depths for move in measured[depth].moves), key=lambda move: move.key):
        sizes[move.key].append(move.bytes)
    sizes["pipeline.activation"] = [measured[depth].out_bytes for depth in depths if depth < len(measured) - 1]
    sizes["pipeline.gradient"] = [measured[depth - 1].out_bytes for depth in depths if depth]
    for key, moved in sizes.items():
        if moved:
            yield key, each * len(moved), each * sum(moved)
    held = meshes.holding(layout, asked.model, asked.rules, coordinate)
    if held.shared:
        yield "shared.all_reduce", len(held.shared), sum(elements for _, elements in held.shared) * FLOAT
    if mesh.data > 1:
        sums = len(all_nodes(mesh.data, task.num_shards)[0]) if task.is_exact else 1
        yield "data.reduction", sums + 1, int(costs.sent_bytes(task, mesh.data, held.gradient))


def collectives(asked: Question, layout: Layout, work: Counted, micro_batches: int) -> Table:
    """A row for every kind and stage."""
    out = Table("stage", "collective", "calls a step", "bytes a step and worker", box=None, pad_edge=False)
    for stage in range(layout.mesh.pipeline):
        for what, calls, moved in traffic(asked, layout, work, Coordinate(pipeline=stage), micro_batches):
            out.add_row(str(stage), what, str(calls), size(moved))
    return out


# A plan: a row for every mesh, best first, and what to do in words.

HEADS = ("mesh", "workers", "micro-batches", "step", "work", "bubble", "tensor", "expert", "stages", "cores",
         "gradients", "update", "speed-up",
         "at best", "memory", "")
ROWS = 30  # that a person reads
Variant = tuple[str, Callable[[], Sequence[Forecast]]]  # a change to the recipe in words, and the forecasts with it


def named(mesh: Mesh) -> str:
    """data=2,tensor=2: as a command's --mesh reads it."""
    return ",".join(f"{axis}={getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1) or "data=1"


def shown(found: Sequence[Forecast], cluster: Cluster) -> list[Forecast]:
    """Best first: every number of replicas of one worker, and of each other layout the best number."""
    by: dict[Mesh, list[Forecast]] = {}
    for one in found:
        by.setdefault(Mesh(one.mesh.data if one.mesh.replica_size == 1 else 1, one.mesh.pipeline, one.mesh.tensor,
                           one.mesh.expert), []).append(one)
    best = [best_of(each, cluster) for each in by.values()]
    return ranked(best, choose(found, cluster), cluster)


def table(found: Sequence[Forecast], cluster: Cluster) -> Table:
    """What `shown` gives; columns of which there is nothing to say are left out."""
    best, rows = choose(found, cluster), shown(found, cluster)[:ROWS]
    alone = next((one.step_s for one in found if one.workers == 1), 0.0)
    cells = [[*row(one, alone), verdict(one, best, cluster)] for one in rows]
    kept = [i for i, head in enumerate(HEADS) if head in ("mesh", "step", "")
            or any(line[i] not in ("0.0 ms", "1") for line in cells)]
    out = Table(*(HEADS[i] for i in kept), box=None, pad_edge=False)
    for one, line in zip(rows, cells, strict=True):
        out.add_row(*(line[i] for i in kept), style="bold green" if one is best else "")
    return out


def row(one: Forecast, alone: float) -> list[str]:
    times = [brief(value) for value in (one.step_s, *vars(one.seconds).values())]
    return [named(one.mesh), str(one.workers), str(one.candidate.micro_batches), *times, f"{alone / one.step_s:.2f}"
            if alone and one.step_s else "",
            f"{one.bound:.2f}", size(one.memory.total)]


def brief(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def reason(best: Forecast, found: Sequence[Forecast], cluster: Cluster) -> str:
    """Why this mesh, in half a sentence."""
    alone = next((one for one in found if one.workers == 1), None)
    if alone and alone is not best and over(alone, cluster):
        return f"one worker would need {size(alone.memory.total)} and has {size(cluster.memory)}"
    if alone and alone is not best:
        return f"{alone.step_s / best.step_s:.2f} times as fast as one worker"
    others = [one for one in found if one.workers > best.workers and not over(one, cluster)]
    return "no larger mesh is faster" if others else "nothing larger has room"


def sentences(recipe: Recipe, asked: Question, cluster: Cluster, found: Sequence[Forecast],
              variants: Sequence[Variant] = ()) -> Iterator[str]:
    """The recommendation. UserError where no mesh fits."""
    best = choose(found, cluster)
    if best is None:
        raise UserError(too_large(found, cluster, variants))
    mesh = best.mesh
    keys = [f"mesh.{axis} = {getattr(mesh, axis)}" for axis in ("pipeline", "tensor", "expert")
            if getattr(mesh, axis) > 1]
    if best.candidate.micro_batches > 1:
        keys.append(f"mesh.micro_batches = {best.candidate.micro_batches}")
    moved = best.step_s - best.seconds.compute - best.seconds.update - best.seconds.cores
    shards = count(asked.task.num_shards, "logical shard")
    bound = f" ({shards} let {mesh.data} replicas be {best.bound:.2f} times as fast as one)" if mesh.data > 1 else ""
    yield (f"{', '.join([f'elastic.max_workers = {best.workers}', *keys])}: {reason(best, found, cluster)}"
           f"{bound}; {moved / best.step_s if best.step_s else 0:.0%} of a step is exchange and waiting.")
    replicas = cluster.room // mesh.replica_size
    if replicas > asked.task.num_shards:
        enough = enough_shards(recipe.data.batch_size, replicas)
        yield (f"{count(cluster.room, 'worker')} have room here and {asked.task.num_shards} shards feed only as many "
               "replicas: " + (
            f"elastic.logical_shards = {enough} would feed all." if enough else
            f"data.batch_size = {recipe.data.batch_size} has no more equal parts; write a multiple of {replicas}."))


def too_large(found: Sequence[Forecast], cluster: Cluster, variants: Sequence[Variant]) -> str:
    """By how much a run does not fit, and what would make it."""
    least = min(found, key=lambda one: one.memory.total)
    remedies = [words for words, variant in variants if any(not over(one, cluster) for one in variant())]
    parts = vars(least.memory)
    worst = max(parts, key=lambda name: parts[name])
    if worst == "tables":
        remedies = remedies or ["give workers more memory, or lower max_rows of the tables"]
    end = " or ".join(remedies) if remedies else ('give workers more memory, or take a smaller model, a smaller '
                                                  'data.batch_size or optimizer.name = "sgd"')
    return (f"A worker needs {size(least.memory.total)} at least ({named(least.mesh)}, {size(parts[worst])} of it "
            f"{worst}), {size(over(least, cluster))} more than it has; {end}.")
