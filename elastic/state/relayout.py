"""A state on its way from one mesh to another (to other owners on the same mesh: `resharding`): who sends which box to whom, and the sending.

Pure in its plan: every member computes the same from who holds what. A box that a member holds itself does not travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from elastic.boxes import Box
from elastic.buffers import fill, to_numpy
from elastic.checkpoint.state_hash import in_order
from elastic.collective.group import CollectiveGroup
from elastic.mesh import Coordinate
from elastic.parallel.layout import Layout
from elastic.state.exchange import exchange
from elastic.state.state import State, parameter_of


@dataclass(frozen=True)
class Move:
    """The part of a whole array that `source` gives to `to`; they may be the same."""

    source: int
    to: int
    box: Box

    @property
    def size(self) -> int:
        return self.box.size


def moves(name: str, old: Layout, holders: Mapping[int, Coordinate], new: Layout) -> list[Move]:
    """Of one parameter: from the members `holders`, on coordinates of `old`, to every member of `new`'s mesh.
    ValueError where nobody has a part."""
    boxes: dict[Box, list[int]] = {}
    for rank, coordinate in sorted(holders.items()):
        if name in old.held(coordinate.pipeline):
            boxes.setdefault(old.box(name, coordinate), []).append(rank)
    having = {box: set(ranks) for box, ranks in boxes.items()}
    parts: dict[int, list[tuple[Box, Box]]] = {}  # by place within a replica: the boxes of which it wants something, and what
    for place in range(new.mesh.replica_size):
        coordinate = new.mesh.coordinate(place)
        if name in new.held(coordinate.pipeline):
            wanted = new.box(name, coordinate)
            parts[place] = [(box, part) for box in boxes if (part := box.meet(wanted)) is not None]
            if (covered := sum(part.size for _, part in parts[place])) != wanted.size:
                raise ValueError(f"of {name} the members hold {covered} of the {wanted.size} elements that rank {place} "
                                 "needs.")
    return [Move(to if to in having[box] else boxes[box][to % len(boxes[box])], to, part)
            for to in range(new.mesh.world_size) for box, part in parts.get(to % new.mesh.replica_size, ())]


def relay(group: CollectiveGroup, old: Layout, holders: Mapping[int, Coordinate], given: State | None, new: Layout,
          taken: State,
          waiting: Callable[[int], AbstractContextManager[Any]]) -> int:
    """Every array of the state: out of the `holders`' old states (`given`, if this member is one) into all members' new
    ones.

    Returns the bytes that this member received. `waiting(number)` surrounds the exchange of each array. What is taken
    counts as torn (-1): a member that held an older state on the same coordinate must not say so of what is half of
    each.
    """
    taken.committed = -1
    moved, me, first = 0, group.rank, min(holders)
    plans = {name: moves(name, old, holders, new) for name in new.parameters}
    for number, full in enumerate(sorted(taken.whole_specs())):
        name = parameter_of(full)
        held = to_numpy(given.views[full]) if given is not None and full in given.views else None
        target = to_numpy(taken.views[full]) if full in taken.views else None
        with waiting(number):
            if name in plans and not full.startswith("buffer/"):
                plan, kind = plans[name], next((array.dtype for array in (target, held) if array is not None),
                                               np.dtype(np.float32))

                def give(move: Move, held: Any = held, name: str = name) -> np.ndarray:
                    return held[move.box.relative(old.box(name, holders[me])).slices]

                def take(move: Move, values: np.ndarray, target: Any = target, name: str = name) -> None:
                    target[move.box.relative(new.box(name,
                                                     new.mesh.coordinate(me))).slices] = values.reshape(move.box.count)

                for move in plan:
                    if move.source == move.to == me:
                        take(move, give(move))
                if any(move.source != move.to for move in plan):
                    moved += exchange(group, plan, give, take, partial(np.empty, dtype=kind)) * kind.itemsize
            elif target is not None:  # what all have alike
                flat = np.ascontiguousarray(held if me == first and held is not None else target).reshape(-1).copy()
                group.broadcast(flat, first)
                target[...] = flat.reshape(target.shape)
        if target is not None and target is not taken.views[full]:
            fill(taken.views[full], target)
    return moved


def whole_arrays(state: State, replica: CollectiveGroup, waiting: Callable[[int], AbstractContextManager[Any]],
                 data: CollectiveGroup | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Every array of the model, whole, in the order of the hashes, out of the parts of a replica's members. Each is
    alive until the next."""
    portion, specs = state.portion, state.whole_specs()
    for number, full in enumerate(in_order(specs)):
        name = parameter_of(full)
        if portion is None:
            with waiting(number):
                array = state.local(full, data)
            yield full, array
            continue
        dtype, shape = specs[full]
        is_part = name in portion.whole and not full.startswith("buffer/")
        out = np.empty(shape, dtype)
        for coordinate in portion.layout.owners(name) if is_part else (Coordinate(),):
            box = portion.layout.box(name, coordinate) if is_part else Box.all(shape)
            mine = coordinate == replace(portion.coordinate, data=0)
            with waiting(number):
                flat = np.ascontiguousarray(state.local(full, data)).reshape(-1) if mine else np.empty(box.size, dtype)
                replica.broadcast(flat, portion.mesh.rank(coordinate))
            out[box.slices] = flat.reshape(box.count)
        yield full, out
