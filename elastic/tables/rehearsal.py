"""A step's and a move's calls on one row, before the first: what is compiled, or read where it lies compiled, is there then."""

from __future__ import annotations

import numpy as np

from elastic.tables.bags import Bags
from elastic.tables.buckets import buckets_of
from elastic.tables.features import Tables
from elastic.tables.row_store import kernels


def rehearse_rows(tables: Tables) -> None:
    """On a store of its own in memory; all tables' kernels are the same."""
    spec, found = tables.specs[0], kernels(tables.kernels)
    ids = np.zeros(1, np.int64)
    bags, bucket = Bags(ids, np.array([0, 1])), int(buckets_of(spec, ids)[0])
    store = found.create(spec, 0)
    store.hold([bucket])
    found.pool(store.read(ids), found.distinct(ids)[1], bags)
    leaf = found.deduplicate(spec, bags, store.lookup(bags))
    store.prepare(1, found.merge(leaf, leaf))
    store.squared_norms()
    store.commit(tables.updates[spec.name])
    store.load(store.export(bucket))
    store.close()
