"""What a run will need, before it starts: parameters and memory, and a step's seconds on every number of workers."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil

from elastic.backend import SLOTS, Backend, UpdateRule
from elastic.data.loader import load_batch
from elastic.errors import UserError
from elastic.parallel import meter
from elastic.parallel.planner import FLOAT, Cluster, Task, state_bytes
from elastic.recipe import Recipe
from elastic.state import BLOCK, FlatLayout
from elastic.workload import Workload, create_backend, framework, open_model, open_state

PROCESS_BYTES = 350_000_000  # a worker's interpreter with Ray and a framework loaded
COPY = 1 << 25  # bytes
TIMES = 5
LATENCY_S = {True: 50e-6, False: 500e-6}  # of a call on one node over shared memory, and over TCP (benchmarks/results/reduction.md)
GIGABIT = 1e9 / 8


@dataclass(frozen=True)
class Preview:
    """`worker_bytes` is a worker's state and buffers beside its process; activations are not in it."""

    parameters: int
    worker_bytes: int
    workers: int

    @property
    def bytes(self) -> int:
        return self.workers * (self.worker_bytes + PROCESS_BYTES)


def preview(recipe: Recipe, info: Mapping[str, Any]) -> Preview:
    """The most that a worker of any of the recipe's groups needs, beside activations."""
    task = task_of(recipe, open_model(recipe, info))
    sizes = range(recipe.elastic.min_workers, recipe.elastic.max_workers + 1)
    return Preview(task.parameters, max(state_bytes(task, size) for size in sizes), recipe.elastic.max_workers + recipe.elastic.spares)


def task_of(recipe: Recipe, model: Any) -> Task:
    """A step's buffers; its work is not known yet."""
    if not isinstance(getattr(model, "parameters", None), Mapping):
        model = framework(recipe).adapt(model)
    layout = FlatLayout(model.parameters, model.buffers, recipe.model.freeze, recipe.optimizer.no_decay)
    num_slots = len(SLOTS[recipe.optimizer.name]) + (recipe.optimizer.ema > 0)
    return Task(layout.size, layout.trainable, layout.gradient, num_slots, recipe.elastic.logical_shards, recipe.elastic.reduction == "exact",
                0, 0.0, 0.0, recipe.backend.threads)


def measured(recipe: Recipe, info: Mapping[str, Any], flops_s: float = 0.0) -> Task:
    """The task with its work: by its operations at `flops_s` a second (the update is left out then), or timed in this process.

    UserError where a model of the user's own, whose operations nobody counts, is to be planned without a trial.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # before a framework loads: as the workers have it
    work = Workload.open(recipe, info)
    task, batch = task_of(recipe, work.model), load_batch(work.training, work.sampler, 1, 0)
    if isinstance(getattr(work.model, "parameters", None), Mapping):
        found = meter.measure(work.model, batch)
        task = replace(task, kept_bytes=found.kept_bytes + found.again_bytes, shard_s=found.flops / flops_s if flops_s else 0.0)
    elif flops_s:
        raise UserError(f"--tflops {flops_s / 1e12:g} says nothing of model.kind = {recipe.model.kind!r}, whose operations nobody counts; "
                        "leave it out.")
    return task if flops_s else timed(recipe, task, create_backend(recipe, work.model), batch)


def timed(recipe: Recipe, task: Task, backend: Backend, batch: Mapping[str, Any]) -> Task:
    state = open_state(recipe, backend)
    state.start(recipe.run.seed)
    buffer, end = backend.allocate(state.layout.gradient), state.layout.trainable
    views = state.layout.views(buffer, state.layout.trainable_names)
    rule = UpdateRule(recipe.optimizer.name, 0.0, 0.0, 1.0, 1, recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.eps,
                      recipe.optimizer.momentum)
    shard_s = seconds(lambda: backend.gradients(batch, 0, views))
    update_s = seconds(lambda: backend.update(rule, state.param[:end], buffer[:end], state.slots, BLOCK))
    return replace(task, shard_s=shard_s, update_s=update_s)


def seconds(function: Callable[[], Any]) -> float:
    """The median of some calls after one that may compile."""
    taken = []
    for _ in range(1 + TIMES):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def cluster_of(nodes: int, workers_per_node: int, memory_gb: float, intra_gbps: float, inter_gbps: float) -> Cluster:
    """A cluster by numbers; 0 nodes is this machine, whose memory is copied to learn its bandwidth where none is given."""
    here = not nodes
    memory = memory_gb * 1e9 or psutil.virtual_memory().total / workers_per_node - PROCESS_BYTES
    source, target = np.ones(COPY // FLOAT, np.float32), np.empty(COPY // FLOAT, np.float32)
    intra = intra_gbps * GIGABIT or COPY / seconds(lambda: np.copyto(target, source))
    return Cluster(nodes or 1, workers_per_node, intra, inter_gbps * GIGABIT, LATENCY_S[nodes <= 1], memory, (os.cpu_count() or 1) if here else 0)


def check_memory(found: Preview, recipe: Recipe) -> None:
    """UserError where the largest group cannot fit on this machine."""
    total = psutil.virtual_memory().total
    if found.bytes > total:
        raise UserError(f"elastic.max_workers = {recipe.elastic.max_workers}: {found.workers} workers of {found.parameters} parameters need about "
                        f"{found.bytes / 1e9:.1f} GB, and this machine has {total / 1e9:.1f} GB; lower it or make the model smaller.")
