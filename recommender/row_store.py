"""The row store on compiled kernels: an index for each bucket, and the rows of all of them in common slabs.

A bucket's index grows by itself; a row never moves. Rows of buckets that were dropped and of ids that were evicted
leave places, which are taken again. Places differ between stores of equal content; nothing that a store answers does.
One thread at a time may call a store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from elastic.errors import UserError
from elastic.humanize import size
from elastic.tables.bags import Bags, Summed, check_ids, not_finite
from elastic.tables.eviction import evicted, sweeps
from elastic.tables.row_store import MOST, Prepared
from elastic.tables.rows import Rows
from elastic.tables.spec import RowUpdate, TableSpec
from elastic.tables.starts import key_of, levels
from recommender import index_kernels as index
from recommender import row_kernels
from recommender.index_kernels import CAPACITY, COUNT, EMPTY, FIRST, PLACE
from recommender.slabs import FLOAT, Indexes, Slabs, address, on_a_line

LOAD = 0.75  # of an index: how full it gets
# of indexes, in entries: each half as much again as the one before
SIZES = [4 * round(2 * 1.5 ** step) for step in range(60)]
ENTRY_BYTES = index.ENTRY_BYTES + 4  # with its last step
OPTIMIZERS = {"sgd": row_kernels.SGD, "adagrad": row_kernels.ADAGRAD, "rowwise_adagrad": row_kernels.ROWWISE_ADAGRAD,
              "adam": row_kernels.ADAM}
NEVER = MOST + 1  # as `admit`: nobody appears so often
NO_FLOATS = np.empty(0, np.float32)


@dataclass(frozen=True)
class Weighed:
    """Of ids that are to be counted: each one's bucket, entry (-1: none yet) and whether it is trained; by bucket, how
    many are new, and admitted."""

    buckets: np.ndarray
    entries: np.ndarray
    is_trained: np.ndarray
    new: np.ndarray
    admitted: np.ndarray


@dataclass(frozen=True)
class Work:
    """What was prepared, with all the room that its commit needs."""

    step: int
    summed: Summed
    prepared: Prepared
    found: Weighed
    lasts: np.ndarray
    places: np.ndarray
    new_places: np.ndarray
    evicted_places: np.ndarray


class CompiledRows:
    """`elastic.tables.row_store.RowStore`."""

    def __init__(self, spec: TableSpec, memory_bytes: int):
        self.spec, self.held = spec, frozenset[int]()
        self.limit, self._is_static = memory_bytes, spec.vocabulary > 0
        self._start = np.uint64(key_of(spec.seed, spec.name)), levels(spec.init)
        self._shift = spec.num_buckets.bit_length() - 1
        self._heads = np.zeros((spec.num_buckets, 4), np.int64)
        self._index: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # entries and last steps
        self._used, self._stored = np.zeros(spec.num_buckets, np.int64), np.zeros(spec.num_buckets, np.int64)
        self._slabs, self._indexes = Slabs(spec.width, spec.num_slots), Indexes()
        self._runs: list[int] = []  # places of static buckets that were dropped
        self._work: Work | None = None

    @property
    def nbytes(self) -> int:
        return self._slabs.nbytes + int(self._heads[:, CAPACITY].sum()) * ENTRY_BYTES

    def hold(self, buckets: Iterable[int]) -> None:
        new = sorted(set(buckets) - self.held)
        rows = self.spec.vocabulary_rows
        capacity = rows if self._is_static else SIZES[0]
        self._make_room(ENTRY_BYTES * capacity * len(new), rows * max(0, len(new) - len(self._runs)))
        for bucket in new:
            self._open(bucket, capacity)
            if self._is_static:
                self._heads[bucket, FIRST] = first = self._runs.pop() if self._runs else self._slabs.run(rows)
                ids = self._ids(bucket)
                self._begin(ids, np.where(ids < self.spec.vocabulary, first + np.arange(rows), -1))
        self.held |= frozenset(new)

    def drop(self, buckets: Iterable[int]) -> None:
        gone = self.held & frozenset(buckets)
        self.held -= gone
        for bucket in gone:
            if self._is_static:
                self._runs.append(int(self._heads[bucket, FIRST]))
            else:
                index.give_all(self._index[bucket][0], *self._places)
            del self._index[bucket]
            self._heads[bucket] = 0
            self._used[bucket] = self._stored[bucket] = 0  # an index of a bucket that is not held never grows

    def lookup(self, bags: Bags) -> np.ndarray:
        bags.check(self.spec)
        places, spare = self._located(bags.ids)
        width = self.spec.width
        return pooled(row_kernels.addresses(self._slabs.values, self._slabs.shift, FLOAT * width, address(spare),
                                            places), width, bags)

    def read(self, ids: np.ndarray) -> np.ndarray:
        check_ids(self.spec, ids)
        places, spare = self._located(ids)
        out = np.empty((ids.size, self.spec.width), np.float32)
        row_kernels.copy(self._slabs.values, self._slabs.shift, self.spec.width, address(spare), places, address(out))
        return out

    def slots(self, ids: np.ndarray) -> np.ndarray:
        check_ids(self.spec, ids)
        return self._slots_at(self._located(ids)[0])

    def prepare(self, step: int, summed: Summed) -> Prepared:
        summed.check(self.spec)
        summed = in_order(summed)
        self._work = None
        found = self._weigh(self.spec.admit, summed.ids, summed.counts)
        if self._reserve(found.new, int(found.admitted.sum())):
            found = self._weigh(self.spec.admit, summed.ids, summed.counts)
        gone = self._evicted(step, summed, found)
        bad = row_kernels.first_bad(address(summed.sums), summed.ids.size, self.spec.width)
        prepared = Prepared(found.is_trained, gone, int(summed.ids[bad]) if bad >= 0 else None)
        num = summed.ids.size
        self._work = Work(step, summed, prepared, found, np.full(num, step, np.int32), np.empty(num, np.int64),
                          np.empty(num, np.int64),
                          np.empty(gone.size, np.int64))
        return prepared

    def squared_norms(self) -> np.ndarray:
        assert self._work
        out = np.zeros(self.spec.num_buckets)
        row_kernels.squared_norms(self._work.found.buckets, self._work.prepared.is_trained, self._work.summed.sums, out)
        return out

    def commit(self, update: RowUpdate) -> None:
        assert self._work
        work, summed, slabs, spec = self._work, self._work.summed, self._slabs, self.spec
        if work.prepared.bad is not None:
            raise not_finite(spec, work.prepared.bad, work.step)
        self._work = None
        self._settle(spec.admit, summed.ids, summed.counts, work.lasts, work.found.buckets, work.found.entries,
                     work.places, work.new_places)
        self._begin(summed.ids, work.new_places)
        row_kernels.update(OPTIMIZERS[spec.optimizer], slabs.values, slabs.slots, slabs.shift, spec.width,
                           spec.num_slots, work.places,
                           work.prepared.is_trained, address(summed.sums), tuple(update.numbers(work.step)))
        self._remove(work.prepared.evicted, work.evicted_places)

    def forget(self) -> None:
        self._work = None

    def export(self, bucket: int, after: int = -1) -> Rows:
        if bucket not in self.held:
            self._check_held(-1 - bucket)
        ids, (entries, lasts) = self._ids(bucket), self._index[bucket]
        chosen = np.flatnonzero((entries[:, PLACE] != EMPTY) & (lasts > after))
        chosen = chosen[np.argsort(ids[chosen])]
        is_stored = entries[chosen, PLACE] >= 0
        stored, waiting = chosen[is_stored], chosen[~is_stored]
        places = entries[stored, PLACE].astype(np.int64)
        values = np.empty((stored.size, self.spec.width), np.float32)
        row_kernels.copy(self._slabs.values, self._slabs.shift, self.spec.width, 0, places, address(values))
        return Rows(ids[stored], values, self._slots_at(places), entries[stored, COUNT], lasts[stored],
                    ids[waiting], entries[waiting, COUNT], lasts[waiting])

    def load(self, rows: Rows) -> None:
        rows.check(self.spec)
        self._work = None
        parts = (rows.ids, rows.counts, rows.lasts), (rows.waiting_ids, rows.waiting_counts, rows.waiting_lasts)
        weighed = [self._weigh(admit, ids, counts) for admit, (ids, counts, _) in zip((0, NEVER), parts)]
        self._reserve(weighed[0].new + weighed[1].new, int(weighed[0].admitted.sum()))
        self.remove(np.concatenate([rows.ids, rows.waiting_ids]))
        for admit, (ids, counts, lasts), found in zip((0, NEVER), parts, weighed):
            places, entries = np.empty(ids.size, np.int64), ids >> self._shift if self._is_static else np.full(ids.size, -1)
            self._settle(admit, ids, counts, lasts, found.buckets, entries, places, np.empty(ids.size, np.int64))
            if ids is rows.ids:
                values, slots = np.ascontiguousarray(rows.values), np.ascontiguousarray(rows.slots)
                row_kernels.put(self._slabs.values, self._slabs.shift, self.spec.width, places, address(values))
                row_kernels.put(self._slabs.slots, self._slabs.shift, self.spec.num_slots, places, address(slots))

    def remove(self, ids: np.ndarray) -> None:
        check_ids(self.spec, ids)
        self._weigh(0, ids, np.zeros(ids.size, np.int32))
        self._work = None
        self._remove(ids, np.empty(ids.size, np.int64))

    # memory
    def _make_room(self, index_bytes: int, places: int) -> None:
        """Adds the slabs that so many places need. UserError, and nothing changed, where that and the index's bytes are
        too much."""
        slabs = self._slabs.lacking(places)
        wanted = self.nbytes + index_bytes + slabs * self._slabs.slab_bytes
        if self.limit and wanted > self.limit:
            raise UserError(f"table {self.spec.name} needs {size(wanted)} of memory, and embedding.memory_gb leaves it "
                            f"{size(self.limit)} here; raise that, add workers, or set its max_rows, ttl_steps or admit.")
        self._slabs.add(slabs)

    def _reserve(self, new: np.ndarray, places: int) -> bool:
        """Finds room for so many new entries by bucket, and rows; whether an index has grown, so that entries lie
        elsewhere."""
        if self._is_static:
            return False
        capacities = self._heads[:, CAPACITY]
        wanted = self._used + new
        tight = np.flatnonzero(wanted > LOAD * capacities)
        larger = np.array([next(size for size in SIZES if LOAD * size >= num) for num in wanted[tight].tolist()],
                          np.int64)
        self._make_room(ENTRY_BYTES * int((larger - capacities[tight]).sum()), places)
        for bucket, capacity in zip(tight.tolist(), larger.tolist()):
            old = self._ids(bucket), *self._index[bucket]
            self._open(bucket, capacity)
            index.rehash(self._heads, bucket, *old)
        return tight.size > 0

    def _open(self, bucket: int, capacity: int) -> None:
        """An empty index."""
        self._index[bucket] = entries, lasts = self._indexes.take(capacity)
        entries[:, PLACE] = EMPTY
        self._heads[bucket, :FIRST] = address(entries), address(lasts), capacity

    @property
    def _places(self) -> tuple[np.ndarray, np.ndarray, int, int]:
        return self._slabs.pool, self._slabs.values, self._slabs.shift, FLOAT * self.spec.width

    # rows
    def _ids(self, bucket: int) -> np.ndarray:
        """Of its entries; of one that is empty, any."""
        entries = self._index[bucket][0]
        return bucket + (np.arange(len(entries)) << self._shift) if self._is_static else entries[:, :PLACE].view(np.int64)[:, 0]

    def _located(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each id's place, and the starting rows of those that have none."""
        places = np.empty(ids.size, np.int64)
        missing = index.locate(self._heads, self._shift, self._is_static, ids, places)
        self._check_held(missing)
        spare = np.empty((missing, self.spec.width), np.float32)
        if missing:
            row_kernels.start(np.array([address(spare)]), row_kernels.WHOLE, self.spec.width, *self._start,
                              ids[places < 0], np.arange(missing))
        return places, spare

    def _slots_at(self, places: np.ndarray) -> np.ndarray:
        out = np.empty((places.size, self.spec.num_slots), np.float32)
        row_kernels.copy(self._slabs.slots, self._slabs.shift, self.spec.num_slots, 0, places, address(out))
        return out

    def _weigh(self, admit: int, ids: np.ndarray, counts: np.ndarray) -> Weighed:
        new, admitted = (np.zeros(self.spec.num_buckets, np.int64) for _ in range(2))
        found = Weighed(np.empty(ids.size, np.int64), np.empty(ids.size, np.int64), np.empty(ids.size, bool), new,
                        admitted)
        self._check_held(index.weigh(self._heads, self._shift, self._is_static, admit, ids, counts, found.buckets,
                                     found.entries,
                                     found.is_trained, new, admitted))
        return found

    def _begin(self, ids: np.ndarray, places: np.ndarray) -> None:
        """Starting rows, and slots of zeros, for the ids that have a place here."""
        row_kernels.start(self._slabs.values, self._slabs.shift, self.spec.width, *self._start, ids, places)
        row_kernels.put(self._slabs.slots, self._slabs.shift, self.spec.num_slots, places, 0)

    def _settle(self, admit: int, ids: np.ndarray, counts: np.ndarray, lasts: np.ndarray, buckets: np.ndarray,
                entries: np.ndarray,
                places: np.ndarray, new_places: np.ndarray) -> None:
        index.settle(self._heads, self._shift, self._is_static, admit, ids, counts, lasts, buckets, entries, self._used,
                     self._stored, *self._places,
                     places, new_places)

    def _remove(self, ids: np.ndarray, places: np.ndarray) -> None:
        index.remove(self._heads, self._shift, self._is_static, ids, self._used, self._stored, *self._places, places)
        if self._is_static:
            self._begin(ids, places)

    def _evicted(self, step: int, summed: Summed, weighed: Weighed) -> np.ndarray:
        """The ids that go, by entries as they will be after the updates."""
        spec, most, buckets, entries = self.spec, self.spec.bucket_rows or MOST, weighed.buckets, weighed.entries
        stored = self._stored + weighed.admitted
        is_due = sweeps(spec, step, np.arange(spec.num_buckets)) | (stored > most) | (self._used + weighed.new - stored > most)
        found = [np.empty(0, np.int64)]
        for bucket in np.flatnonzero(is_due & (self._heads[:, CAPACITY] > 0)).tolist():
            held, lasts = self._index[bucket]
            mine = np.flatnonzero(buckets == bucket)
            old, fresh = mine[entries[mine] >= 0], mine[entries[mine] < 0]
            ids, lasts = np.append(self._ids(bucket), summed.ids[fresh]), np.append(lasts, np.full(fresh.size, step))
            places = np.append(held[:, PLACE], np.full(fresh.size, EMPTY))
            counts = np.append(held[:, COUNT].astype(np.int64), np.zeros(fresh.size, np.int64))
            at = np.concatenate([entries[old], np.arange(ids.size - fresh.size, ids.size)])
            before = np.where(places[at] == EMPTY, 0, counts[at])
            counts[at] = np.minimum(before + summed.counts[np.concatenate([old, fresh])], MOST)
            lasts[at] = step
            places[at] = np.where((places[at] >= 0) | (counts[at] >= spec.admit), 0, index.WAITING)
            there = places != EMPTY
            found.append(evicted(spec, step, bucket, ids[there], counts[there], lasts[there], places[there] >= 0))
        return np.sort(np.concatenate(found))

    def _check_held(self, answer: int) -> None:
        if answer < 0:
            raise ValueError(f"bucket {-1 - answer} of table {self.spec.name} is not held here.")


def in_order(summed: Summed) -> Summed:
    """Row after row in memory, as kernels want it."""
    return Summed(*(np.ascontiguousarray(array) for array in (summed.ids, summed.sums, summed.counts)))


def pooled(rows: np.ndarray, width: int, bags: Bags) -> np.ndarray:
    """Of rows by their addresses, one for each of the bags' ids."""
    out = on_a_line(bags.shape(width))
    if bags.pooling == "none":
        out[:] = 0
    offsets, targets = bags.runs
    row_kernels.pool(rows, width, offsets, targets, NO_FLOATS if bags.weights is None else bags.weights,
                     NO_FLOATS if bags.divisors is None else bags.divisors, address(out))
    return out
