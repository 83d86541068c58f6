"""A checkpoint's embedding tables as Parquet files of (id, vector)."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from elastic.checkpoint.find import read_newest
from elastic.checkpoint.manager import open_tables
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.table_reader import TableReader
from elastic.errors import UserError
from elastic.storage.atomic import beside
from elastic.storage.store import Store
from elastic.tables.spec import TableSpec

GROUP_BYTES = 64 * 1024 * 1024  # of vectors in a row group


def write_parquet(path: str, target: Path) -> tuple[int, int]:
    """A folder of one file a table, NAME.parquet, of all rows that are stored: by buckets, ids ascending in each. Returns
    the checkpoint's step and the number of tables. UserError where it has none."""
    def write(store: Store, name: str, manifest: Manifest) -> int:
        reader = open_tables(store, name, manifest)
        if not manifest.tables:
            raise UserError(f"--format parquet writes embedding tables, and {name} has none; take another format.")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a newer checkpoint that turned out bad
        unfinished.mkdir(parents=True)
        for table, spec in reader.specs().items():
            write_table(reader, spec, unfinished / f"{quote(table, safe=' ')}.parquet")
        return len(reader.specs())

    with beside(target) as unfinished:
        number, manifest = read_newest(path, write)
    return manifest.step, number


def write_table(reader: TableReader, spec: TableSpec, path: Path) -> None:
    """Some buckets are in memory at a time."""
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("vector", pa.list_(pa.float32(), spec.width))],
                       {"table": spec.name, "step": str(reader.manifest.step)})
    with parquet.ParquetWriter(path, schema) as writer:
        ids, vectors, held = list[np.ndarray](), list[np.ndarray](), 0

        def flush() -> None:
            nonlocal held
            if ids:
                flat = pa.array(np.concatenate(vectors).reshape(-1))
                writer.write_table(pa.table([pa.array(np.concatenate(ids)),
                                             pa.FixedSizeListArray.from_arrays(flat, spec.width)], schema=schema))
            ids.clear()
            vectors.clear()
            held = 0

        for _, rows in reader.rows(spec.name):
            ids.append(rows.ids)
            vectors.append(rows.values)
            held += rows.values.nbytes
            if held >= GROUP_BYTES:
                flush()
        flush()
