"""Reading the tables of a checkpoint, by the buckets that are asked for alone: what they build on first, each byte against
its hash before anything of it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from elastic.checkpoint.manifest import Manifest, TableEntry, folder_of
from elastic.checkpoint.part import hash_of
from elastic.checkpoint.reader import read_range
from elastic.checkpoint.table_file import WHOLE, Bucket, decode, spec_of
from elastic.errors import BadCheckpoint, RecipeError
from elastic.storage.store import Store
from elastic.tables.row_store import RowStore
from elastic.tables.rows import Rows
from elastic.tables.spec import TableSpec

WINDOW = 16 * 1024 * 1024  # bytes of neighbours that are read in one go
Note = Callable[[int], None]  # bytes that were read
Place = tuple[TableEntry, int]  # where a bucket lies: a file, and its number among the file's buckets


class TableReader:
    """The tables of one checkpoint. `manifests`: by step, of it and of all that it builds on (`manager.open_tables`).
    `bytes` counts what was read."""

    def __init__(self, store: Store, name: str, manifest: Manifest, manifests: Mapping[int, Manifest]):
        self.store, self.name, self.manifest, self.manifests = store, name, manifest, manifests
        self.bytes = 0
        self._places: dict[tuple[int, str], dict[int, Place]] = {}

    def specs(self) -> dict[str, TableSpec]:
        """The tables by name, in order."""
        return specs_of(self.manifest)

    def fill(self, store: RowStore, buckets: Iterable[int], note: Note = lambda read: None,
             load: Callable[[Rows], None] | None = None) -> None:
        """Puts buckets into a store that holds them without rows, by `load` or the store's own. RecipeError where it is
        another table's."""
        check_spec(self.manifest, store.spec)
        load = load or store.load
        for _, bucket in self._in_steps(store.spec.name, buckets, note):
            store.remove(bucket.removed)
            load(bucket.rows)

    def rows(self, table: str, buckets: Iterable[int] | None = None) -> Iterator[tuple[int, Rows]]:
        """(number, all its rows) of every bucket, or of these, in order; a window of them is in memory at a time."""
        wanted = range(self.specs()[table].num_buckets) if buckets is None else sorted(set(buckets))
        for group in self._groups(table, wanted):
            found: dict[int, Rows] = {}
            for _, bucket in self._in_steps(table, group):
                older = found.get(bucket.number)
                found[bucket.number] = bucket.rows if older is None else applied(older, bucket)
            for number in group:
                yield number, found[number]

    def check_file(self, entry: TableEntry) -> None:
        """All bytes of one of the checkpoint's own files, those too that no bucket has."""
        digest = xxhash.xxh3_128()
        for low in range(0, entry.bytes, WINDOW):
            digest.update(self._bytes(self.manifest.step, entry, low, min(entry.bytes, low + WINDOW)))
        if digest.hexdigest() != entry.hash:
            raise BadCheckpoint(f"{self.name}/{entry.name} does not have the hash that the manifest states.")

    def chain(self, table: str, bucket: int) -> list[int]:
        """The steps of the checkpoints that make up a bucket, oldest first."""
        steps = [self.manifest.step]
        while (base := self._base(steps[-1], table, bucket)) != WHOLE:
            steps.append(base)
        return steps[::-1]

    def _base(self, step: int, table: str, bucket: int) -> int:
        entry, number = self._at(step, table, bucket)
        return entry.bases[number]

    def _at(self, step: int, table: str, bucket: int) -> Place:
        places = self._places.get((step, table))
        if places is None:
            entries = [entry for entry in self.manifests[step].tables if entry.table == table]
            mine = next(entry for entry in self.manifest.tables if entry.table == table)
            if any(entry.kind != mine.kind for entry in entries):
                raise BadCheckpoint(f"{self.name} builds on {folder_of(step)}, whose table {table} is another.")
            places = {bucket: (entry, number) for entry in entries for number, bucket in enumerate(entry.buckets)}
            self._places[step, table] = places
        if bucket not in places:
            raise BadCheckpoint(f"{self.name} builds on {folder_of(step)}, which has no bucket {bucket} of table {table}.")
        return places[bucket]

    def _groups(self, table: str, buckets: Sequence[int]) -> Iterator[list[int]]:
        group, size = list[int](), 0
        for bucket in buckets:
            group.append(bucket)
            places = (self._at(step, table, bucket) for step in self.chain(table, bucket))
            size += sum(entry.sizes[number] for entry, number in places)
            if size >= WINDOW:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _in_steps(self, table: str, buckets: Iterable[int], note: Note = lambda read: None
                  ) -> Iterator[tuple[int, Bucket]]:
        """What all of the buckets' checkpoints say of them, the oldest checkpoint first."""
        wanted: dict[int, list[int]] = {}
        for bucket in sorted(set(buckets)):
            for step in self.chain(table, bucket):
                wanted.setdefault(step, []).append(bucket)
        for step in sorted(wanted):
            for found in self._read(step, [self._at(step, table, bucket) for bucket in wanted[step]], note):
                yield step, found

    def _read(self, step: int, places: Collection[Place], note: Note) -> Iterator[Bucket]:
        """In the order of files; neighbours in one go."""
        by_file: dict[str, tuple[TableEntry, list[int]]] = {}
        for entry, number in places:
            by_file.setdefault(entry.name, (entry, []))[1].append(number)
        for entry, numbers in by_file.values():
            for low, high in runs(entry, numbers):
                content = self._bytes(step, entry, entry.offsets[low], entry.offsets[high - 1] + entry.sizes[high - 1])
                note(len(content))
                for number in range(low, high):
                    yield decode(checked(content, step, entry, number, low), entry, number)

    def _bytes(self, step: int, entry: TableEntry, low: int, high: int) -> memoryview:
        where = f"{folder_of(step)}/{entry.name}" if step != self.manifest.step else f"{self.name}/{entry.name}"
        content = read_range(self.store, where, low, high, entry.bytes)
        self.bytes += len(content)
        return memoryview(content)


def checked(content: memoryview, step: int, entry: TableEntry, number: int, first: int) -> memoryview:
    """A bucket's bytes, of those from bucket `first` on."""
    begins, size = entry.offsets[number], entry.sizes[number]
    part = content[begins - entry.offsets[first]:][:size]
    if hash_of(part) != entry.hashes[number]:
        raise BadCheckpoint(f"{folder_of(step)}/{entry.name} does not have the hash that the manifest states, in bytes "
                            f"{begins} to {begins + size - 1}.")
    return part


def runs(entry: TableEntry, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Numbers low..high-1 that lie one behind the other, a window of bytes at a time."""
    low = high = -1
    for number in sorted(numbers):
        is_next = number == high and entry.offsets[number] == entry.offsets[number - 1] + entry.sizes[number - 1]
        if not is_next or entry.offsets[number] - entry.offsets[low] >= WINDOW:
            if high > low:
                yield low, high
            low = number
        high = number + 1
    if high > low:
        yield low, high


def applied(older: Rows, bucket: Bucket) -> Rows:
    """A bucket after an increment."""
    new = bucket.rows
    gone = np.concatenate([bucket.removed, new.ids, new.waiting_ids])
    stays, waits = ~np.isin(older.ids, gone), ~np.isin(older.waiting_ids, gone)

    def joined(kept: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        parts = [(getattr(older, name)[kept], getattr(new, name)) for name in names]
        order = np.argsort(np.concatenate(parts[0]), kind="stable")
        return [np.concatenate(pair)[order] for pair in parts]

    return Rows(*joined(stays, ("ids", "values", "slots", "counts", "lasts")),
                *joined(waits, ("waiting_ids", "waiting_counts", "waiting_lasts")))


def specs_of(manifest: Manifest) -> dict[str, TableSpec]:
    """The tables of a checkpoint by name, in order."""
    return {entry.table: spec_of(entry) for entry in sorted(manifest.tables, key=lambda entry: entry.table)}


def check_tables(manifest: Manifest, specs: Mapping[str, TableSpec]) -> None:
    """RecipeError unless the checkpoint has these tables, and no others."""
    there = specs_of(manifest)
    if lacking := sorted({*specs} - {*there}):
        raise RecipeError(f"tables.{lacking[0]}: the checkpoint of step {manifest.step} has no rows of this table, but "
                          f"of {', '.join(there) or 'none'}; put [tables] back as they were, or start a new run.")
    if more := sorted({*there} - {*specs}):
        raise RecipeError(f"tables.{more[0]} is missing: the checkpoint of step {manifest.step} has rows of this table; "
                          "put [tables] back as they were, or start a new run.")
    for spec in specs.values():
        check_spec(manifest, spec)


def check_spec(manifest: Manifest, spec: TableSpec) -> None:
    """RecipeError where the rows of a table would not fit into a store of `spec`."""
    was = specs_of(manifest)[spec.name]
    key = f"tables.{spec.name}"
    for name, now, then in ((f"{key}.width", spec.width, was.width), (f"{key}.optimizer", spec.optimizer, was.optimizer),
                            ("embedding.buckets", spec.num_buckets, was.num_buckets)):
        if now != then:
            raise RecipeError(f"{name} = {show(now)} does not fit the checkpoint of step {manifest.step}, which has "
                              f"{show(then)}; put it back, or start a new run.")
    if spec.vocabulary != was.vocabulary:
        kinds = [f"a vocabulary of {one.vocabulary} ids" if one.vocabulary else "any ids, growing"
                 for one in (spec, was)]
        raise RecipeError(f"{key} has {kinds[0]}, and in the checkpoint of step {manifest.step} {kinds[1]}; put it back, "
                          "or start a new run.")


def show(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
