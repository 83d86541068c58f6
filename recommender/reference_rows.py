"""The row store written plainly in NumPy and dicts: the oracle for the others. Slow on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from elastic.tables.bags import Bags, Summed, check_ids, check_slopes, not_finite
from elastic.tables.buckets import buckets_of
from elastic.tables.row_store import MOST, NoRoom, Prepared
from elastic.tables.rows import Rows
from elastic.tables.spec import SWEEPS, RowUpdate, TableSpec
from elastic.tables.starts import key_of, starting_rows

LANES = 16
ZERO = np.float32(0)


@dataclass
class Row:
    """What is known of an id; without values it waits to be admitted."""

    count: int = 0
    last: int = 0
    values: np.ndarray | None = None
    slots: np.ndarray | None = None


class ReferenceRows:
    """`elastic.tables.row_store.RowStore`."""

    def __init__(self, spec: TableSpec, memory_bytes: int):
        self.spec, self.held = spec, frozenset[int]()
        self.limit, self._key = memory_bytes, key_of(spec.seed, spec.name)
        self._rows: dict[int, Row] = {}
        self._prepared: tuple[int, Summed, Prepared] | None = None

    @property
    def nbytes(self) -> int:
        return sum(16 + (4 * (self.spec.width + self.spec.num_slots) if row.values is not None else 0)
                   for row in self._rows.values())

    @property
    def disk_bytes(self) -> int:
        return 0

    def release(self) -> int:
        return 0

    def close(self) -> None:
        return

    def hold(self, buckets: Iterable[int]) -> None:
        self.held |= frozenset(buckets)

    def drop(self, buckets: Iterable[int]) -> None:
        self.held -= frozenset(buckets)
        self._rows = {id: row for id, row in self._rows.items() if self._bucket(id) in self.held}

    def lookup(self, bags: Bags) -> np.ndarray:
        bags.check(self.spec)
        return pool(self.read(bags.ids), np.arange(bags.ids.size), bags)

    def read(self, ids: np.ndarray) -> np.ndarray:
        self._check(ids)
        found = starting_rows(self._key, self.spec.init, ids, self.spec.width)
        for i, id in enumerate(ids.tolist()):
            if (row := self._rows.get(id)) and row.values is not None:
                found[i] = row.values
        return found

    def slots(self, ids: np.ndarray) -> np.ndarray:
        self._check(ids)
        found = np.zeros((ids.size, self.spec.num_slots), np.float32)
        for i, id in enumerate(ids.tolist()):
            if (row := self._rows.get(id)) and row.slots is not None:
                found[i] = row.slots
        return found

    def prepare(self, step: int, summed: Summed) -> Prepared:
        summed.check(self.spec)
        self._check(summed.ids)
        self._prepared = None
        before = [self._rows.get(id) or Row() for id in summed.ids.tolist()]
        is_trained = np.array([row.values is not None or row.count >= self.spec.admit for row in before], bool)
        after = {id: (row.count, row.last, row.values is not None) for id, row in self._rows.items()}
        for id, row, count in zip(summed.ids.tolist(), before, summed.counts.tolist()):
            total = min(row.count + count, MOST)
            after[id] = total, step, row.values is not None or total >= self.spec.admit
        bad = next((id for id, sum in zip(summed.ids.tolist(), summed.sums) if not np.isfinite(sum).all()), None)
        evicted = sorted(id for bucket in self.held for id in self._evicted(step, bucket, after))
        growth = sum(after[id][2] and row.values is None for id, row in zip(summed.ids.tolist(), before))
        if self.limit and self.nbytes + growth * 4 * (self.spec.width + self.spec.num_slots) > self.limit:
            raise NoRoom(f"table {self.spec.name}: embedding.memory_gb leaves it {self.limit} bytes, which have no "
                         f"room for {growth} rows more.")
        self._prepared = step, summed, Prepared(is_trained, np.array(evicted, np.int64), bad)
        return self._prepared[2]

    def _evicted(self, step: int, bucket: int, after: dict[int, tuple[int, int, bool]]) -> set[int]:
        spec = self.spec
        mine = {id: state for id, state in after.items() if self._bucket(id) == bucket}
        gone = set[int]()
        if spec.ttl_steps and (step + bucket) % max(1, spec.ttl_steps // SWEEPS) == 0:
            gone = {id for id, (_, last, _) in mine.items() if step - last > spec.ttl_steps}
        for kind in (True, False):
            left = sorted((count, last, id) for id, (count, last, is_stored) in mine.items() if is_stored is kind
                          and id not in gone)
            if spec.max_rows and len(left) > spec.bucket_rows:
                gone |= {id for _, _, id in left[:len(left) - (spec.bucket_rows - spec.bucket_rows // SWEEPS)]}
        return gone

    def squared_norms(self) -> np.ndarray:
        assert self._prepared
        _, summed, prepared = self._prepared
        found = np.zeros(self.spec.num_buckets)
        for id, sum, is_trained in zip(summed.ids.tolist(), summed.sums, prepared.is_trained):
            for value in sum[:self.spec.width * bool(is_trained)]:
                found[self._bucket(id)] += float(value) * float(value)
        return found

    def commit(self, update: RowUpdate) -> None:
        assert self._prepared
        step, summed, prepared = self._prepared
        if prepared.bad is not None:
            raise not_finite(self.spec, prepared.bad, step)
        self._prepared = None
        for id, sum, count, is_trained in zip(summed.ids.tolist(), summed.sums, summed.counts.tolist(),
                                              prepared.is_trained):
            row = self._rows.setdefault(id, Row())
            row.count, row.last = min(row.count + count, MOST), step
            if row.values is None and row.count >= self.spec.admit:
                row.values = starting_rows(self._key, self.spec.init, np.array([id]), self.spec.width)[0]
                row.slots = np.zeros(self.spec.num_slots, np.float32)
            if is_trained:
                assert row.values is not None and row.slots is not None
                apply(self.spec.optimizer, update, step, row.values, row.slots, sum)
        self.remove(prepared.evicted)

    def forget(self) -> None:
        self._prepared = None

    def export(self, bucket: int, after: int = -1) -> Rows:
        self._check_held(bucket)
        mine = sorted((id, row) for id, row in self._rows.items() if self._bucket(id) == bucket and row.last > after)
        stored, waiting = ([(id, row) for id, row in mine if (row.values is None) is is_waiting]
                           for is_waiting in (False, True))
        (ids, *ages), others = ([np.array(column, kind) for column, kind in (
            ([id for id, _ in part], np.int64), ([row.count for _, row in part], np.int32),
            ([row.last for _, row in part], np.int32))]
            for part in (stored, waiting))
        values = np.array([row.values for _, row in stored], np.float32).reshape(len(stored), self.spec.width)
        slots = np.array([row.slots for _, row in stored], np.float32).reshape(len(stored), self.spec.num_slots)
        return Rows(ids, values, slots, *ages, *others)

    def load(self, rows: Rows) -> None:
        rows.check(self.spec)
        self._check(np.concatenate([rows.ids, rows.waiting_ids]))
        for i, id in enumerate(rows.ids.tolist()):
            self._rows[id] = Row(int(rows.counts[i]), int(rows.lasts[i]), rows.values[i].copy(), rows.slots[i].copy())
        for id, count, last in zip(rows.waiting_ids.tolist(), rows.waiting_counts.tolist(),
                                   rows.waiting_lasts.tolist()):
            self._rows[id] = Row(count, last)

    def remove(self, ids: np.ndarray) -> None:
        self._check(ids)
        for id in ids.tolist():
            self._rows.pop(id, None)

    def _bucket(self, id: int) -> int:
        return int(buckets_of(self.spec, np.array([id]))[0])

    def _check(self, ids: np.ndarray) -> None:
        check_ids(self.spec, ids)
        for bucket in set(buckets_of(self.spec, ids).tolist()):
            self._check_held(bucket)

    def _check_held(self, bucket: int) -> None:
        if bucket not in self.held:
            raise ValueError(f"bucket {bucket} of table {self.spec.name} is not held here.")


def pool(rows: np.ndarray, index: np.ndarray, bags: Bags) -> np.ndarray:
    width = rows.shape[1]
    out = np.zeros(bags.shape(width), np.float32)
    flat = out.reshape(-1, width)
    offsets, targets = bags.runs
    for run, target in enumerate(targets.tolist()):
        for i in range(offsets[run], offsets[run + 1]):
            flat[target] += rows[index[i]] if bags.weights is None else bags.weights[i] * rows[index[i]]
        if bags.divisors is not None:
            flat[target] /= bags.divisors[run]
    return out


def apply(optimizer: str, update: RowUpdate, step: int, values: np.ndarray, slots: np.ndarray, sum: np.ndarray) -> None:
    """One row's step in place, as the frameworks' own sparse optimizers have it.

    Adagrad: Duchi et al. 2011; row-wise, one mean of squares a row: as in FBGEMM. Adam: Kingma and Ba 2015, on the
    touched rows alone.
    """
    lr, scale, decay, eps, beta1, rest1, beta2, rest2, bare_rate, root = update.numbers(step)
    gradient = sum * scale
    if decay:
        gradient = gradient + decay * values
    if optimizer == "sgd":
        values -= lr * gradient
    elif optimizer == "adagrad":
        slots += gradient * gradient
        values -= lr * gradient / (np.sqrt(slots) + eps)
    elif optimizer == "rowwise_adagrad":
        slots[0] += squares(gradient) / np.float32(gradient.size)
        values -= lr / (np.sqrt(slots[0]) + eps) * gradient
    else:
        moment, square = slots.reshape(2, -1)
        moment[:] = beta1 * moment + rest1 * gradient
        square[:] = beta2 * square + rest2 * gradient * gradient
        values -= bare_rate * moment / (np.sqrt(square) / root + eps)


def squares(gradient: np.ndarray) -> np.float32:
    """Of 16 lanes, each in order, then by halves."""
    lanes = np.zeros(LANES, np.float32)
    for first in range(0, gradient.size, LANES):
        part = gradient[first:first + LANES]
        lanes[:part.size] += part * part
    while lanes.size > 1:
        lanes = lanes[:lanes.size // 2] + lanes[lanes.size // 2:]
    return lanes[0]


class ReferenceKernels:
    """`elastic.tables.row_store.RowKernels`."""

    def create(self, spec: TableSpec, memory_bytes: int, disk_path: str = "") -> ReferenceRows:
        assert not disk_path, "it keeps rows in memory"
        return ReferenceRows(spec, memory_bytes)

    def distinct(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found, index = np.unique(ids, return_inverse=True)
        return found, index.reshape(-1)

    def pool(self, rows: np.ndarray, index: np.ndarray, bags: Bags) -> np.ndarray:
        return pool(rows, index, bags)

    def deduplicate(self, spec: TableSpec, bags: Bags, slopes: np.ndarray) -> Summed:
        bags.check(spec)
        check_slopes(spec, bags, slopes)
        flat, found, counts = slopes.reshape(-1, spec.width), dict[int, np.ndarray](), dict[int, int]()
        offsets, targets = bags.runs
        for run, target in enumerate(targets.tolist()):
            for i in range(offsets[run], offsets[run + 1]):
                bag = int(np.searchsorted(bags.offsets, i, "right")) - 1
                if bags.is_filler is not None and bags.is_filler[bag]:
                    continue
                slope = flat[target] if bags.divisors is None else flat[target] / bags.divisors[bag]
                id = int(bags.ids[i])
                found[id] = found.get(id, ZERO) + (slope if bags.weights is None else bags.weights[i] * slope)
                counts[id] = counts.get(id, 0) + 1
        ids = sorted(found)
        return Summed(np.array(ids, np.int64), np.array([found[id] for id in ids], np.float32).reshape(-1, spec.width),
                      np.array([counts[id] for id in ids], np.int32))

    def merge(self, left: Summed, right: Summed) -> Summed:
        sums, counts = dict(zip(left.ids.tolist(), left.sums)), dict(zip(left.ids.tolist(), left.counts.tolist()))
        for id, sum, count in zip(right.ids.tolist(), right.sums, right.counts.tolist()):
            sums[id] = sums[id] + sum if id in sums else sum
            counts[id] = counts.get(id, 0) + count
        ids = sorted(sums)
        return Summed(np.array(ids, np.int64), np.array([sums[id] for id in ids],
                                                        np.float32).reshape(-1, left.sums.shape[1]),
                      np.array([counts[id] for id in ids], np.int32))

    def update(self, spec: TableSpec, update: RowUpdate, step: int, values: np.ndarray, slots: np.ndarray,
               sums: np.ndarray) -> None:
        for value, slot, sum in zip(values, slots, sums):
            apply(spec.optimizer, update, step, value, slot, sum)


KERNELS = ReferenceKernels()
