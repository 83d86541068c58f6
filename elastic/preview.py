"""What a run will need, before it starts: the question to the planner, and the memory of a worker."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil

from elastic.backend import SLOTS, Batch
from elastic.data.loader import load_batch
from elastic.errors import UserError
from elastic.mesh import Mesh
from elastic.parallel import costs, meshes
from elastic.parallel.costs import Candidate, Part, Task
from elastic.parallel.planner import Question
from elastic.recipe import Recipe
from elastic.trial import Counted, Timed
from elastic.workload import Workload, framework, open_model

PROCESS_BYTES = 350_000_000  # a worker's interpreter with Ray and a framework loaded


@dataclass(frozen=True)
class Preview:
    """`parameters` are the model's own, without the padding of the buffers they lie in; `worker_bytes` is a worker's state and buffers beside its
    process, without activations.
    """

    parameters: int
    worker_bytes: int
    workers: int

    @property
    def bytes(self) -> int:
        return self.workers * (self.worker_bytes + PROCESS_BYTES)


def preview(recipe: Recipe, info: Mapping[str, Any]) -> Preview:
    """The most that a worker of any of the recipe's groups needs, beside activations."""
    asked = question(recipe, open_model(recipe, info))
    mesh, elastic = recipe.mesh, recipe.elastic
    layout = meshes.lay(asked.model, Mesh(1, mesh.pipeline, mesh.tensor, mesh.expert), asked.rules, asked.balance)
    held, nothing = meshes.holdings(layout, asked.model, asked.rules), (Part(0.0, 0.0, 0),) * len(layout.depths)
    sizes = {max(1, workers // layout.mesh.replica_size) for workers in range(elastic.min_workers, elastic.max_workers + 1)}
    most = max(costs.memory(asked.task, Candidate(replace(layout.mesh, data=data), mesh.micro_batches, nothing, held, mesh.schedule,
                                                  layout.num_chunks)).total for data in sizes)
    return Preview(sum(math.prod(spec.shape) for spec in asked.model.parameters.values()), int(most), elastic.max_workers + elastic.spares)


def question(recipe: Recipe, model: Any, balance: Mapping[str, float] | None = None) -> Question:
    """A run as the planner sees it. `balance`: as `Workload` has it."""
    if not isinstance(getattr(model, "parameters", None), Mapping):
        model = framework(recipe).adapt(model)
    mesh, optimizer, elastic = recipe.mesh, recipe.optimizer, recipe.elastic
    task = Task(elastic.logical_shards, recipe.data.batch_size // elastic.logical_shards, len(SLOTS[optimizer.name]) + (optimizer.ema > 0),
                elastic.reduction == "exact", recipe.backend.threads, optimizer.sharded, optimizer.twin)
    return Question(model, task, meshes.rules_of(recipe), balance, mesh.schedule, mesh.micro_batches)


def example(work: Workload) -> Batch:
    """One logical shard."""
    return load_batch(work.training, work.sampler, 1, 0)


def measured(recipe: Recipe, work: Workload, flops_s: float = 0.0) -> tuple[Question, Counted]:
    """The question, and what the model's work costs: by its operations at `flops_s` a second (the update is left out then), or timed in
    this process.

    UserError where a model of the user's own, whose operations nobody counts, is to be planned without a trial.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # before a framework loads: as the workers have it
    batch = example(work)
    asked = question(recipe, work.model, work.balance)
    if flops_s and not isinstance(getattr(work.model, "parameters", None), Mapping):
        raise UserError(f"--tflops {flops_s / 1e12:g} says nothing of model.kind = {recipe.model.kind!r}, whose operations nobody counts; "
                        "leave it out.")
    if flops_s:
        return asked, Counted(work.model, batch, flops_s)
    timed = Timed(recipe, work.model, batch)
    return replace(asked, task=replace(asked.task, update_s=timed.update_s())), timed


def check_memory(found: Preview, recipe: Recipe) -> None:
    """UserError where the largest group cannot fit on this machine."""
    total = psutil.virtual_memory().total
    if found.bytes > total:
        raise UserError(f"elastic.max_workers = {recipe.elastic.max_workers}: {found.workers} workers of {found.parameters} parameters need about "
                        f"{found.bytes / 1e9:.1f} GB, and this machine has {total / 1e9:.1f} GB; lower it or make the model smaller.")
