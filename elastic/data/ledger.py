"""What each worker feeds, compared with what its positions name before a step counts; `observe/ledger_files.py` has it on disk."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from elastic.data.dataset import Dataset
from elastic.data.loader import Batch, Key, Prefetcher, rows_of
from elastic.data.sampler import Sampler
from elastic.errors import RunFailed

DIGEST_BYTES = 6  # exact in a float64, which is how it travels in the vote


def digest(step: int, shard: int, epochs: np.ndarray, samples: np.ndarray) -> float:
    """One number for what a logical shard was fed: its real rows, in order; never 0."""
    real = samples >= 0
    said = b"%d/%d/" % (step, shard) + epochs[real].astype("<i8").tobytes() + samples[real].astype("<i8").tobytes()
    return float(int.from_bytes(hashlib.blake2b(said, digest_size=DIGEST_BYTES).digest(), "little") | 1)


class Ledger:
    """One worker's side: what it has fed, up to the steps whose batches it has loaded ahead, and every step's rows as its sampler names them."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.fed = sampler, dict[Key, float]()
        self.named = lru_cache(2)(self._named)

    def _named(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(shards, positions, epochs, samples) of all rows of a step, fillers too."""
        num = self.sampler.logical_shards
        positions = np.concatenate([self.sampler.positions(step, shard) for shard in range(num)])
        return np.repeat(np.arange(num), self.sampler.shard_size), positions, *self.sampler.locate(positions)

    def digests(self, step: int) -> np.ndarray:
        """(logical_shards,) of what this worker fed in `step`; 0 for the shards of others."""
        out = np.zeros(self.sampler.logical_shards)
        for when, shard in list(self.fed):
            if when == step:
                out[shard] = self.fed[when, shard]
            elif when < step:
                del self.fed[when, shard]
        return out

    def check(self, step: int, found: np.ndarray) -> None:
        """RunFailed if a shard was fed by nobody, by two, or other samples than its positions name."""
        shards, _, epochs, samples = self.named(step)
        for shard, was in enumerate(found.tolist()):
            mine = shards == shard
            if was != digest(step, shard, epochs[mine], samples[mine]):
                raise RunFailed(f"Logical shard {shard} of step {step} was fed other samples than its positions name.")

    def line(self, step: int) -> dict[str, Any]:
        """The rows of a step, as plain values: see `elastic.observe.ledger_files`."""
        rows = np.stack(self.named(step), axis=1)
        packed = rows[rows[:, 1] >= 0].astype("<i8").tobytes()
        return {"sizes": list(self.sampler.order.sizes), "rows": base64.b64encode(packed).decode()}


class NotedLoader(Prefetcher):
    """A prefetcher that tells the ledger of every batch it hands out."""

    def __init__(self, dataset: Dataset, sampler: Sampler, ledger: Ledger):
        def load(step: int, shard: int) -> Any:
            epochs, samples = sampler.rows(step, shard)
            return rows_of(dataset, samples, epochs), digest(step, shard, epochs, samples)

        super().__init__(load)
        self._ledger = ledger

    def __call__(self, step: int, shard: int) -> Batch:
        batch, found = super().__call__(step, shard)
        self._ledger.fed[step, shard] = found
        return batch

    def expect(self, keys: Iterable[Key]) -> None:
        self._ledger.fed.clear()  # a new generation: the shards of the last one may be others' now
        super().expect(keys)
