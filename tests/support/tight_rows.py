"""The compiled row store with a tier on disk and hardly any memory, for the suites that run on every store."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TypeVar

import numpy as np
import pytest

from elastic.tables.bags import Summed
from elastic.tables.row_store import NoRoom, Prepared, RowKernels, kernels
from elastic.tables.rows import Rows
from elastic.tables.spec import TableSpec
from recommender.cold_rows import ColdRows, Pages
from recommender.rocks_pages import RocksPages
from recommender.row_store import CompiledRows
from recommender.row_sums import CompiledKernels

T = TypeVar("T")
STORES = ["numba", "disk"]  # beside the oracle


class TightRows(CompiledRows):
    """With a tier on disk, and at every call with as little memory as that call can do with."""

    def __init__(self, spec: TableSpec, memory_bytes: int, pages: Pages | None = None):
        super().__init__(spec, 0 if pages else memory_bytes, pages)  # a slab a row
        self.limit = memory_bytes

    def _tightly(self, call: Callable[[], T]) -> T:
        given = self.limit
        if self.cold is None:
            return call()
        self.limit = min(given or 1 << 62, 1 << 10)
        try:
            while True:
                try:
                    return call()
                except NoRoom:
                    if self.limit == given:
                        raise
                    self.limit = min(given or 1 << 62, self.limit + self.limit // 4)
        finally:
            self.limit = given

    def hold(self, buckets: Iterable[int]) -> None:
        chosen = list(buckets)
        self._tightly(lambda: CompiledRows.hold(self, chosen))

    def prepare(self, step: int, summed: Summed) -> Prepared:
        return self._tightly(lambda: CompiledRows.prepare(self, step, summed))

    def load(self, rows: Rows) -> None:
        self._tightly(lambda: CompiledRows.load(self, rows))


class TightKernels(CompiledKernels):
    """Of `TightRows`."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="rows-"))
        atexit.register(rmtree, self.path, ignore_errors=True)

    def create(self, spec: TableSpec, memory_bytes: int, disk_path: str = "") -> CompiledRows:
        return TightRows(spec, memory_bytes, None if spec.vocabulary else RocksPages(str(self.path), spec.name))


@cache
def kernels_of(name: str) -> RowKernels:
    """"disk": the compiled ones with a tier on disk."""
    return TightKernels() if name == "disk" else kernels(name)


def make_tight(patch: pytest.MonkeyPatch) -> list[int]:
    """Runs on threads whose recipe has a disk have `TightRows`; the rows that go to disk, each time."""
    sent = list[int]()
    put = ColdRows.put

    def noted(self: ColdRows, records: np.ndarray) -> np.ndarray:
        sent.append(len(records))
        return put(self, records)

    patch.setattr(ColdRows, "put", noted)
    patch.setattr("recommender.row_sums.CompiledRows", TightRows)
    return sent
