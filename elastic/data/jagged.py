"""Lists of different lengths, one a row, as two plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Jagged:
    """Row r is values[offsets[r]:offsets[r + 1]]. `values` may have more before the first row and behind the last."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __getitem__(self, rows: slice | np.ndarray) -> Jagged:
        """A run of rows without a copy, or chosen ones, whose values are gathered."""
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            return Jagged(self.values, self.offsets[first:max(first, last) + 1])
        begins = self.offsets[rows].astype(np.int64)
        offsets = offsets_of(self.offsets[rows + 1] - begins)
        places = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], np.diff(offsets))
        return Jagged(self.values[places], offsets)

    @property
    def flat(self) -> np.ndarray:
        """The rows' own values, one row after the other, without a copy."""
        return self.values[int(self.offsets[0]):int(self.offsets[-1])]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets).astype(np.int64)

    @classmethod
    def joined(cls, parts: Sequence[Jagged]) -> Jagged:
        return cls(np.concatenate([part.flat for part in parts]),
                   offsets_of(np.concatenate([part.lengths for part in parts])))


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """int64, from 0, one longer than `lengths`."""
    found = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=found[1:])
    return found


def joined(parts: Sequence[np.ndarray | Jagged]) -> np.ndarray | Jagged:
    """Rows one after the other, of arrays or of lists."""
    if len(parts) == 1:
        return parts[0]
    lists = [part for part in parts if isinstance(part, Jagged)]
    return Jagged.joined(lists) if lists else np.concatenate([part for part in parts if isinstance(part, np.ndarray)])
