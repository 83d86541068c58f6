"""Which rank writes which share of a checkpoint: pure functions of names, dtypes, shapes and the number of writers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from elastic.boxes import Box
from elastic.checkpoint.manifest import ITEM_BYTES, Piece

Specs = Mapping[str, tuple[str, tuple[int, ...]]]  # array name -> (dtype, shape)


def shares(specs: Specs, world_size: int) -> tuple[tuple[Piece, ...], ...]:
    """The boxes of every rank: together all arrays, none of it twice, and as equal in bytes as the arrays' rows allow.

    The arrays lie in one long row, by name, that is cut into `world_size` ranges of the same length. An array on a cut
    is divided along its first axis that is longer than 1, so that every box is one run of its array's elements.
    """
    total = sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in specs.values())
    found: list[list[Piece]] = [[] for _ in range(world_size)]
    begins = 0
    for name in sorted(specs):
        dtype, shape = specs[name]
        length, rows = math.prod(shape), next((n for n in shape if n > 1), 1)
        size, row = length * ITEM_BYTES[dtype], length // rows
        row_bytes = size / rows if size else 1.0
        cuts = [min(rows, max(0, round((total * rank / world_size - begins) / row_bytes)))
                for rank in range(world_size)] + [rows]
        cuts[0] = 0
        for rank, (low, high) in enumerate(zip(cuts, cuts[1:], strict=False)):
            if low < high and size:
                found[rank] += pieces_of(name, dtype, shape, row * low, row * high)
        if not size:
            found[0] += pieces_of(name, dtype, shape, 0, 0)
        begins += size
    return tuple(tuple(pieces) for pieces in found)


def pieces_of(name: str, dtype: str, shape: Sequence[int], low: int, high: int) -> list[Piece]:
    """Elements low..high-1 of an array, each piece one run of them; an array without any has nothing to carry, but has
    to be named."""
    boxes = Box.all(shape).runs(low, high) if math.prod(shape) else [Box.all(shape)]
    return [Piece(name, dtype, box.shape, box.start, box.count) for box in boxes]
