"""What a run will need, before it starts: the question to the planner, and the memory of a worker."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from elastic.data.collate import Collated
from elastic.data.loader import load_batch, rows_of
from elastic.errors import ElasticError, UserError
from elastic.mesh import Mesh
from elastic.model.backend import SLOTS, Batch, is_neutral
from elastic.model.user_code import place_of, users
from elastic.planning import candidates as meshes
from elastic.planning import costs
from elastic.planning.costs import Candidate, Part, Task
from elastic.planning.profile import Counted, Timed, at_work
from elastic.planning.rows import bounded_bytes
from elastic.planning.search import Question
from elastic.recipe import Recipe
from elastic.state.flat_layout import is_frozen
from elastic.tables.features import Tables
from elastic.workload import Workload, framework

PROCESS_BYTES = 350_000_000  # a worker's interpreter with Ray and a framework loaded
# of a shard that a worker holds: the one at work, as NumPy has it and as the framework has, and those loaded ahead
BATCHES = 4
# of a shard that a module of the user's own is tried for before it is called sound
LARGE_ROWS, LARGE_BYTES = 4096, 1 << 20
TOLD_BYTES = 64 << 20  # that a part of a shard must take, for its other rows to be told from it


@dataclass(frozen=True)
class Preview:
    """`parameters` are the model's own, without the padding of the buffers they lie in, `frozen` those that do not
    train; `worker_bytes` is a worker's state, buffers and activations beside its process, `shard_bytes` of them what
    one logical shard needs: activations and batches. All are needed at least."""

    parameters: int
    worker_bytes: int
    workers: int
    shard_bytes: int = 0
    frozen: int = 0

    @property
    def bytes(self) -> int:
        return self.workers * (self.worker_bytes + PROCESS_BYTES)


def preview(recipe: Recipe, opened: Workload) -> Preview:
    """The most that a worker of any of the recipe's groups needs. A shipped model's activations are counted by their
    shapes, those of a module of the user's own measured on a part of a shard, where the shard is large."""
    asked, is_own = question(recipe, opened.model, tables=opened.tables), not is_neutral(opened.model)
    mesh, elastic, rows = recipe.mesh, recipe.elastic, recipe.data.batch_size // recipe.elastic.logical_shards
    layout = meshes.lay(asked.model, Mesh(1, mesh.pipeline, mesh.tensor, mesh.expert), asked.rules, asked.balance)
    held, parts = meshes.holdings(layout, asked.model, asked.rules), (Part(0.0, 0.0, 0),) * len(layout.depths)
    shard = 0.0
    if is_own:
        shard = on_a_part(recipe, opened, rows) if not on_gpu(recipe) else 0.0
    elif not on_gpu(recipe):
        one = opened.looked_up(rows_of(opened.training, np.zeros(1, np.int64), np.zeros(1, np.int64)))
        wide = repeated(one, rows)
        parts = Counted(opened.model, wide, 0.0).depths(layout, rows // mesh.expert // mesh.micro_batches)
        shard = BATCHES * num_bytes(wide)
    sizes = {max(1, workers // layout.mesh.replica_size)
             for workers in range(elastic.min_workers, elastic.max_workers + 1)}
    needs = [costs.memory(asked.task, Candidate(replace(layout.mesh, data=data), mesh.micro_batches, parts, held,
                                                mesh.schedule, layout.num_chunks))
             for data in sizes]
    most = max(needs, key=lambda one: one.total)
    sizes_of = {name: int(np.prod(spec.shape, dtype=np.int64)) for name, spec in asked.model.parameters.items()}
    frozen = sum(size for name, size in sizes_of.items() if is_frozen(name, asked.model.parameters[name],
                                                                      recipe.model.freeze, recipe.model.thaw))
    return Preview(sum(sizes_of.values()), int(most.total + shard), elastic.max_workers + elastic.spares,
                   int(most.activations + shard), frozen)


def on_gpu(recipe: Recipe) -> bool:
    """Whether activations lie in another memory than this machine's."""
    return recipe.backend.device == "cuda" or (recipe.backend.device == "auto" and os.path.exists("/dev/nvidia0"))


def on_a_part(recipe: Recipe, opened: Workload, rows: int) -> float:
    """What a shard of a user's own model needs, of what some of its rows need at their peak, beside the rest of this
    process; 0 for a small shard, and where the system does not tell."""
    def batch(count: int) -> Any:
        indices = np.arange(count, dtype=np.int64) % opened.training.num_samples
        return opened.looked_up(opened.training.batch(indices, np.zeros(count, np.int64)))

    if rows < LARGE_ROWS and rows * num_bytes(batch(1)) < LARGE_BYTES:
        return 0.0
    backend, _, room = at_work(recipe, opened.model)
    views, count, grown = room(), 1, 0
    try:
        backend.gradients(batch(1), 0, views)  # what is made once is not a row's
        while count < rows and grown < TOLD_BYTES:
            count = min(4 * count, rows)
            before = reset_peak()
            backend.gradients(batch(count), 0, views)
            grown = peak() - before
    except ElasticError:
        raise
    except Exception as error:
        raise UserError(f"model.kind: {count} rows cannot be trained on ({type(error).__name__}: "
                        f"{' '.join(str(error).split())}{place_of(error)}); mend the model or its data.") from error
    return max(0, grown) * rows / count


def try_loss(recipe: Recipe, opened: Workload) -> None:
    """Rehearses a user's own model on the first logical shard, as its workers will. UserError for what it raises there,
    or cannot do."""
    if is_neutral(opened.model) or on_gpu(recipe) or recipe.mesh.replica_size > 1:
        return
    (backend, _, room), batch = at_work(recipe, opened.model), example(opened)
    with users(True):
        habits = backend.rehearse(batch, room)
    if habits.undivided and recipe.elastic.logical_shards > 1:
        raise UserError(habits.undivided)


def repeated(batch: Batch, rows: int) -> dict[str, Any]:
    """A batch of one row as one of so many, without taking memory."""
    return {name: repeated(column, rows) if isinstance(column, Mapping)
            else np.broadcast_to(column, (rows, *column.shape[1:])) for name, column in batch.items()}


def num_bytes(batch: Any) -> int:
    if isinstance(batch, Collated):
        return num_bytes(batch.content)
    if isinstance(batch, Mapping):
        return sum(map(num_bytes, batch.values()))
    if isinstance(batch, (list, tuple)):
        return sum(map(num_bytes, batch))
    with suppress(AttributeError, RuntimeError):  # a sparse tensor does not tell
        return int(batch.nbytes)
    return 0


def reset_peak() -> int:
    """This process's memory now, in bytes, from which on `peak` counts. Linux; elsewhere 0, and so is `peak`."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is taken again, and does not show
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), 0))


def question(recipe: Recipe, model: Any, balance: Mapping[str, float] | None = None,
             tables: Tables | None = None) -> Question:
    """A run as the planner sees it. `balance` and `tables`: as `Workload` has them."""
    if not is_neutral(model):
        model = framework(recipe).adapt(model)
    mesh, optimizer, elastic = recipe.mesh, recipe.optimizer, recipe.elastic
    task = Task(elastic.logical_shards, recipe.data.batch_size // elastic.logical_shards, len(SLOTS[optimizer.name])
                + (optimizer.ema > 0),
                elastic.reduction == "exact", recipe.backend.threads, optimizer.sharded, optimizer.twin,
                row_bytes=bounded_bytes(tables), has_row_twin=recipe.embedding.twin,
                row_memory=tables.memory_bytes if tables and tables.disk_path else math.inf)
    rules = replace(meshes.rules_of(recipe), is_whole=tables is not None)
    return Question(model, task, rules, balance, mesh.schedule, mesh.micro_batches)


def example(work: Workload) -> Batch:
    """One logical shard."""
    return work.looked_up(load_batch(work.training, work.sampler, 1, 0))


def measured(recipe: Recipe, work: Workload, flops_s: float = 0.0) -> tuple[Question, Counted]:
    """The question, and what the model's work costs: by its operations at `flops_s` a second (the update is left out
    then), or timed in this process.

    UserError where a model of the user's own, whose operations nobody counts, is to be planned without a trial.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # before a framework loads: as the workers have it
    batch = example(work)
    asked = question(recipe, work.model, work.balance, work.tables)
    if flops_s and not is_neutral(work.model):
        raise UserError(f"--tflops {flops_s / 1e12:g} says nothing of model.kind = {recipe.model.kind!r}, whose "
                        "operations nobody counts; leave it out.")
    if flops_s:
        return asked, Counted(work.model, batch, flops_s)
    timed = Timed(recipe, work.model, batch)
    return replace(asked, task=replace(asked.task, update_s=timed.update_s())), timed


def check_memory(found: Preview, recipe: Recipe) -> None:
    """UserError where the largest group cannot fit on this machine."""
    total, batch = psutil.virtual_memory().total, recipe.data.batch_size
    if found.bytes <= total:
        return
    need = f"{found.workers} workers of {found.parameters} parameters need about {found.bytes / 1e9:.1f} GB"
    if found.shard_bytes > found.worker_bytes / 2:
        shards = recipe.elastic.logical_shards
        raise UserError(f"data.batch_size = {batch}: {need}, {found.shard_bytes / 1e9:.1f} GB each for the activations "
                        f"of {batch // shards} rows, and this machine has {total / 1e9:.1f} GB; lower it, or raise "
                        f"elastic.logical_shards = {shards}, which share it.")
    raise UserError(f"elastic.max_workers = {recipe.elastic.max_workers}: {need}, and this machine has "
                    f"{total / 1e9:.1f} GB; lower it or make the model smaller.")
