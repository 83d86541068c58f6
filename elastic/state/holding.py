"""Which of the optimizer's slots a worker holds: all of them, or those of some blocks only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.boxes import Box, Range, scaled, size_of
from elastic.buffers import fill, like
from elastic.model.backend import Buffer
from elastic.state.flat_layout import BLOCK
from elastic.state.ownership import NONE, cuts, held, lacking


@dataclass
class Store:
    """Slots of some ranges of elements, one range behind the other."""

    ranges: tuple[Range, ...]
    slots: dict[str, Buffer]

    @property
    def size(self) -> int:
        """In elements: behind so many of the reduced gradient lie the statistics."""
        return size_of(self.ranges)

    def runs(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """What of low..high-1 is here: (low, high, where it lies in a slot, and in the reduced gradient)."""
        at = 0
        for begin, end in self.ranges:
            first, last = max(low, begin), min(high, end)
            if first < last:
                yield first, last, at + first - begin
            at += end - begin

    def find(self, slot: str, low: int, high: int) -> Buffer | None:
        """A range of a slot, if all of it is here."""
        return next((self.slots[slot][at:at + high - low] for *run, at in self.runs(low, high) if run == [low, high]),
                    None)

    def put(self, slot: str, low: int, high: int, values: Any) -> None:
        """What of a range is here."""
        for first, last, at in self.runs(low, high):
            fill(self.slots[slot][at:at + last - first], values[first - low:last - low])

    def put_box(self, slot: str, offset: int, box: Box, values: np.ndarray) -> None:
        """What is here of a box of the array that lies at `offset`."""
        if box.run is not None:
            self.put(slot, offset + box.run[0], offset + box.run[1], np.ascontiguousarray(values).reshape(-1))
            return
        places, values, buffer = offset + box.elements, values.reshape(-1), self.slots[slot]
        for first, last, at in self.runs(int(places[0]), int(places[-1]) + 1):
            here = (places >= first) & (places < last)
            buffer[places[here] - first + at] = like(buffer, values[here])


class Holding:
    """`holders` of each block: 1, its owner, or 2, with the owner's twin; 0: every worker holds all.

    What is shared out is held by nobody before `own_as` or `hold` says by whom. A store has the own range first, then
    that of which a worker is the twin; so has the reduced gradient, with the statistics behind.
    """

    def __init__(self, allocate: Callable[[int], Buffer], slots: Iterable[str], trainable: int, holders: int):
        self._allocate, self.holders = allocate, holders
        self.num_blocks = trainable // BLOCK if holders else 0
        self.size = 0
        self.spare: Store | None = None  # what is to be held next, complete, while others may still lack theirs
        self.store = self._made(slots, (NONE, NONE) if holders else ((0, trainable),))

    def _made(self, slots: Iterable[str], ranges: tuple[Range, ...]) -> Store:
        size = size_of(ranges)
        return Store(ranges, {slot: self._allocate(max(1, size))[:size] for slot in slots})

    @property
    def cuts(self) -> list[int]:
        """Where each owner's range begins, and where the last one ends, in elements."""
        return [cut * BLOCK for cut in cuts(self.size, self.num_blocks)]

    @property
    def blocks(self) -> tuple[Range, ...]:
        """The ranges of blocks that are held, own and twin's in turn; () where nothing is shared out."""
        stores = (self.store, self.spare) if self.holders else ()
        return tuple((low // BLOCK, high // BLOCK) for store in stores if store for low, high in store.ranges)

    @property
    def has_all(self) -> bool:
        return not lacking([self.blocks], self.num_blocks)

    def make(self, rank: int, size: int) -> Store:
        """An empty store for what member `rank` of `size` is to hold."""
        return self._made(self.store.slots, scaled(held(rank, size, self.num_blocks, self.holders > 1), BLOCK))

    def own_as(self, rank: int, size: int) -> None:
        """From now on this is member `rank` of `size`; what it held of a range does not count any more."""
        if self.holders:
            self.drop()
            self.hold(self.make(rank, size), size)

    def drop(self) -> None:
        """Nothing is held any more, and takes no memory."""
        self.hold(self._made(self.store.slots, (NONE, NONE)), 0)

    def hold(self, store: Store, size: int) -> None:
        """From now on this store is what is held, as one of so many members."""
        self.store, self.spare, self.size = store, None, size

    def find(self, slot: str, low: int, high: int) -> Buffer:
        """A range of a slot out of what is held."""
        for store in (self.store, self.spare):
            found = store.find(slot, low, high) if store else None
            if found is not None:
                return found
        raise ValueError(f"{slot} {low} to {high} is not held here.")
