"""One conversion of tables to memory-mapped Arrow, after which any row costs the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from elastic.data.columns import Column
from elastic.data.files import File
from elastic.data.formats import Arrays, batches
from elastic.data.ids import read
from elastic.data.jagged import Jagged, joined, offsets_of
from elastic.errors import UserError
from elastic.storage.atomic import appearing

BATCH_BYTES = 32 << 20  # of a record batch: one is in memory while it is written


def write(parts: Iterator[Arrays], columns: Sequence[Column], target: Path) -> tuple[list[int], str]:
    """Writes `parts` one after the other; the rows of each record batch, and a digest of all values. Peak memory is two
    record batches."""
    schema, rows, digest = pa.schema([pa.field(c.name, stored_type(c), nullable=False)
                                      for c in columns]), [], xxhash.xxh3_128()
    try:
        with appearing(target) as raw, pa.ipc.new_file(raw, schema) as writer:
            for part in cut(parts, columns):
                batch = pa.record_batch([stored(part[c.name], c) for c in columns], schema=schema)
                for column in columns:
                    for array in arrays_in(part[column.name]):
                        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
                writer.write_batch(batch)
                rows.append(batch.num_rows)
    except OSError as error:
        raise UserError(f"The table cache {target.parent} cannot be written ({error.strerror or error}); make it "
                        "writable or free some space, or "
                        'write data.shuffle_by = "blocks", which converts nothing.') from error
    return rows, digest.hexdigest()


def arrays_of(kind: str, files: Sequence[File], columns: Sequence[Column],
              types: dict[str, pa.DataType]) -> Iterator[Arrays]:
    """All rows of `files`. UserError for what a file has against it, a missing value above all."""
    for file in files:
        first_row = 0
        for batch in batches(kind, file, types):
            found = {c.name: read(batch.column(c.name), c, file.name, first_row) for c in columns}
            yield {c.name: values if isinstance(values := found[c.name], Jagged) else values.astype(c.dtype, copy=False)
                   for c in columns}
            first_row += batch.num_rows


def cut(parts: Iterator[Arrays], columns: Sequence[Column]) -> Iterator[Arrays]:
    """The same rows in parts as large as a record batch may be, the last one smaller."""
    lists, fixed = [c for c in columns if c.is_list], sum(c.row_bytes for c in columns if not c.is_list)
    most = BATCH_BYTES if lists else max(1, BATCH_BYTES // fixed)

    def sizes(part: Arrays) -> np.ndarray:
        """Up to each row: how many rows, or where there are lists how many bytes."""
        rows = np.arange(1, 1 + len(next(iter(part.values()))))
        if not lists:
            return rows
        return rows * fixed + sum(np.cumsum(part[c.name].lengths) * np.dtype(c.dtype).itemsize for c in lists)

    waiting: list[Arrays] = []
    num = 0
    for part in parts:
        waiting.append(part)
        num += int(sizes(part)[-1]) if len(next(iter(part.values()))) else 0
        while num >= most:
            whole = together(waiting)
            ends = sizes(whole)
            end = int(np.searchsorted(ends, most)) + 1
            yield {name: array[:end] for name, array in whole.items()}
            waiting, num = [{name: array[end:] for name, array in whole.items()}], num - int(ends[end - 1])
    if num:
        yield together(waiting)


def together(parts: list[Arrays]) -> Arrays:
    return parts[0] if len(parts) == 1 else {name: joined([part[name] for part in parts]) for name in parts[0]}


def arrays_in(found: np.ndarray | Jagged) -> list[np.ndarray]:
    return [found.lengths, found.flat] if isinstance(found, Jagged) else [found]


def stored_type(column: Column) -> pa.DataType:
    """Truth values take a byte each: Arrow's bits are no NumPy array."""
    kind = pa.from_numpy_dtype(np.uint8 if column.dtype == "bool" else np.dtype(column.dtype))
    if column.is_list:
        return pa.large_list(pa.field("item", kind, nullable=False))
    return pa.list_(pa.field("item", kind, nullable=False), column.width) if column.width else kind


def stored(array: np.ndarray | Jagged, column: Column) -> pa.Array:
    if isinstance(array, Jagged):
        items = pa.array(array.flat.astype(column.dtype, copy=False))
        return pa.LargeListArray.from_arrays(pa.array(offsets_of(array.lengths)), items, type=stored_type(column))
    flat = np.ascontiguousarray(array).reshape(-1)
    found = pa.array(flat.view(np.uint8) if column.dtype == "bool" else flat)
    return pa.FixedSizeListArray.from_arrays(found, type=stored_type(column)) if column.width else found
