"""What an evaluation adds up: means over all rows, and a model's own figures over whole numbers that were counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from elastic.backend import Backend, Batch, Tally


def measure(backend: Backend, tally: Tally | None, batch: Batch) -> dict[str, tuple[float, float]]:
    """Sums and weights of one batch; arrays, one value a row, go to the tally."""
    found = backend.metrics(batch)
    if tally is not None:
        tally.add(batch, found)
    return {name: pair for name, pair in found.items() if not np.ndim(pair[0])}


def figures(tables: Mapping[str, np.ndarray], tally: Tally | None, counts: np.ndarray) -> dict[str, float]:
    """`tables`: by name, (batches, 2), the sum and weight of every batch; NaN where the weights are 0. `counts`: all members' tallies, added."""
    totals = {name: (math.fsum(table[:, 0]), math.fsum(table[:, 1])) for name, table in tables.items()}
    means = {name: total / weight if weight else math.nan for name, (total, weight) in totals.items()}
    return means if tally is None else {**means, **tally.figures(counts, means)}


def tally_of(model: Any) -> Tally | None:
    """A new one, of a model that counts."""
    return model.tally() if hasattr(model, "tally") else None
