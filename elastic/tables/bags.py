"""What one feature looks up in a shard, and the sums of slopes that come back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from elastic.errors import NonFiniteLoss, UserError
from elastic.tables.spec import TableSpec

POOLINGS = ("sum", "mean", "none")


@dataclass(frozen=True)
class Bags:
    """Jagged lists of ids: bag b is ids[offsets[b]:offsets[b + 1]].

    `ids` int64, `offsets` int64 (bags + 1), `weights` float32 as `ids` or None for ones. Under "sum" and "mean" a bag
    is looked up as one row (a mean is divided by the sum of the weights, where that is not 0); under "none" as `length`
    rows, zeros behind its last id. `is_filler`, bool (bags), names the bags that only fill a batch up: they are looked
    up, but nothing of them comes back.
    """

    ids: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None
    pooling: str = "sum"
    length: int = 1
    is_filler: np.ndarray | None = None

    @property
    def size(self) -> int:
        return self.offsets.size - 1

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, bags: slice) -> Bags:
        """A run of them."""
        first, last, _ = bags.indices(self.size)
        offsets = self.offsets[first:max(first, last) + 1]
        inside = slice(int(offsets[0]), int(offsets[-1]))
        return Bags(self.ids[inside], offsets - offsets[0], None if self.weights is None else self.weights[inside],
                    self.pooling, self.length, None if self.is_filler is None else self.is_filler[bags])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64, one a bag."""
        return np.diff(self.offsets)

    @cached_property
    def rise(self) -> bool:
        """Whether offsets go from 0 to the last id and never fall."""
        return bool(self.offsets[0] == 0 and self.offsets[-1] == self.ids.size and (not self.size or self.lengths.min() >= 0))

    @cached_property
    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, targets) int64: positions offsets[r]..offsets[r + 1] - 1 add up to row targets[r] of what is looked
        up."""
        if self.pooling != "none":
            return self.offsets, np.arange(self.size)
        firsts = np.repeat(np.arange(self.size) * self.length - self.offsets[:-1], self.lengths)
        return np.arange(self.ids.size + 1), firsts + np.arange(self.ids.size)

    @cached_property
    def divisors(self) -> np.ndarray | None:
        """float32, one a bag, by which a mean is divided; None for a sum."""
        if self.pooling != "mean":
            return None
        if self.weights is None:
            found = self.lengths.astype(np.float32)
        else:  # in position order, as everything is added here
            found = np.zeros(self.size, np.float32)
            np.add.at(found, np.repeat(np.arange(self.size), self.lengths), self.weights)
        found[found == 0] = 1
        return found

    def shape(self, width: int) -> tuple[int, ...]:
        return (self.size, self.length, width) if self.pooling == "none" else (self.size, width)

    def check(self, spec: TableSpec) -> None:
        """UserError where what a data set gave cannot be looked up."""
        where, ids, offsets = f"table {spec.name}", self.ids, self.offsets
        if ids.dtype != np.int64 or ids.ndim != 1 or offsets.dtype != np.int64 or offsets.ndim != 1 or not offsets.size:
            raise UserError(f"{where}: ids are {ids.dtype} with {ids.ndim} dims and offsets {offsets.dtype} with "
                            f"{offsets.ndim}; both must be one int64 array, and offsets one longer than there are "
                            "lists.")
        if self.pooling not in POOLINGS:
            raise UserError(f"tables.{spec.name}.pooling = {self.pooling!r} is not one of {', '.join(POOLINGS)}.")
        lengths = self.lengths
        if not self.rise:
            falls = f" and decrease behind list {np.argmax(lengths < 0)}" if (lengths < 0).any() else ""
            raise UserError(f"{where}: offsets must rise from 0 to the {ids.size} ids that there are, and these run "
                            f"from {offsets[0]} to {offsets[-1]}{falls}.")
        if self.pooling == "none" and lengths.size and lengths.max() > self.length:
            raise UserError(f"{where}: list {np.argmax(lengths)} has {lengths.max()} ids, and lists that are not "
                            f"pooled are {self.length} long at most; cut it, or state a larger length.")
        for name, array, shape, dtype in (("weights", self.weights, ids.shape, np.float32),
                                          ("is_filler", self.is_filler, lengths.shape, np.bool_)):
            if array is not None and (array.shape != shape or array.dtype != dtype):
                raise UserError(f"{where}: {name} are {array.dtype} of shape {array.shape}; they must be "
                                f"{np.dtype(dtype)} of shape {shape}.")
        check_ids(spec, ids)


def check_ids(spec: TableSpec, ids: np.ndarray) -> None:
    """UserError for an id outside a static vocabulary."""
    if not spec.vocabulary or not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= spec.vocabulary:
        raise UserError(f"table {spec.name}: id {low if low < 0 else high} is not in its vocabulary, 0 to "
                        f"{spec.vocabulary - 1}; mend the data, or let the table grow.")


@dataclass(frozen=True)
class Summed:
    """What comes back for distinct ids: `ids` int64 ascending, `sums` float32 (ids, width) of slopes, `counts` int32 of
    appearances."""

    ids: np.ndarray
    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def none(cls, width: int) -> Summed:
        return cls(np.empty(0, np.int64), np.empty((0, width), np.float32), np.empty(0, np.int32))

    def check(self, spec: TableSpec) -> None:
        """UserError for what would be applied to the wrong rows."""
        sizes = self.ids.shape, self.sums.shape, self.counts.shape
        kinds = self.ids.dtype, self.sums.dtype, self.counts.dtype
        num = self.ids.size
        if sizes != ((num,), (num, spec.width), (num,)) or kinds != (np.int64, np.float32, np.int32):
            raise UserError(f"table {spec.name}: sums are {kinds[0]} {sizes[0]}, {kinds[1]} {sizes[1]}, {kinds[2]} "
                            f"{sizes[2]}; they must be int64 ids, float32 rows of width {spec.width} and int32 counts, "
                            "one of each an id.")
        if (self.ids[1:] <= self.ids[:-1]).any():
            raise UserError(f"table {spec.name}: the ids of its sums must rise, each once.")
        check_ids(spec, self.ids)


def check_slopes(spec: TableSpec, bags: Bags, slopes: np.ndarray) -> None:
    wanted = bags.shape(spec.width)
    if slopes.shape != wanted or slopes.dtype != np.float32:
        raise UserError(f"table {spec.name}: its slopes are {slopes.dtype} of shape {slopes.shape}; they must be as "
                        f"what was looked up, float32 of shape {wanted}.")


def not_finite(spec: TableSpec, id: int, step: int) -> NonFiniteLoss:
    return NonFiniteLoss(f"table {spec.name}: the gradient of id {id} is not finite at step {step}; lower "
                         f"tables.{spec.name}.lr, or look for values in the data that are no numbers.")
