"""What a run will need, before it starts: parameters and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from elastic.backend import SLOTS
from elastic.errors import UserError
from elastic.mesh import rounds
from elastic.recipe import Recipe
from elastic.workload import open_model

PROCESS_BYTES = 350_000_000  # a worker's interpreter with Ray and a framework loaded
FLOAT_BYTES = 4


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
    """The most that the recipe's largest group needs: parameters, optimizer slots, gradient, subtree sums, two of communication."""
    model = open_model(recipe, info)
    if callable(getattr(model, "parameters", None)):
        parameters = sum(math.prod(p.shape) for p in model.parameters())
    else:
        parameters = sum(math.prod(spec.shape) for spec in model.parameters.values())
    shards = rounds(recipe.elastic.logical_shards, recipe.elastic.min_workers)
    copies = 1 + len(SLOTS[recipe.optimizer.name]) + 1 + math.ceil(math.log2(shards + 1)) + 2
    return Preview(parameters, parameters * FLOAT_BYTES * copies, recipe.elastic.max_workers + recipe.elastic.spares)


def check_memory(found: Preview, recipe: Recipe) -> None:
    """UserError where the largest group cannot fit on this machine."""
    total = psutil.virtual_memory().total
    if found.bytes > total:
        raise UserError(f"elastic.max_workers = {recipe.elastic.max_workers}: {found.workers} workers of {found.parameters} parameters need about "
                        f"{found.bytes / 1e9:.1f} GB, and this machine has {total / 1e9:.1f} GB; lower it or make the model smaller.")
