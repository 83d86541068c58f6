"""Boxes of arrays and ranges of whole numbers: where parts lie, meet and come apart. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Range = tuple[int, int]  # (low, high): low..high-1, of elements, blocks or whatever is counted


@dataclass(frozen=True)
class Box:
    """A part of an array of `shape`: `count` places from `start` on, along each dim."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    count: tuple[int, ...]

    @classmethod
    def all(cls, shape: Sequence[int]) -> Box:
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        return math.prod(self.count)

    @property
    def slices(self) -> tuple[Any, ...]:
        """What cuts it out of the array; a view, also of an array without dims."""
        return (*(slice(s, s + c) for s, c in zip(self.start, self.count, strict=True)), ...)

    @property
    def run(self) -> Range | None:
        """The elements of the array, in C order, that the box is; None where it is no single run of them."""
        if not self.size:
            return 0, 0
        first = next((dim for dim, c in enumerate(self.count) if c != 1), len(self.count))
        if self.count[first + 1:] != self.shape[first + 1:]:
            return None
        low = 0
        for s, n in zip(self.start, self.shape, strict=True):
            low = low * n + s
        return low, low + self.size

    @property
    def elements(self) -> np.ndarray:
        """Where each of its elements, one at least, lies in the array, in C order."""
        dims = np.ix_(*(np.arange(s, s + c) for s, c in zip(self.start, self.count, strict=True)))
        return np.ravel_multi_index(dims, self.shape).reshape(-1)

    def meet(self, other: Box) -> Box | None:
        """What lies in both boxes of one array; None where nothing does."""
        start, count = [], []
        for a, m, b, n in zip(self.start, self.count, other.start, other.count, strict=True):
            low, high = max(a, b), min(a + m, b + n)
            if low >= high:
                return None
            start.append(low)
            count.append(high - low)
        return Box(self.shape, tuple(start), tuple(count))

    def relative(self, outer: Box) -> Box:
        """The same elements as a box of the array that `outer`, which holds them all, is by itself."""
        return Box(outer.count, tuple(s - o for s, o in zip(self.start, outer.start, strict=True)), self.count)

    def inside(self, outer: Box) -> Box:
        """The other way round: a box of the array that `outer` is by itself as one of the whole array."""
        return Box(outer.shape, tuple(s + o for s, o in zip(self.start, outer.start, strict=True)), self.count)

    def runs(self, low: int, high: int) -> list[Box]:
        """Elements low..high-1 of the box in C order as boxes of the same array, in order, each one run of the box's
        elements."""
        return [Box(self.count, start, count).inside(self) for start, count in _runs(self.count, low, high)]


def _runs(shape: tuple[int, ...], low: int, high: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, count) of each. A matrix has at most three: the end of a row, whole rows, the beginning of one."""
    if low >= high:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-low // row), high // row  # whole rows
    if first > last:  # within a row
        return [((low // row, *start), (1, *count))
                for start, count in _runs(shape[1:], low % row, high - low // row * row)]
    head = [((first - 1, *start), (1, *count))
            for start, count in _runs(shape[1:], low % row, row)] if low % row else []
    rest = (0,) * (len(shape) - 1)
    whole = [((first, *rest), (last - first, *shape[1:]))] if first < last else []
    return head + whole + [((last, *start), (1, *count)) for start, count in _runs(shape[1:], 0, high % row)]


def union(ranges: Iterable[Range]) -> list[Range]:
    """The same places, in order, none twice, with neighbours joined."""
    found: list[Range] = []
    for low, high in sorted(r for r in ranges if r[0] < r[1]):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def without(ranges: Iterable[Range], others: Iterable[Range]) -> list[Range]:
    """The places of `ranges` that are not in `others`."""
    taken, first, left = union(others), 0, []
    for low, high in union(ranges):
        while first < len(taken) and taken[first][1] <= low:
            first += 1
        at = first
        while at < len(taken) and taken[at][0] < high:
            left.append((low, taken[at][0]))
            low, at = taken[at][1], at + 1
        left.append((low, high))
    return [piece for piece in left if piece[0] < piece[1]]


def size_of(ranges: Iterable[Range]) -> int:
    return sum(high - low for low, high in ranges)


def scaled(ranges: Iterable[Range], factor: int) -> tuple[Range, ...]:
    """In another unit: blocks as elements."""
    return tuple((low * factor, high * factor) for low, high in ranges)
