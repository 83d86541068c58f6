"""The rows of all tables that one worker holds: what it owns, and what it keeps as a twin."""

from __future__ import annotations

from elastic.tables.buckets import Holders
from elastic.tables.features import Tables
from elastic.tables.removed import Removed
from elastic.tables.row_store import RowStore, kernels


class HeldTables:
    """`stores` by table. `owned` and `held` are bucket numbers, the same for all tables; `committed` is the step that
    all rows are of, -1 where there is none; `removed` is told what each commit evicts."""

    def __init__(self, tables: Tables):
        self.tables, self.kernels = tables, kernels(tables.kernels)
        self.stores: dict[str, RowStore] = {spec.name: self.kernels.create(spec, tables.memory_bytes)
                                            for spec in tables.specs}
        self.owned: tuple[int, ...] = ()
        self.held: tuple[int, ...] = ()
        self.committed = -1
        self.removed = Removed()

    def hold_as(self, member: str, holders: Holders) -> None:
        """Holds a member's buckets, those that are new without rows, and lets all others go."""
        self.owned, held = tuple(holders.owned(member)), set(holders.held(member))
        self.removed.end({*range(self.tables.num_buckets)} - held.intersection(self.held))  # others may miss something
        for store in self.stores.values():
            store.drop(store.held - held)
            store.hold(held - store.held)
        self.held = tuple(sorted(held))
