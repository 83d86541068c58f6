"""A state on its way from one mesh to another: who sends which box of each array to whom, and the sending.

Pure in its plan: every member computes the same from who holds what. A box that a member holds itself does not travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from elastic.checkpoint.hashing import in_order
from elastic.collective.group import CollectiveGroup
from elastic.mesh import Seat
from elastic.parallel.layout import Box, Layout
from elastic.state.state import State, fill, parameter_of, to_numpy


@dataclass(frozen=True)
class Move:
    """The part of a whole array that `source` gives to `target`; they may be the same."""

    source: int
    target: int
    start: tuple[int, ...]
    count: tuple[int, ...]


def moves(name: str, old: Layout, holders: Mapping[int, Seat], new: Layout) -> list[Move]:
    """Of one parameter: from the members `holders`, on seats of `old`, to every member of `new`'s mesh. ValueError where a part is held by nobody."""
    boxes: dict[Box, list[int]] = {}
    for rank, seat in sorted(holders.items()):
        if name in old.held(seat.pipeline):
            boxes.setdefault(old.box(name, seat), []).append(rank)
    found = []
    for target in range(new.mesh.world_size):
        seat = new.mesh.seat(target)
        if name not in new.held(seat.pipeline):
            continue
        wanted, covered = new.box(name, seat), 0
        for box, ranks in boxes.items():
            start = tuple(max(a, b) for a, b in zip(box.start, wanted.start, strict=True))
            stop = tuple(min(a + n, b + m) for a, n, b, m in zip(box.start, box.count, wanted.start, wanted.count, strict=True))
            count = tuple(high - low for low, high in zip(start, stop, strict=True))
            if all(n > 0 for n in count):
                source = target if target in ranks else ranks[target % len(ranks)]
                found.append(Move(source, target, start, count))
                covered += math.prod(count)
        if covered != math.prod(wanted.count):
            raise ValueError(f"of {name} the members hold {covered} of the {math.prod(wanted.count)} elements that rank {target} needs.")
    return found


def carry(group: CollectiveGroup, plan: Sequence[Move], given: Any, mine: Box | None, taken: Any, wanted: Box | None) -> int:
    """Carries one array's moves out: from `given`, what this member holds as `mine`, into `taken`, its `wanted`. Returns the bytes received."""
    me = group.rank
    kind = (taken if taken is not None else given if given is not None else np.zeros(0, np.float32)).dtype
    sent = sorted((m for m in plan if m.source == me and m.target != me), key=lambda m: m.target)
    due = sorted((m for m in plan if m.target == me and m.source != me), key=lambda m: m.source)
    counts, out_counts = ([sum(math.prod(m.count) for m in some if side(m) == rank) for rank in range(group.size)]
                          for some, side in ((sent, target_of), (due, source_of)))
    if any(m.source != m.target for m in plan):
        parts = [np.ascontiguousarray(given[inside(m, mine)]).reshape(-1) for m in sent]
        buffer = np.concatenate(parts) if parts else np.zeros(0, kind)
        received = np.empty(sum(out_counts), kind)
        group.all_to_all(received, out_counts, buffer, counts)
        at = 0
        for m in due:
            size = math.prod(m.count)
            taken[inside(m, wanted)] = received[at:at + size].reshape(m.count)
            at += size
    for m in plan:
        if m.source == m.target == me:
            taken[inside(m, wanted)] = given[inside(m, mine)]
    return sum(out_counts) * kind.itemsize


def source_of(move: Move) -> int:
    return move.source


def target_of(move: Move) -> int:
    return move.target


def inside(move: Move, box: Box | None) -> tuple[slice, ...]:
    assert box is not None
    return tuple(slice(s - b, s - b + c) for s, b, c in zip(move.start, box.start, move.count, strict=True))


def relay(group: CollectiveGroup, old: Layout, holders: Mapping[int, Seat], given: State | None, new: Layout, taken: State,
          tell: Callable[[int], AbstractContextManager[Any]]) -> int:
    """Every array of the state: out of the `holders`' old states (`given`, if this member is one) into all members' new ones.

    Returns the bytes that this member received. `tell(number)` surrounds the exchange of each array. What is taken counts as torn (-1): a
    member that held an older state on the same seat must not say so of what is half of each.
    """
    taken.committed = -1
    moved, seat, first = 0, new.mesh.seat(group.rank), min(holders)
    source = holders.get(group.rank)
    plans = {name: moves(name, old, holders, new) for name in new.parameters}
    for number, full in enumerate(sorted(taken.whole_specs())):
        name = parameter_of(full)
        held = to_numpy(given.views[full]) if given is not None and full in given.views else None
        target = to_numpy(taken.views[full]) if full in taken.views else None
        with tell(number):
            if name in plans and not full.startswith("buffer/"):
                mine = old.box(name, source) if source is not None and held is not None else None
                wanted = new.box(name, seat) if target is not None else None
                moved += carry(group, plans[name], held, mine, target, wanted)
            elif target is not None:  # what all have alike
                flat = np.ascontiguousarray(held if group.rank == first and held is not None else target).reshape(-1).copy()
                group.broadcast(flat, first)
                target[...] = flat.reshape(target.shape)
        if target is not None and target is not taken.views[full]:
            fill(taken.views[full], target)
    return moved


def whole_arrays(state: State, replica: CollectiveGroup, tell: Callable[[int], AbstractContextManager[Any]],
                 data: CollectiveGroup | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Every array of the model, whole, in the order of the hashes, out of the parts of a replica's members. Each is alive until the next."""
    portion, specs = state.portion, state.whole_specs()
    for number, full in enumerate(in_order(specs)):
        name = parameter_of(full)
        if portion is None:
            with tell(number):
                array = state.local(full, data)
            yield full, array
            continue
        dtype, shape = specs[full]
        is_part = name in portion.whole and not full.startswith("buffer/")
        out = np.empty(shape, dtype)
        for seat in portion.layout.keepers(name) if is_part else (Seat(),):
            box = portion.layout.box(name, seat) if is_part else Box(tuple(shape), (0,) * len(shape), tuple(shape))
            mine = seat == replace(portion.seat, data=0)
            with tell(number):
                flat = np.ascontiguousarray(state.local(full, data)).reshape(-1) if mine else np.empty(math.prod(box.count), dtype)
                replica.broadcast(flat, portion.mesh.rank(seat))
            out[tuple(slice(s, s + c) for s, c in zip(box.start, box.count, strict=True))] = flat.reshape(box.count)
        yield full, out
