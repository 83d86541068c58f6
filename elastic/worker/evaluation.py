"""An evaluation, and what it adds up: means over all rows, and a model's own figures over whole numbers that were counted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from elastic.collective.group import CollectiveGroup
from elastic.model.backend import Backend, Batch
from elastic.model.tally import Tally
from elastic.model.user_code import users
from elastic.worker.context import StepContext
from elastic.worker.gradients import part_of
from elastic.worker.lookups import with_rows


def evaluate(context: StepContext) -> dict[str, float]:
    """The mean of every metric over the evaluation set. A batch is computed whole by one replica: the split changes no
    bit."""
    training, groups, batches, pipeline = context.training, context.groups, context.training.eval_batches, context.place.pipeline
    tally, counted = (context.backend.tally() for _ in range(2))
    parts: dict[str, np.ndarray] = {}
    own = range(groups.data.rank, len(batches), groups.data.size)
    for index in own or range(1):  # a replica without a batch still has to know the names
        context.at("evaluate", index)
        with users(training.is_own):
            batch = part_of(batches[index](), groups.mesh.expert, groups.coordinate.expert)
        if context.tables:
            batch, = with_rows(context, [batch])
        with users(training.is_own):
            found = pipeline.infer(groups.pipeline, batch) if pipeline else context.backend.metrics(batch)
            # of several stages only the last knows what came out
            pairs = {} if found is None else scalars(found, counted if own else tally, batch)
        for name, pair in pairs.items():
            table = parts.setdefault(name, np.zeros((len(batches), 2)))
            if own and groups.reports_losses:
                table[index] = pair
    if context.tables:
        for _ in range(len(own or range(1)), max(1, -(-len(batches) // groups.data.size))):
            with_rows(context, [])  # others look up their last batch
    names = agreed(groups.pipeline, sorted(parts))
    tables = [parts.get(name, np.zeros((len(batches), 2))).reshape(-1) for name in names]
    counts = np.zeros(0) if counted is None else counted.counts if groups.reports_losses else np.zeros_like(counted.counts)
    sums = context.gather("evaluate", np.concatenate([*tables, counts])).sum(axis=0)
    length = 2 * len(names) * len(batches)
    return figures(dict(zip(names, sums[:length].reshape(len(names), len(batches), 2), strict=True)), counted,
                   sums[length:])


def agreed(group: CollectiveGroup, names: list[str]) -> list[str]:
    """What the last stage reports."""
    if group.size == 1:
        return names
    text = np.frombuffer(json.dumps(names).encode(), np.uint8).copy()
    length = np.array([len(text)], np.int64)
    group.broadcast(length, group.size - 1)
    text = np.resize(text, int(length[0])) if group.rank != group.size - 1 else text
    group.broadcast(text, group.size - 1)
    return list(json.loads(text.tobytes()))


def measure(backend: Backend, tally: Tally | None, batch: Batch) -> dict[str, tuple[float, float]]:
    """Sums and weights of one batch; arrays, one value a row, go to the tally."""
    return scalars(backend.metrics(batch), tally, batch)


def scalars(found: Mapping[str, tuple[Any, float]], tally: Tally | None,
            batch: Batch) -> dict[str, tuple[float, float]]:
    if tally is not None:
        tally.add(batch, found)
        return {name: pair for name, pair in found.items() if not np.ndim(pair[0])}
    return {name: (float(np.reshape(total, ())), weight) for name, (total, weight) in found.items()}


def named(found: Mapping[str, tuple[Any, float]], tally: Tally | None) -> list[str]:
    """What an evaluation reports, from what `measure` has found in one batch."""
    tables = {name: np.array([pair], np.float64) for name, pair in found.items()}
    return sorted(figures(tables, tally, np.zeros(0) if tally is None else tally.counts))


def figures(tables: Mapping[str, np.ndarray], tally: Tally | None, counts: np.ndarray) -> dict[str, float]:
    """`tables`: by name, (batches, 2), the sum and weight of every batch; NaN where the weights are 0. `counts`: all
    members' tallies, added."""
    totals = {name: (math.fsum(table[:, 0]), math.fsum(table[:, 1])) for name, table in tables.items()}
    means = {name: total / weight if weight else math.nan for name, (total, weight) in totals.items()}
    return means if tally is None else {**means, **tally.figures(counts, means)}
