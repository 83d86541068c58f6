"""Arrays of any number, shape and dtype between the members of a group, in two of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from elastic.collective.group import CollectiveGroup

Arrays = Sequence[np.ndarray]
DTYPES = tuple(map(np.dtype, ("<i8", "<i4", "<f4", "<f8", "u1")))
ALIGNED = 8  # bytes, so that a received array is read where it lies


def headed(arrays: Arrays) -> list[np.ndarray]:
    """What says how many there are, and of each its dtype, number of dims and shape (int64); then the arrays."""
    head = [len(arrays)]
    for array in arrays:
        head += [DTYPES.index(array.dtype), array.ndim, *array.shape]
    return [np.array(head, np.int64), *arrays]


def packed(arrays: Arrays) -> np.ndarray:
    """Arrays as bytes, one after the other."""
    out, at = np.zeros(sum(padded(array.nbytes) for array in arrays), np.uint8), 0
    for array in arrays:
        out[at:at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        at += padded(array.nbytes)
    return out


def padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def unpacked(content: np.ndarray) -> list[np.ndarray]:
    """The arrays of `headed`, which lie in `content`."""
    words, at, kinds = content.view(np.int64), 1, list[tuple[np.dtype, tuple[int, ...]]]()
    for _ in range(int(words[0])):
        dtype, ndim = words[at:at + 2].tolist()
        kinds.append((DTYPES[dtype], tuple(words[at + 2:at + 2 + ndim].tolist())))
        at += 2 + ndim
    found, at = [], at * words.itemsize
    for kind, shape in kinds:
        size = kind.itemsize * prod(shape)
        found.append(content[at:at + size].view(kind).reshape(shape))
        at += padded(size)
    return found


def exchange(group: CollectiveGroup, parts: Sequence[Arrays]) -> list[list[np.ndarray]]:
    """`parts[r]` goes to rank r; what came from each rank. A member's own part comes back as it is."""
    if group.size == 1:
        return [list(parts[0])]
    lists = [headed(part) if rank != group.rank else [] for rank, part in enumerate(parts)]
    counts, theirs = np.array([sum(padded(array.nbytes) for array in one) for one in lists]), np.empty(group.size, np.int64)
    group.all_to_all(theirs, [1] * group.size, counts, [1] * group.size)
    received = np.empty(int(theirs.sum()), np.uint8)
    group.all_to_all(received, theirs.tolist(), packed([array for one in lists for array in one]), counts.tolist())
    ends = np.cumsum(theirs).tolist()
    return [unpacked(received[end - count:end]) if rank != group.rank else list(parts[rank])
            for rank, (count, end) in enumerate(zip(theirs.tolist(), ends))]
