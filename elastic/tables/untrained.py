"""A batch as a model sees it before the first commit: every id has its starting row, whoever is to own it."""

from __future__ import annotations

from typing import Any

import numpy as np

from elastic.tables.features import BAGS, Tables, answered
from elastic.tables.row_store import kernels
from elastic.tables.starts import key_of, starting_rows


def with_starting_rows(tables: Tables | None, batch: Any) -> Any:
    """The batch with rows in the place of bags. UserError for bags that cannot be looked up."""
    if tables is None:
        return batch
    specs, pool = {spec.name: spec for spec in tables.specs}, kernels(tables.kernels).pool
    rows = {}
    for feature in tables.features:
        spec, bags = specs[feature.table], batch[BAGS][feature.name]
        bags.check(spec)
        starts = starting_rows(key_of(spec.seed, spec.name), spec.init, bags.ids, spec.width)
        rows[feature.name] = pool(starts, np.arange(bags.ids.size), bags)
    return answered(batch, rows)
