"""Checkpoints of tables for tests: random rows as a dict, stores filled with them, and checkpoints without a saver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from elastic.checkpoint.manager import commit, folder_of
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.table_file import WHOLE, Bucket, table_name, write_table
from elastic.storage.store import Store
from elastic.tables.buckets import buckets_of
from elastic.tables.row_store import RowStore, kernels
from elastic.tables.rows import Rows
from elastic.tables.spec import TableSpec

Row = tuple[np.ndarray | None, np.ndarray | None, int, int]  # values and slots, if it is stored; count, last step
Table = dict[int, Row]  # the oracle: all of a table, by id


def random_table(spec: TableSpec, luck: np.random.Generator, num: int, step: int) -> Table:
    return {id: random_row(spec, luck, step) for id in random_ids(spec, luck, num)}


def random_ids(spec: TableSpec, luck: np.random.Generator, num: int) -> list[int]:
    low, high = (0, spec.vocabulary) if spec.vocabulary else (-1 << 63, (1 << 63) - 1)
    return sorted({*luck.integers(low, high, num).tolist()})


def random_row(spec: TableSpec, luck: np.random.Generator, step: int) -> Row:
    count, last = int(luck.integers(1, 9)), int(luck.integers(max(1, step - 5), step + 1))
    if spec.admit and luck.random() < 0.4:
        return None, None, count, last
    return (luck.standard_normal(spec.width).astype(np.float32), luck.random(spec.num_slots).astype(np.float32), count,
            last)


def changed(spec: TableSpec, luck: np.random.Generator, table: Table, base: int, step: int) -> tuple[Table, list[int]]:
    """The table at `step`, of what it was at `base`; and what went away meanwhile, of which some has come again."""
    ids = sorted(table)
    gone = luck.choice(ids, len(ids) // 5, replace=False).tolist()
    after = {id: row for id, row in table.items() if id not in set(gone)}
    touched = {*luck.choice(ids, len(ids) // 4).tolist(), *random_ids(spec, luck, 7)}
    for id in sorted(touched):
        values, slots, count, _ = random_row(spec, luck, step)
        after[id] = values, slots, count, int(luck.integers(base + 1, step + 1))
    return after, sorted(gone)


def rows_of(spec: TableSpec, table: Mapping[int, Row]) -> Rows:
    stored = sorted(id for id, row in table.items() if row[0] is not None)
    waiting = sorted(id for id, row in table.items() if row[0] is None)

    def floats(at: int, width: int) -> np.ndarray:
        return np.array([table[id][at] for id in stored], np.float32).reshape(len(stored), width)

    def numbers(ids: Sequence[int], at: int) -> np.ndarray:
        return np.array([table[id][at] for id in ids], np.int32)

    return Rows(np.array(stored, np.int64), floats(0, spec.width), floats(1, spec.num_slots), numbers(stored, 2),
                numbers(stored, 3), np.array(waiting, np.int64), numbers(waiting, 2), numbers(waiting, 3))


def by_bucket(spec: TableSpec, table: Mapping[int, Row]) -> dict[int, Table]:
    ids = np.array(sorted(table), np.int64)
    found: dict[int, Table] = {bucket: {} for bucket in range(spec.num_buckets)}
    for id, bucket in zip(ids.tolist(), buckets_of(spec, ids).tolist()):
        found[bucket][id] = table[id]
    return found


def filled(kind: str, spec: TableSpec, table: Mapping[int, Row], buckets: Iterable[int] | None = None) -> RowStore:
    """A store of this kind that holds these buckets, or all."""
    store, chosen = kernels(kind).create(spec, 0), list(range(spec.num_buckets) if buckets is None else buckets)
    store.hold(chosen)
    parts = by_bucket(spec, table)
    store.load(rows_of(spec, {id: row for bucket in chosen for id, row in parts[bucket].items()}))
    return store


def owned(spec: TableSpec, size: int) -> list[list[int]]:
    """The buckets of each of `size` owners, scattered."""
    order = np.random.default_rng(size).permutation(spec.num_buckets).tolist()
    return [sorted(order[rank::size]) for rank in range(size)]


def write_checkpoint(place: Store, step: int, tables: Mapping[TableSpec, Mapping[int, Row]], size: int,
                     base: int = WHOLE, gone: Mapping[str, Sequence[int]] | None = None, generation: int = 1,
                     is_whole: Any = lambda bucket: False) -> Manifest:
    """A committed checkpoint of tables alone; with `base` an increment, of all buckets but those that `is_whole` says."""
    entries = []
    for rank in range(size):
        for number, (spec, table) in enumerate(tables.items()):
            parts = by_bucket(spec, table)
            away = by_bucket(spec, dict.fromkeys((gone or {}).get(spec.name, ()), (None, None, 0, 0)))
            buckets = []
            for bucket in owned(spec, size)[rank]:
                if base == WHOLE or is_whole(bucket):
                    buckets.append(Bucket(bucket, rows_of(spec, parts[bucket])))
                else:
                    new = {id: row for id, row in parts[bucket].items() if row[3] > base}
                    buckets.append(Bucket(bucket, rows_of(spec, new), base, np.array(sorted(away[bucket]), np.int64)))
            name = table_name(number, spec.name, rank, size, generation)
            entries.append(write_table(place, folder_of(step), name, spec, step, buckets))
    manifest = Manifest(step, generation, step * 12, 7, "recipe", tables=tuple(entries))
    commit(place, manifest)
    return manifest


def assert_holds(store: RowStore, spec: TableSpec, table: Mapping[int, Row], buckets: Iterable[int]) -> None:
    """These buckets of it, to the bit, and nothing else."""
    parts = by_bucket(spec, table)
    assert store.held == frozenset(buckets)
    for bucket in store.held:
        assert_rows(store.export(bucket), rows_of(spec, parts[bucket]))


def assert_rows(found: Rows, wanted: Rows) -> None:
    for one, other in zip(found.arrays, wanted.arrays):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), (found, wanted)
