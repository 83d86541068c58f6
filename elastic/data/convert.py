"""One conversion of tables to memory-mapped Arrow, after which any row costs the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from elastic.data.columns import Column, values
from elastic.data.files import File
from elastic.data.formats import Arrays, batches
from elastic.errors import UserError
from elastic.storage.atomic import appearing

BATCH_BYTES = 32 << 20  # of a record batch: one is in memory while it is written


def write(parts: Iterator[Arrays], columns: Sequence[Column], target: Path) -> tuple[list[int], str]:
    """Writes `parts` one after the other; the rows of each record batch, and a digest of all values. Peak memory is two
    record batches."""
    most = max(1, BATCH_BYTES // sum(column.row_bytes for column in columns))
    schema, rows, digest = pa.schema([pa.field(c.name, stored_type(c), nullable=False)
                                      for c in columns]), [], xxhash.xxh3_128()
    try:
        with appearing(target) as raw, pa.ipc.new_file(raw, schema) as writer:
            for part in cut(parts, most):
                batch = pa.record_batch([stored(part[c.name], c) for c in columns], schema=schema)
                for column in columns:
                    digest.update(np.ascontiguousarray(part[column.name]).view(np.uint8).reshape(-1).data)
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
            yield {c.name: values(batch.column(c.name), c, file.name, first_row).astype(c.dtype, copy=False)
                   for c in columns}
            first_row += batch.num_rows


def cut(parts: Iterator[Arrays], most: int) -> Iterator[Arrays]:
    """The same rows in parts of `most` rows each, the last one shorter."""
    waiting: list[Arrays] = []
    num = 0
    for part in parts:
        waiting.append(part)
        num += len(next(iter(part.values())))
        while num >= most:
            whole = joined(waiting)
            yield {name: array[:most] for name, array in whole.items()}
            waiting, num = [{name: array[most:] for name, array in whole.items()}], num - most
    if num:
        yield joined(waiting)


def joined(parts: list[Arrays]) -> Arrays:
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def stored_type(column: Column) -> pa.DataType:
    """Truth values take a byte each: Arrow's bits are no NumPy array."""
    kind = pa.from_numpy_dtype(np.uint8 if column.dtype == "bool" else np.dtype(column.dtype))
    return pa.list_(pa.field("item", kind, nullable=False), column.width) if column.width else kind


def stored(array: np.ndarray, column: Column) -> pa.Array:
    flat = np.ascontiguousarray(array).reshape(-1)
    found = pa.array(flat.view(np.uint8) if column.dtype == "bool" else flat)
    return pa.FixedSizeListArray.from_arrays(found, type=stored_type(column)) if column.width else found
