"""What a worker trains with, built from an opened workload on the coordinate that it is to take."""

from __future__ import annotations

from dataclasses import replace

from elastic.data.ledger import Ledger, NotedLoader
from elastic.data.loader import Prefetcher, eval_batches, load_batch
from elastic.mesh import Coordinate, Mesh
from elastic.parallel.layout import Portion
from elastic.parallel.pipeline import Pipeline
from elastic.recipe import Recipe
from elastic.state.flat_layout import round_up
from elastic.worker.lr_schedule import scaled
from elastic.worker.overwrite_watch import Watch
from elastic.worker.training import Placement, Plan, Training
from elastic.workload import EVAL_ROWS, Workload, create_backend, laid, open_state


def place_on(recipe: Recipe, workload: Workload, mesh: Mesh, coordinate: Coordinate) -> Placement:
    """Where a replica is one worker, the model is what it is."""
    mesh, coordinate = replace(mesh, data=1), replace(coordinate, data=0)
    holders = 1 + recipe.optimizer.twin if recipe.optimizer.sharded else 0  # of each block of the optimizer's slots
    if mesh.replica_size == 1:
        backend = create_backend(recipe, workload.model)
        state = open_state(recipe, backend, holders=holders)
        return Placement(backend, state, watch=Watch(recipe.model.kind, state.layout) if ":" in recipe.model.kind
                         else None)
    portion = Portion(workload.model, laid(recipe, workload, mesh), coordinate)
    backend = create_backend(recipe, portion)
    pipeline = Pipeline(portion, backend, recipe.mesh.schedule,
                        recipe.mesh.micro_batches) if mesh.pipeline > 1 else None
    return Placement(backend, open_state(recipe, backend, portion, holders), mesh, coordinate, portion, pipeline)


def build_training(recipe: Recipe, workload: Workload) -> Training:
    """Of a run, once a worker."""
    sampler = workload.sampler
    ledger = Ledger(sampler) if recipe.data.ledger else None
    load = NotedLoader(workload.training, sampler, ledger) if ledger else Prefetcher(
        lambda step, shard: load_batch(workload.training, sampler, step, shard))
    optimizer = scaled(recipe.optimizer.model_dump(), recipe.data.batch_size)
    plan = Plan(sampler.num_steps, recipe.elastic.logical_shards, recipe.run.seed, recipe.elastic.reduction == "exact",
                optimizer,
                recipe.run.eval_every, recipe.checkpoint.every_steps, recipe.checkpoint.busy == "skip",
                recipe.mesh.micro_batches,
                recipe.checkpoint.best)
    rows = round_up(max(recipe.data.batch_size // recipe.elastic.logical_shards, EVAL_ROWS), recipe.mesh.expert)
    return Training(plan, load, sampler.positions, eval_batches(workload.evaluation, rows) if workload.evaluation
                    else [],
                    workload.unit, bool(recipe.data.kind) or ":" in recipe.model.kind, workload.training.fills, ledger,
                    workload.tables)
