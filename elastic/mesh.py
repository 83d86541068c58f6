"""The mesh: how many workers along each axis, and which logical shards are whose."""

from __future__ import annotations

from dataclasses import asdict, dataclass

AXES = ("data", "pipeline", "tensor", "expert")


@dataclass(frozen=True)
class Mesh:
    """How many workers lie along each axis. A replica is one coordinate of `data`."""

    data: int
    pipeline: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"mesh.{axis} = {getattr(self, axis)} must be at least 1.")

    @property
    def replica_size(self) -> int:
        """Workers that together hold one copy of the model."""
        return self.pipeline * self.tensor

    @property
    def world_size(self) -> int:
        return self.data * self.replica_size

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def shards_of(rank: int, size: int, num_shards: int) -> range:
    """The contiguous run of logical shards that replica `rank` of `size` owns; the first `num_shards % size` own one more."""
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is not in a group of {size}.")
    each, more = divmod(num_shards, size)
    low = rank * each + min(rank, more)
    return range(low, low + each + (rank < more))


def rounds(num_shards: int, size: int) -> int:
    """Shards that the busiest of `size` replicas computes one after the other."""
    return -(-num_shards // size)


def speedup(num_shards: int, size: int) -> float:
    """The best that `size` replicas can do against one: L / ceil(L / W)."""
    return num_shards / rounds(num_shards, size)


def useful_sizes(num_shards: int, most: int | None = None) -> tuple[int, ...]:
    """The sizes up to `most` at which a step takes fewer rounds than with any smaller size."""
    sizes = range(1, min(num_shards, most or num_shards) + 1)
    return tuple(w for w in sizes if w == 1 or rounds(num_shards, w) < rounds(num_shards, w - 1))
