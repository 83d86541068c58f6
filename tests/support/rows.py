"""Tables for tests: specs, random bags, what all of a store holds, and two stores side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from elastic.tables.bags import Bags, Summed
from elastic.tables.row_store import RowStore
from elastic.tables.rows import digests
from elastic.tables.spec import TableSpec


def spec(**changes: Any) -> TableSpec:
    return TableSpec(**{"name": "ads", "width": 5, "num_buckets": 4, "init": "normal:0.1", "seed": 3, **changes})


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def summed(at: dict[int, float], width: int = 5, count: int = 1) -> Summed:
    """Each id's sum is this number in all columns."""
    chosen = sorted(at)
    sums = np.repeat(np.array([at[id] for id in chosen], np.float32)[:, None], width, axis=1)
    return Summed(ids(*chosen), sums, np.full(len(chosen), count, np.int32))


def random_bags(luck: np.random.Generator, choices: np.ndarray, pooling: str, is_weighted: bool, size: int = 6,
                most: int = 5) -> Bags:
    lengths = luck.integers(0, most + 1, size)
    weights = luck.standard_normal(lengths.sum()).astype(np.float32) if is_weighted else None
    return Bags(luck.choice(choices, lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]), weights, pooling, most,
                luck.random(size) < 0.2)


def random_sums(luck: np.random.Generator, choices: np.ndarray, width: int) -> Summed:
    found = np.unique(luck.choice(choices, luck.integers(0, choices.size)))
    return Summed(found, luck.standard_normal((found.size, width)).astype(np.float32),
                  luck.integers(1, 4, found.size).astype(np.int32))


def whole(store: RowStore) -> dict[int, tuple[str, str]]:
    """The digests of all buckets that it holds."""
    return {bucket: digests(store.export(bucket)) for bucket in sorted(store.held)}


def listed(store: RowStore) -> dict[int, tuple[bytes, ...]]:
    """All that a store holds, by id, whatever its buckets are."""
    found: dict[int, tuple[bytes, ...]] = {}
    for bucket in store.held:
        rows = store.export(bucket)
        for i, id in enumerate(rows.ids.tolist()):
            found[id] = tuple(column[i].tobytes() for column in (rows.values, rows.slots, rows.counts, rows.lasts))
        for i, id in enumerate(rows.waiting_ids.tolist()):
            found[id] = rows.waiting_counts[i].tobytes(), rows.waiting_lasts[i].tobytes()
    return found


def assert_same(found: Any, wanted: Any) -> None:
    """Arrays, or dataclasses of them: same dtype, shape and bits."""
    if isinstance(found, np.ndarray):
        assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape,
                                                               wanted.tobytes()), (found, wanted)
        return
    assert vars(found).keys() == vars(wanted).keys()
    for name, value in vars(found).items():
        if isinstance(value, np.ndarray):
            assert_same(value, vars(wanted)[name])
        else:
            assert value == vars(wanted)[name], name
