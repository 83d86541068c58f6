"""The state of a worker that keeps the optimizer's slots of some blocks only: those that it owns, and as a twin its neighbour's.

Slots (and moving averages) of what is kept lie one stretch behind the other: the own one, then the twin's; so does the reduced gradient,
with the statistics behind. All parameters are there, but after a step others have to send what they updated: till then the state is `torn`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.checkpoint.manifest import Piece
from elastic.checkpoint.plan import runs_of, shares
from elastic.errors import RunFailed
from elastic.model.backend import Buffer
from elastic.parallel.layout import Box
from elastic.state.flat_layout import BLOCK, Place
from elastic.state.ownership import NONE, Stretch, cuts, kept, lacking, owned, scaled, size_of, without
from elastic.state.state import AVERAGE, State, fill, scatter, to_numpy, within


@dataclass
class Store:
    """Slots of two stretches of elements, one behind the other."""

    stretches: tuple[Stretch, ...]
    slots: dict[str, Buffer]

    def runs(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """What of low..high-1 is here: (low, high, where it lies)."""
        at = 0
        for begin, end in self.stretches:
            first, last = max(low, begin), min(high, end)
            if first < last:
                yield first, last, at + first - begin
            at += end - begin

    def find(self, slot: str, low: int, high: int) -> Buffer | None:
        """A stretch of a slot, if all of it is here."""
        for first, last, at in self.runs(low, high):
            if (first, last) == (low, high):
                return self.slots[slot][at:at + high - low]
        return None

    def put(self, slot: str, low: int, high: int, values: Any) -> None:
        """What of a stretch is kept here."""
        for first, last, at in self.runs(low, high):
            fill(self.slots[slot][at:at + last - first], values[first - low:last - low])


class ShardedState(State):
    """`twin`: every block has a second keeper. Nothing is kept before `keep` or `hold` says what."""

    def __init__(self, *arguments: Any, twin: bool = True, **options: Any):
        self.twin, self.rank, self.size = twin, 0, 0
        self.spare: Store | None = None  # what is to be kept next, complete, while others may still lack theirs
        super().__init__(*arguments, **options)
        self.num_blocks = self.layout.trainable // BLOCK
        self.store = Store((NONE, NONE), self.slots)

    def _allocate(self, slots: Iterable[str], size: int = 0) -> dict[str, Buffer]:
        return {slot: self.backend.allocate(max(1, size))[:size] for slot in slots}

    def _slot_views(self) -> dict[str, Buffer]:
        return {}

    @property
    def cuts(self) -> list[int]:
        """Where each owner's stretch begins, and where the last one ends, in elements."""
        return [cut * BLOCK for cut in cuts(self.size, self.num_blocks)]

    @property
    def blocks(self) -> tuple[Stretch, ...]:  # type: ignore[override]
        """The stretches of blocks that are kept, own and twin's in turn."""
        return tuple((low // BLOCK, high // BLOCK) for store in (self.store, self.spare) if store for low, high in store.stretches)

    @property
    def keeps_all(self) -> bool:  # type: ignore[override]
        return not lacking([self.blocks], self.num_blocks)

    @property
    def is_all(self) -> bool:
        return super().is_all and not self.torn and self.keeps_all

    def make(self, rank: int, size: int) -> Store:
        """An empty store for what member `rank` of `size` is to keep."""
        stretches = scaled(kept(rank, size, self.num_blocks, self.twin), BLOCK)
        return Store(stretches, self._allocate(self.slots, size_of(stretches)))

    def keep(self, rank: int, size: int) -> None:
        self.committed, self.torn = -1, False
        self.hold(Store((NONE, NONE), self._allocate(self.slots)), rank, size)  # what was there goes first
        self.hold(self.make(rank, size), rank, size)

    def hold(self, store: Store, rank: int, size: int) -> None:
        """From now on this store is what is kept."""
        self.store, self.spare, self.slots, self.rank, self.size = store, None, store.slots, rank, size

    def find(self, slot: str, low: int, high: int) -> Buffer:
        """A stretch of a slot out of what is kept."""
        for store in (self.store, self.spare):
            found = store.find(slot, low, high) if store else None
            if found is not None:
                return found
        raise ValueError(f"{slot} {low} to {high} is not kept here.")

    def runs(self, low: int, high: int) -> list[tuple[int, int, int]]:
        return list(self.store.runs(low, high))

    @property
    def tail(self) -> int:
        return size_of(self.store.stretches)

    def heal(self, group: Any, root: int, committed: int) -> int:
        """The model's own buffers only: parameters and slots come from their keepers. Others than the root keep nothing from now on."""
        if group.rank != root:
            self.committed, self.torn = -1, False
            self.hold(Store((NONE, NONE), self._allocate(self.slots)), 0, 0)
        moved = self.flat_buffers()
        for buffer in moved:
            group.broadcast(buffer, root)
        return sum(int(b.nbytes) for b in moved)

    # Arrays by name.

    def _slot(self, name: str) -> tuple[str, Place] | None:
        """Which slot an array is of, and its parameter's place; None for what every worker holds."""
        kind, _, rest = name.partition("/")
        slot, _, parameter = rest.partition("/")
        is_slot = kind == "optimizer" and slot in self.slots and parameter in self.layout.trainable_set
        return (slot, self.layout.places[parameter]) if is_slot else None

    def _trained(self, name: str) -> Place | None:
        """The place of the parameter that an array is of, or of which it is a slot; None where every worker has the array."""
        found, (kind, _, parameter) = self._slot(name), name.partition("/")
        if found is None and kind == "parameter" and parameter in self.layout.trainable_set:
            return self.layout.places[parameter]
        return found[1] if found else None

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        kind = str(self.param.dtype).removeprefix("torch.")
        return super().specs() | {f"optimizer/{slot}/{name}": (kind, self.layout.places[name].shape)
                                  for slot in self.slots for name in self.layout.trainable_names}

    def local(self, name: str, group: Any) -> np.ndarray:
        found = self._slot(name)
        if found is None:
            return super().local(name, group)
        slot, place = found
        return to_numpy(self._gathered(slot, place.offset, place.offset + place.size, group)).reshape(place.shape)

    def _gathered(self, slot: str, low: int, high: int, group: Any) -> Buffer:
        """A stretch of a slot, from all its owners."""
        out = self.backend.allocate(max(1, high - low))[:high - low]
        for rank, (begin, end) in enumerate(zip(self.cuts, self.cuts[1:])):
            first, last = max(low, begin), min(high, end)
            if first < last:
                part = out[first - low:last - low]
                if rank == group.rank:
                    part[:] = self.find(slot, first, last)
                group.broadcast(part, rank)
        return out

    def _all_averages(self, group: Any) -> Buffer:
        return self._gathered(AVERAGE, 0, self.layout.trainable, group)

    def shares(self, rank: int, size: int) -> tuple[Piece, ...]:
        """As of any state, but what is trained is written by who owns it, or its twin: a torn state has no more. RunFailed where this worker
        does not keep it.
        """
        mine = self.kept()
        trained = {name: place for name in mine if (place := self._trained(name)) is not None}
        low, high = scaled([owned(rank, size, self.num_blocks)], BLOCK)[0]
        if without([(low, high)], self.store.stretches):
            raise RunFailed(f"Blocks {low // BLOCK} to {high // BLOCK - 1} of the optimizer's state are kept by other workers; resume the run.")
        boxes = list(shares({name: spec for name, spec in mine.items() if name not in trained}, size)[rank])
        for name, place in trained.items():
            dtype, shape = mine[name]
            first, last = max(0, low - place.offset), min(place.size, high - place.offset)
            boxes += [Piece(name, dtype, shape, start, count) for start, count in runs_of(shape, first, last)]
            if not place.size and rank == 0:  # nothing to carry, but it has to be named
                boxes.append(Piece(name, dtype, shape, (0,) * len(shape), shape))
        return tuple(boxes)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name, of a worker that keeps all."""
        return {name: self.take(name, 0, math.prod(shape)).reshape(shape) for name, (_, shape) in self.specs().items()}

    def take(self, name: str, low: int, high: int) -> np.ndarray:
        found = self._slot(name)
        if found is None:
            return super().take(name, low, high)
        slot, place = found
        parts = [to_numpy(self.slots[slot][at:at + last - first]) for first, last, at in
                 sorted(self.store.runs(place.offset + low, place.offset + high))]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.zeros(0, np.float32)])

    def put(self, name: str, start: Sequence[int], count: Sequence[int], low: int, values: np.ndarray) -> None:
        found = self._slot(name)
        if found is None:
            super().put(name, start, count, low, values)
            return
        slot, place = found
        mine = self.box(name)
        run = Piece(name, "float32", place.shape, tuple(start), tuple(count)).run if mine is None or mine.is_whole else None
        if run is not None:
            self.store.put(slot, place.offset + run[0] + low, place.offset + run[0] + low + len(values), values)
            return
        inside, target = within(mine or Box(place.shape, (0,) * len(place.shape), place.shape), start, count, low, len(values))
        target, values = target + place.offset, values[inside]
        for first, last, at in self.store.runs(place.offset, place.offset + place.size):
            here = (target >= first) & (target < last)
            scatter(self.slots[slot], target[here] - first + at, values[here])

    def _fill(self, name: str, values: np.ndarray) -> None:
        found = self._slot(name)
        if found is None:
            super()._fill(name, values)
        else:
            slot, place = found
            self.store.put(slot, place.offset, place.offset + place.size, np.ascontiguousarray(values).reshape(-1))
