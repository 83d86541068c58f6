"""One conversion of tables to memory-mapped Arrow, after which any row costs the same."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from elastic.data.arrow import write_atomically
from elastic.data.columns import Column, values
from elastic.data.files import File
from elastic.data.formats import Arrays, batches
from elastic.errors import UserError

BATCH_BYTES = 32 << 20  # of a record batch: one is in memory while it is written


def convert(kind: str, files: Sequence[File], columns: Sequence[Column], types: dict[str, pa.DataType], target: Path) -> tuple[list[int], str]:
    """Writes all rows of `files` to `target`; the rows of each record batch, and a digest of all values.

    UserError for what a file has against it, a missing value above all.
    """
    return write(arrays_of(kind, files, columns, types), columns, target)


def write(parts: Iterator[Arrays], columns: Sequence[Column], target: Path) -> tuple[list[int], str]:
    """Writes `parts` one after the other, like `convert`. Peak memory is two record batches."""
    most = max(1, BATCH_BYTES // sum(column.row_bytes for column in columns))
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    schema, rows, digest = pa.schema([pa.field(c.name, stored_type(c), nullable=False) for c in columns]), [], xxhash.xxh3_128()
    try:
        with open(temporary, "xb") as raw:
            with pa.ipc.new_file(raw, schema) as writer:
                for part in cut(parts, most):
                    batch = pa.record_batch([stored(part[c.name], c) for c in columns], schema=schema)
                    for column in columns:
                        digest.update(np.ascontiguousarray(part[column.name]).view(np.uint8).reshape(-1).data)
                    writer.write_batch(batch)
                    rows.append(batch.num_rows)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"The table cache {target.parent} cannot be written ({error.strerror or error}); make it writable or free some space, or "
                        'write data.shuffle_by = "blocks", which converts nothing.') from error
    finally:
        temporary.unlink(missing_ok=True)
    return rows, digest.hexdigest()


def arrays_of(kind: str, files: Sequence[File], columns: Sequence[Column], types: dict[str, pa.DataType]) -> Iterator[Arrays]:
    for file in files:
        first_row = 0
        for batch in batches(kind, file, types):
            yield {c.name: values(batch.column(c.name), c, file.name, first_row).astype(c.dtype, copy=False) for c in columns}
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


def remembered(folder: Path, make: Callable[[], dict[str, Any]], beside: Sequence[str] = ()) -> dict[str, Any]:
    """The facts that a folder of the cache holds, where the files `beside` them are there too; else those that `make` finds as it fills the folder.

    UserError if it cannot be written.
    """
    facts = folder / "facts.json"

    def held() -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            for name in beside:
                (folder / name).stat()
            return dict(json.loads(facts.read_text()))
        return None

    known = held()
    if known is None:
        with locked(folder):
            known = held()  # by now another process may have made them
            if known is None:
                known = make()
                write_atomically(facts, json.dumps(known).encode())
    return known


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Of several processes of this machine, one at a time; the others find its work done. Makes the folder. UserError if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(f"The cache {folder} cannot be written ({error.strerror}); make it writable or free some space.") from error
