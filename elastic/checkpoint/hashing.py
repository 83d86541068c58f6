"""The two hashes by which runs are compared, of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from elastic.checkpoint.manager import open_tables
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.reader import Reader, read_arrays
from elastic.checkpoint.state_hash import DIGEST, TableDigests, bucket_digests, hashes_of, in_order
from elastic.checkpoint.table_reader import TableReader
from elastic.storage.store import Store


def hashes(store: Store, name: str, manifest: Manifest) -> tuple[str, str]:
    """(parameters_sha256, state_sha256). One array, and some buckets, are in memory at a time. BadCheckpoint."""
    reader, tables = Reader(store, name, manifest), open_tables(store, name, manifest)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for array in in_order({piece.name for entry in manifest.files for piece in entry.pieces}):
            yield array, read_arrays(reader, [array])[array]

    return hashes_of(arrays(), manifest.cursor, [table_digests(tables, table) for table in tables.specs()])


def table_digests(reader: TableReader, table: str) -> TableDigests:
    spec = reader.specs()[table]
    found = np.zeros((spec.num_buckets, 2, DIGEST), np.uint8)
    for bucket, rows in reader.rows(table):
        found[bucket] = bucket_digests(rows)
    return TableDigests(table, spec.width, found[:, 0], found[:, 1])
