"""Moves of parts of a state between the members of a group, in one exchange: every member knows all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from elastic.collective.group import Buffer, CollectiveGroup


def exchange(group: CollectiveGroup, moves: Sequence[Any], give: Callable[[Any], Buffer],
             take: Callable[[Any, Buffer], None],
             allocate: Callable[[int], Buffer], unit: int = 1,
             watch: Callable[[], AbstractContextManager[Any]] = nullcontext) -> int:
    """Sends and receives this member's part, flat; what it has itself is left alone. Returns the elements received.

    A move has a `source`, a `to` and a `size` in units of so many elements. `watch()` surrounds the call itself.
    """
    me = group.rank
    sent = sorted((move for move in moves if move.source == me != move.to), key=lambda move: move.to)
    due = sorted((move for move in moves if move.to == me != move.source), key=lambda move: move.source)
    counts, out_counts = [0] * group.size, [0] * group.size
    for move in sent:
        counts[move.to] += unit * move.size
    for move in due:
        out_counts[move.source] += unit * move.size
    buffer, received, at = allocate(sum(counts)), allocate(sum(out_counts)), 0
    for move in sent:
        buffer[at:at + unit * move.size] = give(move).reshape(-1)
        at += unit * move.size
    with watch():
        group.all_to_all(received, out_counts, buffer, counts)
    at = 0
    for move in due:
        take(move, received[at:at + unit * move.size])
        at += unit * move.size
    return at
