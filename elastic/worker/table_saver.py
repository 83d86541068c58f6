"""A worker's tables in checkpoints: copies of what it owns, whole or since a base; and the way back."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from elastic.checkpoint.manager import open_tables, read_manifest
from elastic.checkpoint.manifest import Manifest, TableEntry, folder_of
from elastic.checkpoint.table_file import NO_IDS, WHOLE, Bucket, table_name, write_table
from elastic.checkpoint.table_reader import applied
from elastic.errors import BadCheckpoint, RunFailed
from elastic.messages import Save
from elastic.storage.store import Store
from elastic.tables.held import HeldTables
from elastic.tables.spec import TableSpec


@dataclass(frozen=True)
class Copied:
    """What a save writes, table by table; `depths`: on how many increments each bucket will lie.

    Buckets in `merged` are to be whole, and only what has changed since `base` is copied: the rest comes from the files.
    """

    tables: tuple[tuple[TableSpec, Iterable[Bucket]], ...]
    depths: dict[int, int]
    base: int
    merged: frozenset[int]


class TableSaver:
    """Makes each save an increment on the newest checkpoint of its own that is known to be committed, and each
    `full_every`-th of a bucket whole. It needs to agree with nobody: every bucket says itself what it builds on.

    So what is copied at a step boundary is what has changed, and all of a bucket where it has no base.

    `depths`: of the saves that the next may build on, by step and bucket.
    """

    def __init__(self, held: HeldTables, full_every: int):
        self.held, self.full_every = held, full_every
        self.depths: dict[int, dict[int, int]] = {}

    def base(self, step: int, is_there: Callable[[int], bool]) -> int:
        """The newest step below `step` to build on whose checkpoint is there; -1 for none. What is older will not be asked
        for again."""
        base = next((one for one in sorted(self.depths, reverse=True) if one < step and is_there(one)), WHOLE)
        if base >= 0:
            self.depths = {step: depths for step, depths in self.depths.items() if step >= base}
            self.held.removed.forget(base)
        return base

    def copy(self, order: Save, base: int, is_alone: bool = False) -> Copied:
        """As of the step; while others wait for the save anyway a bucket is copied when its turn to be written has come.

        `is_alone`: of all that is held, for owners may be gone. RunFailed where the rows are of another step, or where
        nobody else can have what is not held.
        """
        held = self.held
        if held.committed != order.step:
            raise RunFailed(f"The rows of the embedding tables are of step {held.committed}, not {order.step}; resume "
                            "the run.")
        if is_alone and order.world_size == 1:
            self.check_all()
        buckets = held.held if is_alone else held.owned
        before, since = self.depths.get(base, {}), held.removed.since
        depths, merged = dict[int, int](), set[int]()
        for bucket in sorted(buckets):
            based = bucket in before and since.get(bucket, order.step) <= base
            depths[bucket] = before[bucket] + 1 if based and before[bucket] + 1 < self.full_every else 0
            if based and not depths[bucket] and not order.wait:
                merged.add(bucket)
        held.removed.begin([bucket for bucket in held.owned if bucket not in since], order.step)
        based_on = merged.union(bucket for bucket, depth in depths.items() if depth)
        tables = tuple((spec, self._buckets(spec, base, order.step, list(depths), based_on)) for spec in held.tables.specs)
        return Copied(tables if order.wait else tuple((spec, list(found)) for spec, found in tables), depths, base,
                      frozenset(merged))

    def _buckets(self, spec: TableSpec, base: int, step: int, buckets: Iterable[int], based: Container[int]
                 ) -> Iterator[Bucket]:
        store, removed = self.held.stores[spec.name], self.held.removed.between(spec, base, step)
        for bucket in buckets:
            if bucket in based:
                yield Bucket(bucket, store.export(bucket, base), base, removed.get(bucket, NO_IDS))
            else:
                yield Bucket(bucket, store.export(bucket))

    def check_all(self) -> None:
        """RunFailed unless this worker has every bucket."""
        if lacking := sorted({*range(self.held.tables.num_buckets)} - {*self.held.held}):
            raise RunFailed(f"Buckets {lacking[0]} to {lacking[-1]} of the embedding tables are kept by other workers, "
                            f"{len(lacking)} of {self.held.tables.num_buckets}; resume the run.")

    @property
    def specs(self) -> dict[str, TableSpec]:
        """By name."""
        return {spec.name: spec for spec in self.held.tables.specs}

    def failed(self, error: Exception) -> None:
        """A save was not written. After a base that cannot be read the next one is of all rows here."""
        if isinstance(error, BadCheckpoint):
            self.depths.clear()

    def written(self, step: int, copied: Copied) -> None:
        """All files of a save are durable."""
        self.depths[step] = copied.depths

    def restore(self, store: Store, name: str, manifest: Manifest, is_place: bool,
                at: Callable[[int], AbstractContextManager[Any]]) -> int:
        """Puts into the stores what the checkpoint has of the buckets that are held, in place of what they had; the
        bytes that were read.

        `is_place`: the next saves go to the same place, and may build on this one. The rows count once the caller says so.
        """
        held, reads = self.held, iter(range(1 << 62))

        def note(read: int) -> None:
            with at(next(reads)):  # nobody to wait for, but a sign of life
                pass

        held.committed, self.depths = -1, {}
        held.removed.clear()
        reader = open_tables(store, name, manifest)
        for rows in held.stores.values():
            rows.drop(rows.held)
            held.with_room(rows, partial(rows.hold, held.held))
            reader.fill(rows, held.held, note, partial(held.load_into, rows))
        held.removed.begin(held.held, manifest.step)
        if is_place and name == folder_of(manifest.step):
            self.depths[manifest.step] = {bucket: max(len(reader.chain(spec.name, bucket)) - 1
                                                      for spec in held.tables.specs) for bucket in held.held}
        return reader.bytes


def made_whole(store: Store, copied: Copied, spec: TableSpec, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
    """The buckets, those in `copied.merged` with what the base has of them. BadCheckpoint where it cannot be read."""
    if copied.merged:
        name = folder_of(copied.base)
        older = open_tables(store, name, read_manifest(store, name)).rows(spec.name, copied.merged)
    for bucket in buckets:
        if bucket.number in copied.merged:
            number, rows = next(older)
            assert number == bucket.number
            bucket = Bucket(number, applied(rows, bucket))
        yield bucket


def write_tables(store: Store, order: Save, copied: Copied, progress: Callable[[int], None], kind: str = "rows",
                 begun: Callable[[str], None] = lambda name: None) -> list[TableEntry]:
    """Writes a rank's files, one a table. `progress(bytes)`; `begun(name)` before each file."""
    done, entries = 0, list[TableEntry]()

    def note(bytes: int) -> None:
        progress(done + bytes)

    for number, (spec, buckets) in enumerate(copied.tables):
        name = table_name(number, spec.name, order.rank, order.world_size, order.generation, kind)
        begun(name)
        entries.append(write_table(store, folder_of(order.step), name, spec, order.step,
                                   made_whole(store, copied, spec, buckets), note))
        done += entries[-1].bytes
    return entries
