"""Who writes what, and who needs which bytes: pure functions of names, dtypes, shapes and the number of writers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from elastic.boxes import Box
from elastic.checkpoint.manifest import ITEM_BYTES, Piece

Specs = Mapping[str, tuple[str, tuple[int, ...]]]  # array name -> (dtype, shape)


def shares(specs: Specs, world_size: int) -> tuple[tuple[Piece, ...], ...]:
    """The boxes of every rank: together all arrays, none of it twice, and as equal in bytes as the arrays' rows allow.

    The arrays lie in one long row, by name, that is cut into `world_size` ranges of the same length. An array on a cut is
    divided along its first axis that is longer than 1, so that every box is one run of its array's elements.
    """
    total = sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in specs.values())
    found: list[list[Piece]] = [[] for _ in range(world_size)]
    begins = 0
    for name in sorted(specs):
        dtype, shape = specs[name]
        size = math.prod(shape) * ITEM_BYTES[dtype]
        axis = next((a for a, n in enumerate(shape) if n > 1), None)
        rows = 1 if axis is None else shape[axis]
        row_bytes = size / rows if size else 1.0
        cuts = [min(rows, max(0, round((total * rank / world_size - begins) / row_bytes))) for rank in range(world_size)] + [rows]
        cuts[0] = 0
        for rank, (low, high) in enumerate(zip(cuts, cuts[1:], strict=False)):
            if low < high and size:
                found[rank].append(box(name, dtype, shape, axis, low, high))
        if not size:  # nothing to carry, but it has to be named
            found[0].append(box(name, dtype, shape, None, 0, 1))
        begins += size
    return tuple(tuple(pieces) for pieces in found)


def box(name: str, dtype: str, shape: Sequence[int], axis: int | None, low: int, high: int) -> Piece:
    """Rows low..high-1 of an array along `axis`; all of it where there is no axis to cut."""
    start, count = [0] * len(shape), list(shape)
    if axis is not None:
        start[axis], count[axis] = low, high - low
    return Piece(name, dtype, tuple(shape), tuple(start), tuple(count))


def byte_range(piece: Piece, inside: Box) -> tuple[int, int]:
    """The bytes (low, high) of the piece's file that hold `inside`, a box of the array that the piece is by itself: rows of its first axis."""
    if not inside.count:
        return piece.offset, piece.offset + piece.bytes
    row = piece.bytes // piece.count[0]
    return piece.offset + inside.start[0] * row, piece.offset + (inside.start[0] + inside.count[0]) * row
