"""The rows of all tables that one worker holds: what it owns, and what it keeps as a twin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from elastic.tables.bags import Summed
from elastic.tables.features import BAGS, Tables, answered
from elastic.tables.removed import Removed
from elastic.tables.row_store import NoRoom, Prepared, RowStore, kernels
from elastic.tables.rows import Rows
from elastic.tables.spec import SWEEPS, RowUpdate, TableSpec

T = TypeVar("T")


class HeldTables:
    """`stores` by table. `owned` are the numbers of the buckets, the same for all tables, that this worker speaks for,
    and `twins` those that it keeps besides. `committed` is the step that all rows are of, -1 where there is none;
    `removed` is told what each commit evicts."""

    def __init__(self, tables: Tables):
        self.tables, self.kernels = tables, kernels(tables.kernels)
        self.stores: dict[str, RowStore] = {spec.name: self.kernels.create(spec, tables.memory_bytes, tables.disk_path)
                                            for spec in tables.specs}
        self.owned: tuple[int, ...] = ()
        self.twins: tuple[int, ...] = ()
        self.committed = -1
        self.removed = Removed()
        self.prepared: dict[str, Prepared] = {}  # between a step's push and its commit
        self.changed: tuple[np.ndarray, ...] = ()  # by the commit of what was prepared last: the ids, table by table
        # what it owns and keeps as a twin from the step at hand on, where that is not what it has
        self.next: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def specs(self) -> tuple[TableSpec, ...]:
        return self.tables.specs

    @property
    def held(self) -> tuple[int, ...]:
        return tuple(sorted({*self.owned, *self.twins}))

    @property
    def stale(self) -> tuple[int, ...]:
        """The buckets that are others' from the step at hand on. They get no sums of it, and its commit lets them go; until then
        their rows are here for the case that the step is done anew."""
        return tuple(sorted({*self.held}.difference(*self.next))) if self.next else ()

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return sum(store.nbytes for store in self.stores.values())

    def begin(self, owned: Iterable[int], twins: Iterable[int], step: int = -1) -> None:
        """Holds these buckets, of `step`, without any rows."""
        self.keep((), ())
        self.removed.clear()
        self.owned, self.twins, self.committed = tuple(owned), tuple(twins), step
        self.take(self.held)

    def keep(self, owned: tuple[int, ...], twins: tuple[int, ...]) -> None:
        """Lets go of every other bucket, and of what was left of a move that was cut off."""
        self.owned, self.twins, self.next = owned, twins, None
        held = set(self.held)
        self.removed.end({*range(self.tables.num_buckets)} - held)
        for store in self.stores.values():
            store.drop(store.held - held)

    def take(self, buckets: Iterable[int]) -> None:
        """Finds room for buckets that are on their way here. They are not `held` before all of them are there."""
        wanted = set(buckets)
        for store in self.stores.values():
            self.with_room(store, partial(store.hold, wanted - store.held))

    def with_room(self, store: RowStore, call: Callable[[], T]) -> T:
        """A call of a store that may take what the others leave it of all tables' memory, and these send rows to disk
        where that is not enough."""
        while True:
            self._limit(store)
            try:
                return call()
            except NoRoom:
                if not sum([other.release() for other in self.stores.values() if other is not store]):
                    raise

    def load(self, parts: Sequence[Rows]) -> None:
        """Takes over what another member has sent, bucket by bucket, of each every table's rows."""
        for number in range(0, len(parts), len(self.stores)):
            for store, rows in zip(self.stores.values(), parts[number:]):
                self.load_into(store, rows)

    def load_into(self, store: RowStore, rows: Rows) -> None:
        self.with_room(store, partial(store.load, rows))

    def prepare(self, step: int, sums: Mapping[str, Summed]) -> None:
        """Finds room for what the commit of `step` will do, table by table. Whoever lacks it comes first in the next
        try: what the others have prepared is dropped when they give up memory."""
        stores = list(self.stores.values())
        for tries in range(len(stores) + SWEEPS):
            self.prepared = {}
            try:
                for store in stores:
                    self._limit(store)
                    self.prepared[store.spec.name] = store.prepare(step, sums[store.spec.name])
                self.changed = tuple(changes(sums[spec.name].ids, self.prepared[spec.name]) for spec in self.specs)
                return
            except NoRoom:
                short = stores.pop(len(self.prepared))
                if not sum([other.release() for other in stores]) or tries == len(self.stores) + SWEEPS - 1:
                    raise
                stores.insert(0, short)

    def _limit(self, store: RowStore) -> None:
        """What the others leave it of all tables' memory."""
        if self.tables.memory_bytes:
            store.limit = max(1, self.tables.memory_bytes - self.nbytes + store.nbytes)

    def close(self) -> None:
        """Gives back what the tables have of the disk; they are used no more."""
        for store in self.stores.values():
            store.close()

    def look_up(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with what its features look up in the place of its bags. For a worker that holds every bucket."""
        rows = {one.name: self.stores[one.table].lookup(batch[BAGS][one.name]) for one in self.tables.features}
        return answered(batch, rows)

    def commit(self, step: int, updates: dict[str, RowUpdate]) -> None:
        """Carries out what was prepared. The rows are torn (-1) until all tables have."""
        self.committed = -1
        for name, store in self.stores.items():
            store.commit(updates[name])
            self.removed.note(step, name, self.prepared[name].evicted)
        if self.next:
            self.keep(*self.next)
        self.prepared, self.committed = {}, step

    def forget(self) -> None:
        """Drops what was prepared for a step that is done anew. What was stale is not: it is of the step before."""
        self.prepared, self.next = {}, None
        for store in self.stores.values():
            store.forget()


def changes(ids: np.ndarray, prepared: Prepared) -> np.ndarray:
    """Of which ids a lookup gives something else after the commit; ascending."""
    trained = ids[prepared.is_trained]
    return np.union1d(trained, prepared.evicted) if prepared.evicted.size else trained
