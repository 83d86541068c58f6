"""Memory of the row store: rows by place, in arrays that stay where they are."""

from __future__ import annotations

import numpy as np

from recommender.index_kernels import FREE, FRESH

FLOAT = 4  # bytes
SLAB_BYTES = 8 << 20  # of values: NumPy asks the system for large pages from 4 MiB on
ALIGNMENT = 64


def address(array: np.ndarray) -> int:
    """Of its first element, for kernels."""
    return int(array.__array_interface__["data"][0])


class Slabs:
    """Places 0, 1 ... for rows of `width` values and `num_slots` slots. A slab holds 2 ** shift of them."""

    def __init__(self, width: int, num_slots: int):
        self.shift = max(0, (SLAB_BYTES // (FLOAT * width)).bit_length() - 1)
        self.values, self.slots = np.empty(0, np.int64), np.empty(0, np.int64)  # the address of each slab
        self.pool = np.zeros(3, np.int64)
        self._widths = width, num_slots
        self._kept: list[np.ndarray] = []

    @property
    def slab_bytes(self) -> int:
        return FLOAT * sum(self._widths) << self.shift

    @property
    def nbytes(self) -> int:
        return self.values.size * self.slab_bytes

    def lacking(self, places: int) -> int:
        """Slabs to add until so many places can be taken."""
        room = (self.values.size << self.shift) - int(self.pool[FRESH]) + int(self.pool[FREE])
        return max(0, -(-(places - room) >> self.shift))

    def add(self, num: int) -> None:
        for _ in range(num):
            arrays = [np.empty((FLOAT * width << self.shift) + ALIGNMENT, np.uint8) for width in self._widths]
            begins = [-(-address(array) // ALIGNMENT) * ALIGNMENT for array in arrays]
            self._kept += arrays
            self.values, self.slots = np.append(self.values, begins[0]), np.append(self.slots, begins[1])

    def run(self, places: int) -> int:
        """The first of so many places side by side, none of them given back one by one. There is room."""
        first = int(self.pool[FRESH])
        self.pool[FRESH] += places
        return first
