"""What a worker trains with, built from an opened workload on the coordinate that it is to take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elastic.data.ledger import Ledger, NotedLoader
from elastic.data.loader import Prefetcher, eval_batches, load_batch
from elastic.mesh import Mesh, Seat
from elastic.model.backend import Backend, tally_of
from elastic.parallel.layout import Portion
from elastic.parallel.pipeline import Pipeline
from elastic.recipe import Recipe
from elastic.state.flat_layout import round_up
from elastic.state.state import State
from elastic.worker.loop import Plan, Work
from elastic.worker.loop_control import Control
from elastic.worker.lr_schedule import scaled
from elastic.worker.watch import Watch
from elastic.workload import EVAL_ROWS, Workload, create_backend, laid, mesh_of, open_state


def seat_state(recipe: Recipe, backend: Backend, portion: Portion | None = None) -> State:
    """A worker's: where the optimizer is sharded, with the slots of some blocks only."""
    return open_state(recipe, backend, portion, 1 + recipe.optimizer.twin if recipe.optimizer.sharded else 0)


def take_seat(recipe: Recipe, workload: Workload, mesh: Mesh, seat: Seat) -> tuple[Portion | None, Backend, State, Pipeline | None]:
    """What a worker computes with on its seat. Where a replica is one worker, the model is what it is."""
    if mesh.replica_size == 1:
        backend = create_backend(recipe, workload.model)
        return None, backend, seat_state(recipe, backend), None
    portion = Portion(workload.model, laid(recipe, workload, mesh), seat)
    backend = create_backend(recipe, portion)
    pipeline = Pipeline(portion, backend, recipe.mesh.schedule, recipe.mesh.micro_batches) if mesh.pipeline > 1 else None
    return portion, backend, seat_state(recipe, backend, portion), pipeline


def build_work(recipe: Recipe, workload: Workload, control: Control, post: Callable[[Any], None], save: Callable[..., None],
               seat: Seat | None = None) -> Work:
    """Everything that the loop needs, built once, on the seat that this worker is likely to get."""
    portion, backend, state, pipeline = take_seat(recipe, workload, mesh_of(recipe), seat or Seat())
    sampler = workload.sampler
    ledger = Ledger(sampler) if recipe.data.ledger else None
    load = NotedLoader(workload.training, sampler, ledger) if ledger else Prefetcher(
        lambda step, shard: load_batch(workload.training, sampler, step, shard))
    optimizer = scaled(recipe.optimizer.model_dump(), recipe.data.batch_size)
    plan = Plan(sampler.num_steps, recipe.elastic.logical_shards, recipe.run.seed, recipe.elastic.reduction == "exact", optimizer,
                recipe.run.eval_every, recipe.checkpoint.every_steps, recipe.checkpoint.busy == "skip", recipe.mesh.micro_batches,
                recipe.checkpoint.best)
    shard_size = recipe.data.batch_size // recipe.elastic.logical_shards
    rows = round_up(max(shard_size, EVAL_ROWS), recipe.mesh.expert)
    evaluation = eval_batches(workload.evaluation, rows) if workload.evaluation else []
    return Work(plan, backend, state, load, sampler.positions, evaluation, control, post, save, workload.unit, portion, pipeline,
                watch=Watch(recipe.model.kind, state.layout) if ":" in recipe.model.kind and portion is None else None,
                fills=workload.training.fills, ledger=ledger, is_own=bool(recipe.data.kind) or ":" in recipe.model.kind,
                tally=lambda: tally_of(workload.model) or tally_of(backend))
