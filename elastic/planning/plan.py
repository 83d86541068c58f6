"""A plan made: the cluster by its numbers, every mesh forecast on it, and what `mesh = "auto"` becomes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil

from elastic.collective.segment import MOST_READERS
from elastic.errors import UserError
from elastic.mesh import Mesh
from elastic.model.backend import is_chain
from elastic.planning.calibration import cache_file, calibrate, known
from elastic.planning.costs import Cluster
from elastic.planning.memory import PROCESS_BYTES, example, measured, question
from elastic.planning.profile import Counted, copied_bytes_s
from elastic.planning.rows import lines
from elastic.planning.search import Forecast, Question, choose, forecasts
from elastic.planning.tables import Variant, brief, named, parsed, reason, sentences, show, table, too_large
from elastic.recipe import Recipe, with_mesh
from elastic.workload import Workload, open_model

# of a call on one node over shared memory, and over TCP (benchmarks/results/reduction.md)
LATENCY_S, FAR_S = 50e-6, 500e-6
GIGABIT = 1e9 / 8
GIGABYTE = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Size:
    """A cluster as the command names it; what is 0 is found out here, and no nodes are this machine."""

    nodes: int = 0
    workers_per_node: int = 1
    memory_gb: float = 0.0
    intra_gbps: float = 0.0
    inter_gbps: float = 10.0


def cluster_of(recipe: Recipe, size: Size) -> Cluster:
    """This machine's memory is copied to learn its bandwidth, unless a calibration knows better."""
    here, workers = not size.nodes, size.workers_per_node
    memory = size.memory_gb * GIGABYTE or psutil.virtual_memory().total / workers - PROCESS_BYTES
    constants = known(recipe, workers) if here else None
    if constants and workers > 1:
        crowding = workers / constants.cores  # is in what was measured already
        return Cluster(1, workers, size.intra_gbps * GIGABIT or constants.shared_bytes_s * crowding,
                       size.inter_gbps * GIGABIT,
                       constants.shared_latency_s, memory, constants.cores,
                       reduction=constants.reduction_bytes_s * crowding)
    intra = size.intra_gbps * GIGABIT or copied_bytes_s()
    return Cluster(size.nodes or 1, workers, intra, size.inter_gbps * GIGABIT, LATENCY_S, memory, (os.cpu_count() or 1)
                   if here else 0.0, FAR_S)


@dataclass(frozen=True)
class Plan:
    """`found`: the forecast of every mesh."""

    recipe: Recipe
    asked: Question
    cluster: Cluster
    work: Counted
    found: Sequence[Forecast]

    @classmethod
    def make(cls, recipe: Recipe, opened: Workload, cluster: Cluster, flops_s: float = 0.0) -> Plan:
        asked, work = measured(recipe, opened, flops_s)
        if recipe.mesh.auto:
            asked = replace(asked, micro_batches=0)
        return cls(recipe, asked, cluster, work, forecasts(asked, cluster, work))

    def variants(self, info: Mapping[str, Any]) -> list[Variant]:
        """Changes to the recipe that may make it fit, the mildest first."""
        optimizer, task = self.recipe.optimizer, self.asked.task

        def again(asked: Question, cluster: Cluster = self.cluster, model: Any = self.work.model) -> Sequence[Forecast]:
            return forecasts(replace(asked, micro_batches=0), cluster, Counted(model, self.work.batch, 0.0))

        def other(**changes: Any) -> Sequence[Forecast]:
            return again(replace(self.asked, task=replace(task, **changes)))

        def recomputed() -> Sequence[Forecast]:
            section = self.recipe.model.model_copy(update={"recompute": True})
            recipe = self.recipe.model_copy(update={"model": section})
            model = open_model(recipe, info)
            return again(replace(self.asked, model=question(recipe, model).model), model=model)

        found: list[Variant] = []
        if self.asked.micro_batches:
            found.append(('write mesh = "auto", for more micro-batches would make it fit', lambda: again(self.asked)))
        if self.recipe.model.config.get("recompute") is False:
            found.append(("set model.recompute = true", recomputed))
        if not optimizer.sharded:
            found.append(("set optimizer.sharded = true", lambda: other(is_sharded=True, has_twin=optimizer.twin)))
        if task.shard_rows > 1:
            found.append((f"lower data.batch_size to {task.num_shards} (one sample a shard), or raise "
                          "elastic.logical_shards",
                          lambda: other(shard_rows=1)))
        more = replace(self.cluster, nodes=8 * self.cluster.nodes)
        if task.row_bytes and task.has_row_twin:
            found.append(("set embedding.twin = false", lambda: other(has_row_twin=False)))
        if task.row_bytes:
            found.append(("take more workers, which share the rows of the tables", lambda: again(self.asked, more)))
        if is_chain(self.asked.model) and not self.asked.rules.is_whole:
            found.append(("take more workers: a larger mesh.tensor or mesh.pipeline would make it fit",
                          lambda: again(self.asked, more)))
        return found


def parts(recipe: Recipe, info: Mapping[str, Any], opened: Workload, size: Size, flops_s: float, layout: bool = False,
          mesh: str = "") -> Iterator[Any]:
    """What `elastic plan` prints: tables and sentences. With `layout`, in place of the table, how `mesh` lies; "" is
    the best. UserError where nothing fits."""
    cluster = cluster_of(recipe, size)
    if layout and mesh:
        asked = question(recipe, opened.model, opened.balance, opened.tables)
        work = Counted(opened.model, example(opened), 0.0)
        yield from show(asked, work, parsed(mesh), recipe.mesh.micro_batches)
        return
    plan = Plan.make(recipe, opened, cluster, flops_s)
    best = choose(plan.found, cluster)
    if not layout:
        yield table(plan.found, cluster)
    yield from sentences(recipe, plan.asked, cluster, plan.found, plan.variants(info))
    yield from lines(opened.tables, recipe.elastic.min_workers, best.workers if best else recipe.elastic.max_workers)
    if layout and best:
        yield from show(plan.asked, plan.work, best.mesh, best.candidate.micro_batches)


def calibrated(recipe: Recipe, info: Mapping[str, Any], size: Size) -> list[str]:
    """Measures this machine. UserError for a cluster elsewhere, which cannot be measured from here."""
    if size.nodes:
        raise UserError(f"--calibrate measures this machine, and --nodes {size.nodes} is a cluster; leave one of them "
                        "out.")
    if size.workers_per_node > MOST_READERS:
        raise UserError(f"--calibrate measures at most {MOST_READERS} workers, as many as share memory on a node, and "
                        f"not {size.workers_per_node}; give --gpus-per-node {MOST_READERS}.")
    return [*calibrate(recipe, info, size.workers_per_node).lines(), f"kept in {cache_file()}"]


def settle(recipe: Recipe, info: Mapping[str, Any], opened: Workload, nodes: int = 0) -> tuple[Recipe, str]:
    """A recipe whose mesh is "auto" with the numbers that the planner chose for elastic.max_workers workers, and why.
    UserError if none fits."""
    least, most = recipe.elastic.min_workers, recipe.elastic.max_workers
    cluster = cluster_of(recipe, Size(nodes, -(-most // max(1, nodes))))
    plan = Plan.make(recipe, opened, cluster)
    # the elastic run takes every worker that there is: of each layout the most replicas
    widest: dict[Mesh, Forecast] = {}
    for one in plan.found:
        shape = replace(one.mesh, data=1)
        # as the recipe's check has it
        in_whole = not any(n > shape.world_size and n % shape.world_size for n in (least, most))
        if in_whole and one.workers <= most and (shape not in widest or widest[shape].workers < one.workers):
            widest[shape] = one
    best = choose(widest.values(), cluster)
    if best is None:
        raise UserError(too_large(plan.found, cluster, plan.variants(info)))
    mesh, number = best.mesh, best.candidate.micro_batches
    turns = f" with {number} micro-batches" if number > 1 else ""
    why = f"mesh = \"auto\" is {named(mesh)}{turns}: {reason(best, plan.found, cluster)}; a step should take {brief(best.step_s)}"
    return with_mesh(recipe, pipeline=mesh.pipeline, tensor=mesh.tensor, expert=mesh.expert, micro_batches=number), why
