"""Rows on their way: out of one store, into a checkpoint or another store; and the digests by which they are compared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from elastic.errors import UserError
from elastic.tables.bags import check_ids
from elastic.tables.spec import TableSpec


@dataclass(frozen=True)
class Rows:
    """Some ids of a table, ascending: `values` (ids, width) and `slots` (ids, slots) float32, `counts` and `lasts` (the
    step that updated it) int32.

    `waiting_*` are the ids that have not appeared often enough to be stored: these have a count and a last step alone.
    """

    ids: np.ndarray
    values: np.ndarray
    slots: np.ndarray
    counts: np.ndarray
    lasts: np.ndarray
    waiting_ids: np.ndarray
    waiting_counts: np.ndarray
    waiting_lasts: np.ndarray

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return (self.ids, self.values, self.slots, self.counts, self.lasts, self.waiting_ids, self.waiting_counts,
                self.waiting_lasts)

    def check(self, spec: TableSpec) -> None:
        """UserError for rows of another table: of another width, optimizer, dtype or vocabulary."""
        num, waiting = self.ids.size, self.waiting_ids.size
        shapes = ((num,), (num, spec.width), (num, spec.num_slots), (num,), (num,), (waiting,), (waiting,), (waiting,))
        dtypes = (np.int64, np.float32, np.float32, np.int32, np.int32, np.int64, np.int32, np.int32)
        for field, array, shape, dtype in zip(fields(self), self.arrays, shapes, dtypes):
            if array.shape != shape or array.dtype != dtype:
                raise UserError(f"table {spec.name}: {field.name} of the rows to load are {array.dtype} of shape "
                                f"{array.shape}, and with width = {spec.width} and optimizer = {spec.optimizer!r} they "
                                f"must be {np.dtype(dtype)} of shape {shape}; load them with the recipe that they were "
                                "saved with.")
        for ids in (self.ids, self.waiting_ids):
            if (ids[1:] <= ids[:-1]).any():
                raise UserError(f"table {spec.name}: the ids of the rows to load must rise, each once.")
            check_ids(spec, ids)
        if self.waiting_ids.size and np.intersect1d(self.ids, self.waiting_ids).size:
            raise UserError(f"table {spec.name}: an id of the rows to load is stored, and waiting to be admitted too.")


def digests(rows: Rows) -> tuple[str, str]:
    """(of the parameters, of the state) of one whole bucket: sha256 of its ids and values; that, and slots, counts,
    last steps and waiting ids."""
    found = hashlib.sha256()
    for array in rows.arrays[:2]:
        update(found, array)
    parameters = found.hexdigest()
    for array in rows.arrays[2:]:
        update(found, array)
    return parameters, found.hexdigest()


def update(digest: Any, array: np.ndarray) -> None:
    """Its length goes before its little-endian bytes: no two lists of arrays are one."""
    digest.update(len(array).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
