"""The rows of all tables that one worker holds: what it owns, and what it keeps as a twin."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from elastic.tables.features import Tables
from elastic.tables.row_store import Prepared, RowStore, kernels
from elastic.tables.rows import digests
from elastic.tables.spec import TableSpec


class HeldTables:
    """`stores` by table. `owned` are the numbers of the buckets, the same for all tables, that this worker speaks for,
    and `twins` those that it keeps besides. All of them are of the step that the dense state is of."""

    def __init__(self, tables: Tables):
        self.tables, self.kernels = tables, kernels(tables.kernels)
        each = tables.memory_bytes // len(tables.specs)
        self.stores: dict[str, RowStore] = {spec.name: self.kernels.create(spec, each) for spec in tables.specs}
        self.owned: tuple[int, ...] = ()
        self.twins: tuple[int, ...] = ()
        self.prepared: dict[str, Prepared] = {}  # between a step's push and its commit

    @property
    def specs(self) -> tuple[TableSpec, ...]:
        return self.tables.specs

    @property
    def held(self) -> tuple[int, ...]:
        return tuple(sorted({*self.owned, *self.twins}))

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores.values())

    def begin(self, owned: Iterable[int], twins: Iterable[int]) -> None:
        """Holds these buckets without any rows."""
        self.owned = self.twins = ()
        self.trim()
        self.owned, self.twins = tuple(owned), tuple(twins)
        self.take(self.held)

    def take(self, buckets: Iterable[int]) -> None:
        """Finds room for buckets that are on their way here. They are not `held` before all of them are there."""
        wanted = set(buckets)
        for store in self.stores.values():
            store.hold(wanted - store.held)

    def trim(self) -> None:
        """Lets go of every bucket that is neither owned nor a twin's, as what was left of a move that was cut off."""
        held = set(self.held)
        for store in self.stores.values():
            store.drop(store.held - held)

    def forget(self) -> None:
        """Drops what was prepared for a step that is done anew."""
        self.prepared = {}
        for store in self.stores.values():
            store.forget()

    def digests(self, buckets: Iterable[int]) -> np.ndarray:
        """(buckets, tables, 2, 32) uint8: sha256 of a bucket's parameters, and of its state."""
        found = [[[list(bytes.fromhex(one)) for one in digests(self.stores[spec.name].export(bucket))]
                  for spec in self.specs] for bucket in buckets]
        return np.array(found, np.uint8).reshape(-1, len(self.specs), 2, 32)
