"""Rows on disk: each under a number that whoever puts it there keeps. Beside their pages only a count of rows for each page is in memory.

A page is a few rows, one value of an embedded key-value library, which is written once for many rows and read whole.
What goes away leaves a gap; a page whose rows have all gone is written anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

PAGE_BYTES = 4096
MOST_ROWS = 128  # of a page: a byte counts them
CHUNK = 2048  # pages that are read or written at a time
FLOAT = 4  # bytes


class Pages(Protocol):
    """Where pages lie: bytes by number. What it holds is one process's, and gone with it."""

    def put(self, numbers: np.ndarray, pages: Sequence[bytes]) -> None:
        """Writes pages, all or none of which count. UserError where the disk has no room; what was there before
        stays."""

    def get(self, numbers: np.ndarray) -> Sequence[bytes]:
        """Pages that were put, in this order."""

    def close(self) -> None:
        """Gives all the disk back."""


class ColdRows:
    """Records of `width` floats. `rows` says how many of each page's rows are wanted; whoever lets a record go takes it
    out of there, which cannot fail."""

    def __init__(self, pages: Pages, width: int):
        self.pages, self.width = pages, width
        self.shift = max(0, min(PAGE_BYTES // (FLOAT * width), MOST_ROWS).bit_length() - 1)
        self.rows = np.zeros(0, np.uint8)
        self.num = 0  # pages that were ever written

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return self.rows.nbytes

    @property
    def disk_bytes(self) -> int:
        return FLOAT * self.width * (self.num << self.shift)

    def put(self, records: np.ndarray) -> np.ndarray:
        """Their numbers (int64). UserError, and nothing changed, where the disk has no room."""
        per, num = 1 << self.shift, -(-len(records) >> self.shift)
        free = np.flatnonzero(self.rows[:self.num] == 0)[:num]
        chosen = np.append(free, np.arange(self.num, self.num + num - free.size))
        padded = np.zeros((num * per, self.width), np.float32)
        padded[:len(records)] = records
        content, size = padded.tobytes(), FLOAT * self.width * per
        for first in range(0, num, CHUNK):
            last = min(first + CHUNK, num)
            self.pages.put(chosen[first:last], [content[size * at:size * (at + 1)] for at in range(first, last)])
        most = int(chosen.max(initial=-1)) + 1
        if most > self.rows.size:
            self.rows = np.append(self.rows, np.zeros(most + most // 2 - self.rows.size, np.uint8))
        self.num = max(self.num, most)
        self.rows[chosen] = per
        self.rows[chosen[num - 1:]] = len(records) - per * (num - 1)
        return ((chosen << self.shift)[:, None] + np.arange(per)).reshape(-1)[:len(records)]

    def get(self, numbers: np.ndarray) -> np.ndarray:
        """(numbers, width) float32."""
        out = np.empty((numbers.size, self.width), np.float32)
        pages, stands = np.unique(numbers >> self.shift, return_inverse=True)
        order = np.argsort(stands, kind="stable")
        firsts = np.searchsorted(stands[order], np.arange(0, pages.size + CHUNK, CHUNK))
        for chunk, (low, high) in enumerate(zip(firsts, firsts[1:])):
            first, mine = chunk * CHUNK, order[low:high]
            found = np.frombuffer(b"".join(self.pages.get(pages[first:first + CHUNK])), np.float32)
            at = ((stands[mine] - first) << self.shift) + (numbers[mine] & ((1 << self.shift) - 1))
            out[mine] = found.reshape(-1, self.width)[at]
        return out

    def let_go(self, numbers: np.ndarray) -> None:
        np.subtract.at(self.rows, numbers >> self.shift, 1)

    def is_sparse(self) -> bool:
        """Whether half of what its pages hold, or more, are gaps."""
        rows = self.rows[:self.num]
        return 2 * int(rows.sum(dtype=np.int64)) < int(np.count_nonzero(rows)) << self.shift

    def in_sparse_pages(self, numbers: np.ndarray) -> np.ndarray:
        """bool: whose page has as many gaps as rows, or more."""
        return self.rows[numbers >> self.shift] <= (1 << self.shift) // 2
