"""The contract of a row store: one table's rows, as far as one process holds them, and the kernels that need no store.

Everything is a pure function of the spec and of what was committed: no answer depends on where a row lies, on which
buckets are held beside it, or on the calls in between. Sums are float32, added from 0 in position order. `Rows`, `Bags`
and `Summed` say what is wrong with them by `check`, which a store calls at its doors.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from elastic.errors import UserError
from elastic.tables.bags import Bags, Summed
from elastic.tables.rows import Rows
from elastic.tables.spec import RowUpdate, TableSpec

KINDS = {"numba": "recommender.row_sums", "reference": "recommender.reference_rows"}
MOST = (1 << 31) - 1  # appearances that a count can say; it stays there


class NoRoom(UserError):
    """A store's limit does not suffice; other tables' rows may have memory that can go to disk."""


@dataclass(frozen=True)
class Prepared:
    """What a commit will do: to which of the sums' ids there is an update (bool; the others wait to be admitted), and
    which ids it forgets (int64, ascending), touched or not: these start anew. `bad` is the first id whose sum is not
    finite; then there is no commit.
    """

    is_trained: np.ndarray
    evicted: np.ndarray
    bad: int | None


class RowStore(Protocol):
    """A process's rows of one table. `held` are its buckets; whoever asks for another's row has made a mistake
    (ValueError)."""

    spec: TableSpec
    held: frozenset[int]
    limit: int  # bytes that it may take; 0 is any number

    @property
    def nbytes(self) -> int:
        """Memory that rows and index have taken."""

    @property
    def disk_bytes(self) -> int:
        """Disk that rows have taken. Those that were not used for longest lie there, and `prepare` brings back what it
        needs."""

    def release(self) -> int:
        """Sends rows to disk, some of the longest unused among them, and gives their memory back: the bytes, 0 where it
        can do without none. What was prepared is dropped."""

    def close(self) -> None:
        """Gives its disk back, and is used no more."""

    def hold(self, buckets: Iterable[int]) -> None:
        """Begins to hold these, without rows. NoRoom where `limit` does not suffice."""

    def drop(self, buckets: Iterable[int]) -> None:
        """Lets these go with all their rows; their room is used again."""

    def lookup(self, bags: Bags) -> np.ndarray:
        """float32 of `bags.shape(width)`, pooled. An id that is not stored has its starting row, and is not stored by
        that."""

    def read(self, ids: np.ndarray) -> np.ndarray:
        """(ids, width) float32: their rows, each as `lookup` would have it."""

    def slots(self, ids: np.ndarray) -> np.ndarray:
        """(ids, slots) float32: their optimizer state, zeros where none is stored."""

    def prepare(self, step: int, summed: Summed) -> Prepared:
        """Finds room for all that the commit of `step` (from 1) will do with these sums, and changes nothing that
        anybody can see.

        It takes the place of what was prepared before. NoRoom where `limit` does not suffice, UserError where the disk
        has no room. `summed` is kept and must not change.
        """

    def squared_norms(self) -> np.ndarray:
        """(buckets,) float64 of what was prepared, over the ids that will be updated, each bucket's in order of ids."""

    def commit(self, update: RowUpdate) -> None:
        """Carries out what was prepared, once: updates, counts and last steps, admissions, evictions. It takes no
        memory and no disk. NonFiniteLoss, and nothing changed, where `Prepared.bad` says so."""

    def forget(self) -> None:
        """Drops what was prepared."""

    def export(self, bucket: int, after: int = -1) -> Rows:
        """A bucket's rows as of the last commit, copied; of `after` a step, those alone that a later one has touched.
        """

    def load(self, rows: Rows) -> None:
        """Takes rows over, into whichever held buckets they belong; an id that is there already is replaced. As for
        `prepare` there may be no room, and then nothing has changed."""

    def remove(self, ids: np.ndarray) -> None:
        """Forgets these ids, in any order, as an eviction does; what is not there is passed over."""


class RowKernels(Protocol):
    """What workers do with rows, owners or not."""

    def create(self, spec: TableSpec, memory_bytes: int, disk_path: str = "") -> RowStore:
        """An empty store that holds no bucket; 0 is no limit. With a folder, rows that the limit leaves no room for go to
        disk, in a folder of their own there, unless the table has a vocabulary. UserError where nothing can be written.
        """

    def distinct(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The distinct ids, ascending, and where each of `ids` stands among them (both int64)."""

    def pool(self, rows: np.ndarray, index: np.ndarray, bags: Bags) -> np.ndarray:
        """What `RowStore.lookup` gives, to the bit, of rows (any number, width) that were read before: bags.ids[i] has
        rows[index[i]]."""

    def deduplicate(self, spec: TableSpec, bags: Bags, slopes: np.ndarray) -> Summed:
        """A leaf of the canonical tree: for each distinct id its slopes, from 0 in position order, and its appearances.
        `slopes` float32 has the shape of what was looked up."""

    def merge(self, left: Summed, right: Summed) -> Summed:
        """left + right, id by id; where one has an id alone its sum stays. What `reduction.fold` adds with."""

    def update(self, spec: TableSpec, update: RowUpdate, step: int, values: np.ndarray, slots: np.ndarray,
               sums: np.ndarray) -> None:
        """What `commit` does to rows, to the bit, on (ids, ...) arrays in place: a row that was sent ahead is updated
        where it is."""


def kernels(name: str) -> RowKernels:
    """Of "numba" or "reference" (NumPy, the oracle; slow on purpose)."""
    try:
        found: RowKernels = importlib.import_module(KINDS[name]).KERNELS
    except ImportError as error:
        raise UserError(f"the row store {name!r} cannot be imported ({error}); install the extra `tables`.") from error
    return found
