"""The canonical sum, against a recursion in NumPy that knows nothing of owners, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from elastic.collective import reduction
from elastic.collective.local import Hub
from elastic.collective.reduction import Scratch, SubtreeSums, maximal_subtrees, out_size, tree_sum
from elastic.collective.solo import SoloGroup
from elastic.mesh import shards_of
from tests.support.sums import leaves_of, tree
from tests.support.threads import together

BLOCK = 16


def reduce_as(group: Any, leaves: np.ndarray, chunk: int) -> np.ndarray:
    """What one member does in a step."""
    num_shards, numel = leaves.shape
    run, alive = shards_of(group.rank, group.size, num_shards), []

    def take() -> np.ndarray:
        alive.append(1)
        return np.zeros(numel + 5, np.float32)

    sums = SubtreeSums(run, num_shards, take, lambda _: alive.pop())
    for shard in run:
        buffer = sums.begin(shard)
        assert len(alive) <= (2 if group.size > 1 else 1) * math.log2(len(run)) + 1
        buffer[:numel] += leaves[shard]
        sums.end(shard)
    out = np.full(out_size(numel, BLOCK, group.size), np.nan, np.float32)
    scratch = Scratch(lambda n: np.full(n, np.nan, np.float32), chunk)
    return reduction.reduce(group, sums.nodes(), num_shards, out, numel, BLOCK, scratch)[:numel].copy()


@pytest.mark.parametrize("num_shards", range(1, 17))
def test_every_size_gives_the_bits_of_the_tree(num_shards: int) -> None:
    leaves = leaves_of(num_shards, 203)
    expected = tree(leaves).tobytes()
    assert reduce_as(SoloGroup(), leaves, 64).tobytes() == expected
    for size in range(2, num_shards + 2):
        for result in together(size, lambda rank, group: reduce_as(group, leaves, 64)):
            assert result.tobytes() == expected, f"{num_shards} shards, {size} members"


def test_another_order_gives_other_bits() -> None:
    leaves = leaves_of(8, 203)
    in_a_row = np.zeros(203, np.float32)
    for leaf in leaves:
        in_a_row += leaf
    assert in_a_row.tobytes() != tree(leaves).tobytes()


@pytest.mark.parametrize("numel", [1, 15, 16, 17, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("chunk", [1, 48, 1000])
def test_every_length_and_chunk(numel: int, chunk: int) -> None:
    leaves = leaves_of(5, numel)
    for result in together(3, lambda rank, group: reduce_as(group, leaves, chunk)):
        assert result.tobytes() == tree(leaves).tobytes()


def test_maximal_subtrees_cover_the_run_and_are_maximal() -> None:
    def every(node: tuple[int, int]) -> set[tuple[int, int]]:
        low, high = node
        if high - low == 1:
            return {node}
        middle = low + 2 ** (math.ceil(math.log2(high - low)) - 1)
        return {node} | every((low, middle)) | every((middle, high))

    for num_shards in range(1, 17):
        nodes = every((0, num_shards))
        for low in range(num_shards):
            for high in range(low + 1, num_shards + 1):
                inside = {n for n in nodes if low <= n[0] and n[1] <= high}
                largest = sorted(n for n in inside if not any(m != n and m[0] <= n[0] and n[1] <= m[1] for m in inside))
                assert maximal_subtrees(range(low, high), num_shards) == largest
    assert maximal_subtrees(range(3, 3), 8) == []


def test_tree_sum_of_scalars() -> None:
    for num_values in range(1, 17):
        values = leaves_of(num_values, 1)[:, 0].astype(float).tolist()

        def scalar(part: list[float]) -> float:
            if len(part) == 1:
                return part[0]
            left = 2 ** (math.ceil(math.log2(len(part))) - 1)
            return scalar(part[:left]) + scalar(part[left:])

        assert tree_sum(values) == scalar(values)
    with pytest.raises(ValueError, match="at least one"):
        tree_sum([])


def test_shards_come_in_order() -> None:
    sums = SubtreeSums(range(2, 4), 4, lambda: np.zeros(1, np.float32), lambda _: None)
    with pytest.raises(ValueError, match="shard 3 is out of order"):
        sums.begin(3)
    sums.begin(2)
    with pytest.raises(ValueError, match="not done"):
        sums.nodes()
    sums.end(2)
    with pytest.raises(ValueError, match="not begun"):
        sums.end(3)


def test_sums_of_another_run_are_refused() -> None:
    group = Hub().form(0, 0, 2)
    with pytest.raises(ValueError, match="has the sums"):
        reduction.reduce(group, [((0, 1), np.zeros(4, np.float32))], 4, np.zeros(32, np.float32), 4, BLOCK,
                         Scratch(lambda n: np.zeros(n, np.float32)))
