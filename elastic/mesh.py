"""The mesh: how many workers along each axis, who sits where, and which logical shards are whose."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

AXES = ("data", "pipeline", "tensor", "expert")
# of the axes in a rank, slowest first: a replica is a run of ranks, so is a tensor group
ORDER = ("data", "pipeline", "expert", "tensor")


@dataclass(frozen=True)
class Coordinate:
    """A worker's place along each axis."""

    data: int = 0
    pipeline: int = 0
    expert: int = 0
    tensor: int = 0


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
        return self.pipeline * self.expert * self.tensor

    @property
    def world_size(self) -> int:
        return self.data * self.replica_size

    def coordinate(self, rank: int) -> Coordinate:
        """Where a rank sits."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a mesh of {self.world_size}.")
        places = {}
        for axis in reversed(ORDER):
            rank, places[axis] = divmod(rank, getattr(self, axis))
        return Coordinate(**places)

    def rank(self, coordinate: Coordinate) -> int:
        """Who sits there."""
        rank = 0
        for axis in ORDER:
            rank = rank * getattr(self, axis) + getattr(coordinate, axis)
        return rank

    def axis_ranks(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks along one axis through `rank`, in order."""
        coordinate = self.coordinate(rank)
        return tuple(self.rank(replace(coordinate, **{axis: i})) for i in range(getattr(self, axis)))

    def replica(self, rank: int) -> tuple[int, ...]:
        """The ranks that share `rank`'s copy of the model, in order."""
        low = rank - rank % self.replica_size
        return tuple(range(low, low + self.replica_size))

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def shards_of(rank: int, size: int, num_shards: int) -> range:
    """The contiguous run of logical shards that replica `rank` of `size` owns; the first `num_shards % size` own one
    more."""
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
