"""Where the compiled store's rows lie: the index of every row in memory, and beside it as many rows as there is room
for; the others, those whose last step is longest ago, on disk.

Nothing that a store answers depends on it. Rows leave memory a portion of a bucket at a time, so that no look through
all of them is needed.
"""

from __future__ import annotations

import numpy as np

from elastic.humanize import size
from elastic.tables.row_store import NoRoom
from elastic.tables.spec import SWEEPS, TableSpec
from recommender import index_kernels as index
from recommender import row_kernels
from recommender.cold_rows import ColdRows, Pages
from recommender.index_kernels import CAPACITY, COLD, EMPTY, FIRST, PLACE
from recommender.slabs import FLOAT, SLAB_BYTES, Indexes, Slabs, address

LOAD = 0.75  # of an index: how full it gets
# of indexes, in entries: each half as much again as the one before
SIZES = [4 * round(2 * 1.5 ** step) for step in range(60)]
ENTRY_BYTES = index.ENTRY_BYTES + 4  # with its last step
SLABS = 64  # that a limit is cut into: so much of the memory can go at a time
BATCH = 1 << 16  # rows that leave together
NO_PAGES = np.empty(0, np.uint8)
NONE = np.empty(0, np.int64)


def is_stored(places: np.ndarray) -> np.ndarray:
    """bool: in memory or on disk."""
    return (places >= 0) | (places <= COLD)


class RowPlaces:
    """`held` buckets' indexes and rows. `cold` is None where all rows are in memory."""

    def __init__(self, spec: TableSpec, memory_bytes: int, pages: Pages | None):
        self.spec, self.held = spec, frozenset[int]()
        self.limit, self._is_static = memory_bytes, spec.vocabulary > 0
        self._shift = spec.num_buckets.bit_length() - 1
        self._heads = np.zeros((spec.num_buckets, 4), np.int64)
        self._index: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # entries and last steps
        self._used, self._stored = np.zeros(spec.num_buckets, np.int64), np.zeros(spec.num_buckets, np.int64)
        self.cold = None if pages is None else ColdRows(pages, spec.width + spec.num_slots)
        slab_bytes = SLAB_BYTES if self.cold is None else memory_bytes // SLABS
        self._slabs, self._indexes = Slabs(spec.width, spec.num_slots, slab_bytes), Indexes()
        self._turn = 0  # the bucket whose rows are the next to leave

    @property
    def nbytes(self) -> int:
        return (self._slabs.nbytes + int(self._heads[:, CAPACITY].sum()) * ENTRY_BYTES
                + (0 if self.cold is None else self.cold.nbytes))

    @property
    def disk_bytes(self) -> int:
        return 0 if self.cold is None else self.cold.disk_bytes

    @property
    def _places(self) -> tuple[np.ndarray, np.ndarray, int, int]:
        return self._slabs.pool, self._slabs.values, self._slabs.shift, FLOAT * self.spec.width

    @property
    def _pages(self) -> tuple[np.ndarray, int]:
        return (NO_PAGES, 0) if self.cold is None else (self.cold.rows, self.cold.shift)

    # room in memory
    def _room(self, index_bytes: int) -> None:
        """Makes sure that an index may take so much more. `NoRoom`, and nothing anybody can see has changed, where it
        may not."""
        over = self.nbytes + index_bytes - self.limit
        if self.limit and over > 0 and self.cold is not None and self._slabs.values.size:
            self._give_up(max(-(-over // self._slabs.slab_bytes), self._slabs.values.size // SWEEPS))
            over = self.nbytes + index_bytes - self.limit
        if self.limit and over > 0:
            raise self._no_room(self.nbytes + index_bytes)

    def _grow(self, new: np.ndarray) -> bool:
        """Finds room for so many new entries by bucket; whether an index has grown, so that entries lie elsewhere."""
        if self._is_static:
            return False
        capacities = self._heads[:, CAPACITY]
        wanted = self._used + new
        tight = np.flatnonzero(wanted > LOAD * capacities)
        if not tight.size:
            return False
        larger = np.array([next(size for size in SIZES if LOAD * size >= num) for num in wanted[tight].tolist()],
                          np.int64)
        self._room(ENTRY_BYTES * int((larger - capacities[tight]).sum()))
        for bucket, capacity in zip(tight.tolist(), larger.tolist()):
            old = self._ids(bucket), *self._index[bucket]
            self._open(bucket, capacity)
            index.rehash(self._heads, bucket, *old)
        return True

    def _open(self, bucket: int, capacity: int) -> None:
        """An empty index."""
        self._index[bucket] = entries, lasts = self._indexes.take(capacity)
        entries[:, PLACE] = EMPTY
        self._heads[bucket, :FIRST] = address(entries), address(lasts), capacity

    def _ids(self, bucket: int) -> np.ndarray:
        """Of its entries; of one that is empty, any."""
        entries = self._index[bucket][0]
        return bucket + (np.arange(len(entries)) << self._shift) if self._is_static else entries[:, :PLACE].view(np.int64)[:, 0]

    def _find_places(self, num: int, buckets: np.ndarray = NONE, entries: np.ndarray = NONE) -> None:
        """Makes sure that so many places for rows can be taken; the rows of these entries stay in memory. `NoRoom`
        where they cannot."""
        if self._add_slabs(num) and self.cold is not None:
            self._spill(num, buckets, entries)
        if num > self._slabs.room:
            raise self._no_room(self.nbytes + self._slabs.lacking(num) * self._slabs.slab_bytes)

    def _add_slabs(self, num: int) -> int:
        """As many as the limit admits of those that so many places want; how many are lacking."""
        lacking = self._slabs.lacking(num)
        allowed = max(0, self.limit - self.nbytes) // self._slabs.slab_bytes if self.limit else lacking
        if allowed >= lacking or self.cold is not None:
            self._slabs.add(min(lacking, allowed), ahead=not self.limit)
        return max(0, lacking - allowed)

    def _no_room(self, wanted: int) -> NoRoom:
        return NoRoom(f"table {self.spec.name} needs {size(wanted)} of memory, and embedding.memory_gb leaves it "
                      f"{size(self.limit)} here; raise that, add workers, or set its max_rows, ttl_steps or admit.")

    def close(self) -> None:
        if self.cold is not None:
            self.cold.pages.close()

    # between memory and disk
    def release(self) -> int:
        """`elastic.tables.row_store.RowStore.release`."""
        before, slabs = self.nbytes, self._slabs.values.size
        if self.cold is not None and slabs:
            self._give_up(max(1, slabs // SWEEPS))
        return before - self.nbytes

    def _spill(self, num: int, buckets: np.ndarray, entries: np.ndarray) -> None:
        """Sends rows to disk, bucket by bucket the longest unused, until so many places are free or nothing is left to
        go."""
        assert self.cold is not None
        pinned = dict[int, np.ndarray]()
        for bucket, mine in grouped(buckets[entries >= 0], entries[entries >= 0]):
            pinned[bucket] = mine
        chosen, size, idle, is_sparse = list[tuple[int, np.ndarray]](), 0, 0, self.cold.is_sparse()
        order = sorted(self.held)
        at = int(np.searchsorted(order, self._turn)) if order else 0
        while num - self._slabs.room > size and idle < len(order):
            bucket = order[at % len(order)]
            at, idle = at + 1, idle + 1
            leaving = self._oldest(bucket, pinned.get(bucket, NONE))
            if leaving.size:
                chosen.append((bucket, np.append(leaving, self._scattered(bucket)) if is_sparse else leaving))
                size, idle = size + leaving.size, 0
            if size >= BATCH or at % len(order) == 0:
                self._send(chosen)
                chosen, size = [], 0
        self._turn = order[at % len(order)] if order else 0
        self._send(chosen)

    def _oldest(self, bucket: int, pinned: np.ndarray) -> np.ndarray:
        """The entries of a portion of a bucket's rows in memory: at least a page's, and more than a sixteenth."""
        assert self.cold is not None
        entries, lasts = self._index[bucket]
        may_go = entries[:, PLACE] >= 0
        may_go[pinned] = False
        there = np.flatnonzero(may_go)
        num = min(there.size, max(there.size // SWEEPS, 1 << self.cold.shift))
        return there[np.argpartition(lasts[there], num - 1)[:num]] if num else there

    def _scattered(self, bucket: int) -> np.ndarray:
        """The entries of a bucket's rows in pages that are mostly gaps, which are written anew in fuller ones."""
        assert self.cold is not None
        places = self._index[bucket][0][:, PLACE].astype(np.int64)
        there = np.flatnonzero(places <= COLD)
        return there[self.cold.in_sparse_pages(COLD - places[there])]

    def _send(self, chosen: list[tuple[int, np.ndarray]]) -> None:
        """Rows go to disk, by bucket and entry. UserError, and they stay where they are, where it has no room."""
        if not chosen:
            return
        assert self.cold is not None
        entries = np.concatenate([mine for _, mine in chosen])
        buckets = np.repeat([bucket for bucket, _ in chosen], [mine.size for _, mine in chosen])
        places = self._places_of(buckets, entries)
        numbers = self.cold.put(np.concatenate(self._rows_at(places), axis=1))
        index.move(self._heads, buckets, entries, COLD - numbers)
        index.give_all(places, *self._places, *self._pages)

    def _give_up(self, slabs: int) -> None:
        """Lets the last slabs go; the rows there go to disk."""
        left = max(0, self._slabs.values.size - slabs)
        bound, chosen, size = left << self._slabs.shift, list[tuple[int, np.ndarray]](), 0
        for bucket in sorted(self.held):
            there = np.flatnonzero(self._index[bucket][0][:, PLACE] >= bound)
            chosen.append((bucket, there))
            size += there.size
            if size >= BATCH:
                self._send(chosen)
                chosen, size = [], 0
        if size:
            self._send(chosen)
        index.keep_below(bound, *self._places)
        self._slabs.cut(left)

    def _bring(self, buckets: np.ndarray, entries: np.ndarray, records: np.ndarray) -> None:
        """The rows of these entries are in memory from now on, as `records` has them. There are places for them."""
        assert self.cold is not None
        places = np.empty(entries.size, np.int64)
        self.cold.let_go(COLD - self._places_of(buckets, entries))
        index.take_all(*self._places, places)
        self._put(places, *self._cut(records))
        index.move(self._heads, buckets, entries, places)

    def _places_of(self, buckets: np.ndarray, entries: np.ndarray) -> np.ndarray:
        places = np.empty(entries.size, np.int64)
        index.places_of(self._heads, buckets, entries, places)
        return places

    def _rows_at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and slots, in memory or on disk; zeros where there is no row."""
        width, num_slots = self.spec.width, self.spec.num_slots
        values, slots = np.empty((places.size, width), np.float32), np.empty((places.size, num_slots), np.float32)
        row_kernels.copy(self._slabs.values, self._slabs.shift, width, 0, places, address(values))
        row_kernels.copy(self._slabs.slots, self._slabs.shift, num_slots, 0, places, address(slots))
        if self.cold is not None:
            there = np.flatnonzero(places <= COLD)
            if there.size:
                values[there], slots[there] = self._cut(self.cold.get(COLD - places[there]))
        return values, slots

    def _cut(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return records[:, :self.spec.width], records[:, self.spec.width:]

    def _put(self, places: np.ndarray, values: np.ndarray, slots: np.ndarray) -> None:
        values, slots = np.ascontiguousarray(values), np.ascontiguousarray(slots)
        row_kernels.put(self._slabs.values, self._slabs.shift, self.spec.width, places, address(values))
        row_kernels.put(self._slabs.slots, self._slabs.shift, self.spec.num_slots, places, address(slots))


def grouped(buckets: np.ndarray, entries: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The entries of each bucket."""
    order = np.argsort(buckets, kind="stable")
    numbers, firsts = np.unique(buckets[order], return_index=True)
    return list(zip(numbers.tolist(), np.split(entries[order], firsts[1:])))
