"""Which logical shards are whose."""

from __future__ import annotations

import pytest

from elastic.mesh import Mesh, shards_of, speedup, useful_sizes


@pytest.mark.parametrize("num_shards", range(1, 17))
def test_shards_of_is_a_balanced_cut(num_shards: int) -> None:
    for size in range(1, num_shards + 4):
        runs = [shards_of(rank, size, num_shards) for rank in range(size)]
        assert [shard for run in runs for shard in run] == list(range(num_shards))
        lengths = [len(run) for run in runs]
        assert lengths == sorted(lengths, reverse=True)
        assert max(lengths) - min(lengths) <= 1


def test_shards_of_refuses_a_foreign_rank() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        shards_of(2, 2, 8)


def test_speedup_and_useful_sizes() -> None:
    assert [speedup(8, w) for w in (1, 2, 3, 4, 5, 8)] == [1, 2, 8 / 3, 4, 4, 8]
    assert useful_sizes(8) == (1, 2, 3, 4, 8)
    assert useful_sizes(8, 3) == (1, 2, 3)
    assert useful_sizes(1) == (1,)


def test_mesh() -> None:
    mesh = Mesh(data=3, pipeline=2, tensor=2)
    assert (mesh.replica_size, mesh.world_size) == (4, 12)
    assert mesh.as_dict() == {"data": 3, "pipeline": 2, "tensor": 2, "expert": 1}
    with pytest.raises(ValueError, match="mesh.tensor = 0"):
        Mesh(data=1, tensor=0)
