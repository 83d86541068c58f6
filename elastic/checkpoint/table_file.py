"""One owner's file of one table: an Arrow IPC file with a record batch a bucket, each of one row, so that lists of rows, of
ids that wait and of ids that went away lie side by side, each as long as it is.

    bucket, base: int      the checkpoint that the lists build on, by its step; -1: they are all of the bucket
    ids, values, slots, counts, lasts: a list each, of the rows: values and slots are lists of fixed size
    waiting_ids, waiting_counts, waiting_lasts: of the ids that are not admitted yet
    removed: the ids that went away since the base; one of them may be among the rows again

Ids rise in every list. The schema's metadata has the format's version and what the table is.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from pyarrow import ipc

from elastic.checkpoint.manifest import TableEntry
from elastic.checkpoint.part import hash_of
from elastic.errors import BadCheckpoint, NonFiniteLoss, UserError
from elastic.storage.store import Store
from elastic.tables.buckets import buckets_of
from elastic.tables.rows import Rows
from elastic.tables.spec import TableSpec

FORMAT = 1
WHOLE = -1  # as a base
COLUMNS = tuple(one.name for one in fields(Rows))
NO_IDS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Bucket:
    """What one file says of one bucket. Without a base `rows` are all of it; else those that changed since, and
    `removed` what went away since."""

    number: int
    rows: Rows
    base: int = WHOLE
    removed: np.ndarray = field(default_factory=lambda: NO_IDS)


def table_name(number: int, table: str, rank: int, world_size: int, generation: int, kind: str = "rows") -> str:
    """With the table's number, because not every table's name, a column's, does for a file."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "", table)[:40]
    return f"{kind}-{rank:04d}-of-{world_size:04d}-g{generation:06d}.{number:03d}-{plain}.arrow"


def spec_of(entry: TableEntry) -> TableSpec:
    """Of the rows that are saved; what makes new rows is the recipe's."""
    try:
        return TableSpec(entry.table, entry.width, entry.optimizer, num_buckets=entry.num_buckets,
                         vocabulary=entry.vocabulary)
    except UserError as error:
        raise BadCheckpoint(f"{entry.name} is of a table that this version does not know: {error}") from error


def schema_of(spec: TableSpec) -> pa.Schema:
    ids, numbers = pa.list_(pa.int64()), pa.list_(pa.int32())
    kinds = (ids, pa.list_(pa.list_(pa.float32(), spec.width)), pa.list_(pa.list_(pa.float32(), spec.num_slots)),
             numbers, numbers, ids, numbers, numbers)
    facts = {"format": FORMAT, "table": spec.name, "width": spec.width, "optimizer": spec.optimizer,
             "vocabulary": spec.vocabulary, "buckets": spec.num_buckets}
    return pa.schema([pa.field("bucket", pa.int32()), pa.field("base", pa.int64()),
                      *(pa.field(name, kind) for name, kind in zip(COLUMNS, kinds)), pa.field("removed", ids)],
                     {key: str(value) for key, value in facts.items()})


def encode(bucket: Bucket, schema: pa.Schema) -> pa.RecordBatch:
    lists = [listed(array, schema.field(name).type)
             for name, array in zip((*COLUMNS, "removed"), (*bucket.rows.arrays, bucket.removed))]
    return pa.RecordBatch.from_arrays([pa.array([bucket.number], pa.int32()), pa.array([bucket.base], pa.int64()),
                                       *lists], schema=schema)


def listed(array: np.ndarray, kind: pa.ListType) -> pa.Array:
    """One list of all of an array's rows, without a copy."""
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    if array.ndim == 2:  # from_arrays refuses lists of no elements
        flat = pa.Array.from_buffers(kind.value_type, len(array), [None], children=[flat])
    return pa.ListArray.from_arrays(pa.array([0, len(array)], pa.int32()), flat)


def decode(content: Any, entry: TableEntry, number: int) -> Bucket:
    """Bucket buckets[number] of a file, of its checked bytes, which are not copied. BadCheckpoint where they are no such
    bucket."""
    spec, bucket = spec_of(entry), entry.buckets[number]
    try:
        batch = ipc.read_record_batch(pa.py_buffer(content), schema_of(spec))
        batch.validate(full=True)
        if (batch.num_rows, *(batch.column(key).to_pylist()[0] for key in ("bucket", "base"))) != (1, bucket,
                                                                                                 entry.bases[number]):
            raise ValueError("it is another bucket, or builds on another step")
        shapes = {"values": (-1, spec.width), "slots": (-1, spec.num_slots)}
        found = {key: flattened(batch.column(key), shapes.get(key)) for key in (*COLUMNS, "removed")}
        removed = found.pop("removed")
        rows = Rows(**found)
        rows.check(spec)
        if (removed[1:] <= removed[:-1]).any() or (removed.size and entry.bases[number] < 0):
            raise ValueError("what went away does not rise, or went away from nothing")
        for ids in (rows.ids, rows.waiting_ids, removed):
            if (buckets_of(spec, ids) != bucket).any():
                raise ValueError("one of its ids belongs in another bucket")
    except (pa.ArrowException, ValueError, TypeError, KeyError, IndexError, OSError, UserError) as error:
        raise BadCheckpoint(f"{entry.name} does not hold bucket {bucket} of table {entry.table} as its manifest says "
                            f"({' '.join(str(error).split())[:120].rstrip('.')}).") from error
    return Bucket(bucket, rows, entry.bases[number], removed)


def flattened(column: pa.Array, shape: tuple[int, int] | None) -> np.ndarray:
    """The array of a column's one list."""
    if column.null_count or column.offsets.to_pylist()[0] != 0:
        raise ValueError("a list is missing")
    items = column.values[:column.offsets.to_pylist()[1]]
    if items.null_count or (shape and items.values.null_count):
        raise ValueError("a value is missing")
    if shape is None:
        return items.to_numpy()
    num = len(items)
    return items.values.to_numpy()[:num * shape[1]].reshape(num, shape[1]) if shape[1] else np.empty((num, 0), np.float32)


class Written(io.RawIOBase):
    """What Arrow has written since it was last taken."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.bytes

    def take(self) -> bytes:
        found, self.pieces = b"".join(self.pieces), []
        return found


def write_table(store: Store, folder: str, name: str, spec: TableSpec, step: int, buckets: Iterable[Bucket],
                progress: Callable[[int], None] = lambda done: None) -> TableEntry:
    """Writes a file of buckets that rise, each taken from `buckets` when its turn has come; durable on return.

    NonFiniteLoss where a row is not finite: nobody could go on from it.
    """
    schema, sink, digest = schema_of(spec), Written(), xxhash.xxh3_128()
    numbers, offsets, sizes, hashes, bases = list[int](), list[int](), list[int](), list[str](), list[int]()

    def pieces() -> Iterator[bytes]:
        with ipc.new_file(sink, schema) as writer:
            for bucket in buckets:
                check_finite(spec, bucket.rows, step)
                batch = encode(bucket, schema)
                writer.write_batch(batch)
                content, size = sink.take(), ipc.get_record_batch_size(batch)
                numbers.append(bucket.number)
                bases.append(bucket.base)
                offsets.append(sink.bytes - size)  # the file's head comes with the first
                sizes.append(size)
                hashes.append(hash_of(memoryview(content)[-size:]))
                digest.update(content)
                yield content
                progress(sink.bytes)
        digest.update(content := sink.take())
        yield content

    store.write(f"{folder}/{name}", pieces())
    return TableEntry(name, sink.bytes, digest.hexdigest(), spec.name, spec.width, spec.optimizer, spec.vocabulary,
                      spec.num_buckets, tuple(numbers), tuple(offsets), tuple(sizes), tuple(hashes), tuple(bases))


def check_finite(spec: TableSpec, rows: Rows, step: int) -> None:
    values = rows.values
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        bad = int(rows.ids[np.argmin(np.isfinite(values).all(1))])
        raise NonFiniteLoss(f"table {spec.name}: the row of id {bad} is not finite after step {step}; lower "
                            f"tables.{spec.name}.lr, or look for values in the data that are no numbers.")
