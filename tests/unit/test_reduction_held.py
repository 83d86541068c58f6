"""Sums of which everybody gets its own range: the bits of the whole tree's sum, cut by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elastic.collective import reduction
from elastic.collective.local import Hub
from elastic.collective.reduction import Scratch, SubtreeSums
from elastic.collective.solo import SoloGroup
from elastic.mesh import shards_of
from elastic.state.ownership import cuts
from tests.support.sums import leaves_of, tree
from tests.support.threads import together

BLOCK = 16


def sums_of(group: Any, leaves: np.ndarray) -> SubtreeSums:
    run = shards_of(group.rank, group.size, len(leaves))
    sums = SubtreeSums(run, len(leaves), lambda: np.zeros(leaves.shape[1] + 5, np.float32), lambda _: None)
    for shard in run:
        buffer = sums.begin(shard)
        buffer[:leaves.shape[1]] += leaves[shard]
        sums.end(shard)
    return sums


def dirty(size: int) -> np.ndarray:
    return np.full(size, np.nan, np.float32)


class Counted:
    """A group that counts the elements that a member sends to others."""

    def __init__(self, group: Any):
        self.group, self.rank, self.size, self.sent = group, group.rank, group.size, 0

    def all_to_all(self, out: Any, out_counts: Any, buffer: Any, counts: Any) -> None:
        self.sent += sum(count for rank, count in enumerate(counts) if rank != self.rank)
        self.group.all_to_all(out, out_counts, buffer, counts)

    def all_gather(self, out: Any, part: Any) -> None:
        self.sent += len(part) * (self.size - 1)
        self.group.all_gather(out, part)


@pytest.mark.parametrize("twin", [True, False])
@pytest.mark.parametrize("chunk", [1, 48, 1000])
@pytest.mark.parametrize("num_blocks", [1, 3, 8])
@pytest.mark.parametrize("num_shards", [1, 4, 5, 8])
def test_everybody_gets_the_trees_bits_of_what_it_keeps(num_shards: int, num_blocks: int, chunk: int,
                                                        twin: bool) -> None:
    leaves = leaves_of(num_shards, num_blocks * BLOCK)
    whole = tree(leaves)
    for size in range(1, min(num_shards, 4) + 1):
        where = [BLOCK * cut for cut in cuts(size, num_blocks)]

        def member(rank: int, group: Any) -> np.ndarray:
            group = group if size > 1 else SoloGroup()
            sums = sums_of(group, leaves).nodes()
            return reduction.reduce_held(group, sums, num_shards, dirty(len(whole)), where, twin,
                                         Scratch(dirty, chunk)).copy()

        for rank, result in enumerate(together(size, member)):
            expected = np.concatenate([whole[where[r]:where[r + 1]]
                                       for r in ([rank, (rank - 1) % size] if twin and size > 1 else [rank])])
            assert result[:len(expected)].tobytes() == expected.tobytes()
            assert size == 1 or np.isnan(result[len(expected):]).all()


@pytest.mark.parametrize("chunk", [1, 48, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_owners_give_their_chunks(size: int, chunk: int) -> None:
    where = [BLOCK * cut for cut in cuts(size, 7)]
    whole = leaves_of(1, 7 * BLOCK)[0]

    def member(rank: int, group: Any) -> np.ndarray:
        buffer = dirty(7 * BLOCK + 3)
        buffer[where[rank]:where[rank + 1]] = whole[where[rank]:where[rank + 1]]
        reduction.gather_owned(group if size > 1 else SoloGroup(), buffer, where, Scratch(dirty, chunk))
        assert np.isnan(buffer[7 * BLOCK:]).all()
        return buffer[:7 * BLOCK]

    assert all(result.tobytes() == whole.tobytes() for result in together(size, member))


@pytest.mark.parametrize("size", [2, 4])
def test_a_twin_costs_its_share_of_the_traffic(size: int) -> None:
    leaves = leaves_of(8, 8 * BLOCK)
    where = [BLOCK * cut for cut in cuts(size, 8)]

    def member(group: Counted, twin: bool) -> int:
        reduction.reduce_held(group, sums_of(group, leaves).nodes(), 8, dirty(8 * BLOCK), where, twin, Scratch(dirty))
        reduction.gather_owned(group, dirty(8 * BLOCK), where, Scratch(dirty))
        return group.sent

    without, with_twin = (sum(together(size, lambda rank, group: member(Counted(group), twin)))
                          for twin in (False, True))
    assert without == 2 * (size - 1) * 8 * BLOCK
    assert with_twin - without == without / (2 * (size - 1))


def test_sums_of_another_run_are_refused() -> None:
    group = Hub().form(0, 0, 2)
    with pytest.raises(ValueError, match="has the sums"):
        reduction.reduce_held(group, [((0, 1), dirty(4))], 4, dirty(4), [0, 2, 4], True, Scratch(dirty))
