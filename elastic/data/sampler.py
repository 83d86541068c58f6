"""Which samples make up a batch: a pure function of (seed, step, shard), so one integer is the cursor of a run.

Positions count samples from the start of the run and run on across epochs. Step k (from 1) owns the positions
[(k - 1) * batch_size, k * batch_size), cut into one contiguous slice per logical shard. Who computes a shard does not
enter.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from elastic.data.order import Order, Rows

FILLER = -1  # a position that holds no sample; its row has weight 0
AT_ONCE = 4096  # positions that are located together: a few cost nearly as much


class Sampler:
    """The samples of a run whose length is given in `steps` or in `epochs` (exactly one of them), in `order`.

    Without an `order`, all rows are shuffled together, or not at all.
    """

    def __init__(self, num_samples: int, batch_size: int, logical_shards: int, seed: int, shuffle: bool,
                 epochs: float | None = None, steps: int | None = None, order: Order | None = None):
        if num_samples < 1:
            raise ValueError(f"num_samples = {num_samples} must be at least 1.")
        if logical_shards < 1 or batch_size < 1 or batch_size % logical_shards:
            raise ValueError(f"batch_size = {batch_size} must be a multiple of logical_shards = {logical_shards}.")
        self.num_samples, self.batch_size, self.logical_shards = num_samples, batch_size, logical_shards
        self.order = order or Rows(num_samples, seed, shuffle)
        self.shard_size = batch_size // logical_shards
        if steps is not None and epochs is None:
            self.num_positions = steps * batch_size
        elif epochs is not None and steps is None:
            self.num_positions = math.ceil(epochs * num_samples)
        else:
            raise ValueError("give either steps or epochs.")
        self.num_steps = -(-self.num_positions // batch_size)
        self._located = lru_cache(maxsize=4)(self._locate_steps)  # the loader's and the ledger's

    def positions(self, step: int, shard: int) -> np.ndarray:
        """(shard_size,) int64: the positions of one shard of a step; `FILLER` behind the end of the run."""
        if not 1 <= step <= self.num_steps or not 0 <= shard < self.logical_shards:
            raise ValueError(f"step {step}, shard {shard} is outside {self.num_steps} steps of {self.logical_shards} "
                             "shards.")
        return self._positions((step - 1) * self.batch_size + shard * self.shard_size, self.shard_size)

    def _positions(self, first: int, count: int) -> np.ndarray:
        positions = np.arange(first, first + count, dtype=np.int64)
        positions[positions >= self.num_positions] = FILLER
        return positions

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, indices), int64: the epoch and the sample at each position; both `FILLER` for fillers."""
        positions = np.asarray(positions, np.int64)
        epochs = np.full(positions.shape, FILLER)
        indices, real = epochs.copy(), positions >= 0
        epochs[real], indices[real] = self.order.locate(positions[real])
        return epochs, indices

    def rows(self, step: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """`locate` of a shard's `positions`, read-only."""
        positions, together = self.positions(step, shard), AT_ONCE // self.batch_size
        if together < 2:
            return self.locate(positions)
        block, within = divmod(step - 1, together)
        first = within * self.batch_size + shard * self.shard_size
        epochs, indices = self._located(block, together)
        return epochs[first:first + self.shard_size], indices[first:first + self.shard_size]

    def _locate_steps(self, block: int, together: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the `block`-th run of so many steps."""
        size = together * self.batch_size
        found = self.locate(self._positions(block * size, size))
        for array in found:
            array.flags.writeable = False
        return found
