"""Memory of the row store: rows by place, in arrays that stay where they are, and the indexes of buckets, side by side. All on large pages."""

from __future__ import annotations

import threading
from math import prod

import numpy as np

from recommender.index_kernels import ENTRY_BYTES, FIELDS, FREE, FRESH

FLOAT = 4  # bytes
SLAB_BYTES = 8 << 20  # of values: NumPy asks the system for large pages from 4 MiB on
CHUNK_BYTES = 4 << 20  # of indexes
MANY = 3  # slabs, from which on the next one is made ready: it is small beside them
LINE = 64
SMALL_PAGE = 4 << 10
LARGE_PAGE = 2 << 20  # a slab begins with one; what lies before it is never touched


def address(array: np.ndarray) -> int:
    """Of its first element, for kernels."""
    return int(array.__array_interface__["data"][0])


def on_large_pages(num_bytes: int) -> np.ndarray:
    """Not filled. It takes memory as far as it is touched."""
    array = np.empty(num_bytes + LARGE_PAGE, np.uint8)
    return array[-address(array) % LARGE_PAGE:][:num_bytes]


def touch(arrays: list[np.ndarray]) -> None:
    for array in arrays:
        array[::SMALL_PAGE] = 0


def on_a_line(shape: tuple[int, ...]) -> np.ndarray:
    """float32, not filled, that begins where a line of the cache does: frameworks read such an array where it lies."""
    size = FLOAT * prod(shape)
    room = np.empty(size + LINE, np.uint8)
    return room[-address(room) % LINE:][:size].view(np.float32).reshape(shape)


class Indexes:
    """Room for entries and last steps. Indexes of one size share a chunk of memory, which is free when the last of them
    has grown out of it: buckets fill up alike, so they leave it together."""

    def __init__(self) -> None:
        self._chunks: dict[int, np.ndarray] = {}  # by size: what is left of the newest one

    def take(self, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        entries = ENTRY_BYTES * capacity
        size = -(-(entries + 4 * capacity) // LINE) * LINE
        left = self._chunks.get(size)
        if left is None or left.size < size:
            left = on_large_pages(max(size, CHUNK_BYTES // size * size))
        self._chunks[size] = left[size:]
        return left[:entries].view(np.int32).reshape(capacity,
                                                     FIELDS), left[entries:entries + 4 * capacity].view(np.int32)


class Slabs:
    """Places 0, 1 ... for rows of `width` values and `num_slots` slots. A slab holds 2 ** shift of them."""

    def __init__(self, width: int, num_slots: int, most_bytes: int = SLAB_BYTES):
        """`most_bytes` of values a slab, or one row."""
        self.shift = max(0, (min(SLAB_BYTES, most_bytes) // (FLOAT * width)).bit_length() - 1)
        self.values, self.slots = np.empty(0, np.int64), np.empty(0, np.int64)  # the address of each slab
        self.pool = np.zeros(3, np.int64)
        self._widths = width, num_slots
        self._kept: list[np.ndarray] = []
        self._ahead: tuple[threading.Thread, list[np.ndarray]] | None = None  # the next slab, and what touches it

    @property
    def slab_bytes(self) -> int:
        return FLOAT * sum(self._widths) << self.shift

    @property
    def nbytes(self) -> int:
        return (self.values.size + bool(self._ahead)) * self.slab_bytes

    @property
    def room(self) -> int:
        """Places that can be taken."""
        return (self.values.size << self.shift) - int(self.pool[FRESH]) + int(self.pool[FREE])

    def lacking(self, places: int) -> int:
        """Slabs to add until so many places can be taken."""
        return max(0, -(-(places - self.room) >> self.shift))

    def add(self, num: int, ahead: bool = False) -> None:
        """`ahead`: the one after them is made ready beside what the caller does next. Memory that is touched for the first time is
        given page by page, at a fifth of the speed at which rows are copied."""
        for _ in range(num):
            values, slots = self._next()
            self._kept += values, slots
            self.values, self.slots = np.append(self.values, address(values)), np.append(self.slots, address(slots))
        if num and ahead and self.values.size >= MANY:
            pair = self._pair()
            self._ahead = threading.Thread(target=touch, args=(pair,), daemon=True), pair
            self._ahead[0].start()

    def _next(self) -> list[np.ndarray]:
        if not self._ahead:
            return self._pair()
        (touching, pair), self._ahead = self._ahead, None
        touching.join()  # it writes
        return pair

    def _pair(self) -> list[np.ndarray]:
        return [on_large_pages(FLOAT * width << self.shift) for width in self._widths]

    def cut(self, num: int) -> None:
        """Lets all slabs go but the first `num`. Of the others no place is taken, nor free."""
        self.values, self.slots = self.values[:num].copy(), self.slots[:num].copy()
        del self._kept[2 * num:]
        self._ahead = None

    def run(self, places: int) -> int:
        """The first of so many places side by side, none of them given back one by one. There is room."""
        first = int(self.pool[FRESH])
        self.pool[FRESH] += places
        return first
