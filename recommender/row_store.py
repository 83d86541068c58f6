"""The row store on compiled kernels: an index for each bucket, and the rows of all of them in common slabs, or on disk.

A bucket's index grows by itself. Rows of buckets that were dropped and of ids that were evicted leave places, which are
taken again. Places differ between stores of equal content; nothing that a store answers does. What a commit touches is
in memory since it was prepared. One thread at a time may call a store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from elastic.tables.bags import Bags, Summed, check_ids, not_finite
from elastic.tables.eviction import evicted, sweeps
from elastic.tables.row_store import MOST, Prepared
from elastic.tables.rows import Rows
from elastic.tables.spec import RowUpdate, TableSpec
from elastic.tables.starts import key_of, levels
from recommender import index_kernels as index
from recommender import row_kernels
from recommender.cold_rows import Pages
from recommender.index_kernels import CAPACITY, COLD, COUNT, EMPTY, FIRST, PLACE
from recommender.row_places import ENTRY_BYTES, NONE, SIZES, RowPlaces, is_stored
from recommender.slabs import FLOAT, address, on_a_line

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


class CompiledRows(RowPlaces):
    """`elastic.tables.row_store.RowStore`. Without `pages` all rows are in memory."""

    def __init__(self, spec: TableSpec, memory_bytes: int, pages: Pages | None = None):
        super().__init__(spec, memory_bytes, pages)
        self._start = np.uint64(key_of(spec.seed, spec.name)), levels(spec.init)
        self._runs: list[int] = []  # places of static buckets that were dropped
        self._work: Work | None = None

    def hold(self, buckets: Iterable[int]) -> None:
        new = sorted(set(buckets) - self.held)
        rows = self.spec.vocabulary_rows
        capacity = rows if self._is_static else SIZES[0]
        self._room(ENTRY_BYTES * capacity * len(new))
        self._find_places(rows * max(0, len(new) - len(self._runs)))
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
                index.give_all(self._index[bucket][0][:, PLACE].astype(np.int64), *self._places, *self._pages)
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
        places, numbers = self._found(ids)
        is_here, found = places >= 0, np.zeros((ids.size, self.spec.num_slots), np.float32)
        found[is_here] = self._rows_at(places[is_here])[1]
        if self.cold is not None:
            away = np.flatnonzero(~is_here)[numbers >= 0]
            found[away] = self._cut(self.cold.get(numbers[numbers >= 0]))[1]
        return found

    def prepare(self, step: int, summed: Summed) -> Prepared:
        summed.check(self.spec)
        summed = in_order(summed)
        self._work = None
        found = self._weigh(self.spec.admit, summed.ids, summed.counts)
        if self._grow(found.new):
            found = self._weigh(self.spec.admit, summed.ids, summed.counts)
        self._warm(found)
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
        has_row = is_stored(entries[chosen, PLACE])
        stored, waiting = chosen[has_row], chosen[~has_row]
        values, slots = self._rows_at(entries[stored, PLACE].astype(np.int64))
        return Rows(ids[stored], values, slots, entries[stored, COUNT], lasts[stored], ids[waiting], entries[waiting, COUNT], lasts[waiting])

    def load(self, rows: Rows) -> None:
        rows.check(self.spec)
        self._work = None
        self._grow(np.sum([self._weigh(NEVER, ids, np.zeros(ids.size, np.int32)).new
                           for ids in (rows.ids, rows.waiting_ids)], axis=0))
        hot, cold, numbers = self._shared_out(rows)
        self.remove(np.concatenate([rows.ids, rows.waiting_ids]))
        places = self._enter(0, rows.ids[hot], rows.counts[hot], rows.lasts[hot])
        self._put(places, rows.values[hot], rows.slots[hot])
        self._enter(NEVER, rows.ids[cold], rows.counts[cold], rows.lasts[cold])
        self._enter(NEVER, rows.waiting_ids, rows.waiting_counts, rows.waiting_lasts)
        found = self._weigh(NEVER, rows.ids[cold], rows.counts[cold])
        index.move(self._heads, found.buckets, found.entries, COLD - numbers)
        np.add.at(self._stored, found.buckets, 1)

    def _shared_out(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which of the rows to load go to memory, the last used as far as there is room, and which to disk, where they
        are from now on under these numbers."""
        num = self._weigh(0, rows.ids, np.zeros(rows.ids.size, np.int32)).admitted.sum()
        if self.cold is None:
            self._find_places(int(num))
            return np.arange(rows.ids.size), NONE, NONE
        self._add_slabs(rows.ids.size)
        order = np.argsort(-rows.lasts, kind="stable")
        hot, cold = (np.sort(part) for part in np.split(order, [self._slabs.room]))
        return hot, cold, self.cold.put(np.concatenate([rows.values[cold], rows.slots[cold]], axis=1))

    def _enter(self, admit: int, ids: np.ndarray, counts: np.ndarray, lasts: np.ndarray) -> np.ndarray:
        """Of ids that are not there, counts and last steps; the places of those that are stored."""
        found = self._weigh(admit, ids, counts)
        places, entries = np.empty(ids.size, np.int64), ids >> self._shift if self._is_static else np.full(ids.size, -1)
        self._settle(admit, ids, counts, lasts, found.buckets, entries, places, np.empty(ids.size, np.int64))
        return places

    def remove(self, ids: np.ndarray) -> None:
        check_ids(self.spec, ids)
        self._weigh(0, ids, np.zeros(ids.size, np.int32))
        self._work = None
        self._remove(ids, np.empty(ids.size, np.int64))

    # rows
    def _found(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each id's place, and of those that have none in memory the numbers on disk, or -1."""
        places, numbers = np.empty(ids.size, np.int64), np.empty(0 if self.cold is None else ids.size, np.int32)
        missing = index.locate(self._heads, self._shift, self._is_static, ids, places, numbers)
        self._check_held(missing)
        return places, numbers[:missing]

    def _located(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each id's place, and the rows of those that have none in memory: as they are on disk, or begin."""
        places, numbers = self._found(ids)
        missing = ids[places < 0]
        spare = np.empty((missing.size, self.spec.width), np.float32)
        if missing.size:
            row_kernels.start(np.array([address(spare)]), row_kernels.WHOLE, self.spec.width, *self._start, missing,
                              np.arange(missing.size))
        if self.cold is not None and (numbers >= 0).any():
            spare[numbers >= 0] = self._cut(self.cold.get(numbers[numbers >= 0]))[0]
        return places, spare

    def _warm(self, found: Weighed) -> None:
        """Brings in the rows on disk that a commit will update, and finds room for those that it will add."""
        num = int(found.admitted.sum())
        if self.cold is None:
            self._find_places(num)
            return
        away = np.flatnonzero(self._places_of(found.buckets, found.entries) <= COLD)
        records = self.cold.get(COLD - self._places_of(found.buckets[away], found.entries[away]))
        self._find_places(num + away.size, found.buckets, found.entries)
        self._bring(found.buckets[away], found.entries[away], records)

    def release(self) -> int:
        self._work = None
        return super().release()

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
        index.remove(self._heads, self._shift, self._is_static, ids, self._used, self._stored, *self._places,
                     *self._pages, places)
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
            places[at] = np.where(is_stored(places[at]) | (counts[at] >= spec.admit), 0, index.WAITING)
            there = places != EMPTY
            found.append(evicted(spec, step, bucket, ids[there], counts[there], lasts[there],
                                 is_stored(places[there])))
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
