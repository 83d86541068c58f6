"""From (step, shard) to a batch, at once or in the background. A batch depends on nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from elastic.data.dataset import Dataset
from elastic.data.sampler import FILLER, Sampler

Batch = dict[str, Any]  # columns by name; under "bags" what each feature looks up in embedding tables
Key = tuple[int, int]  # (step, shard)


def load_batch(dataset: Dataset, sampler: Sampler, step: int, shard: int) -> Batch:
    """The batch of one logical shard. With `dataset.fills`, "row_weight" (float32) is 1 for samples and 0 for filler
    rows, and what those look up in embedding tables is marked as filler."""
    epochs, indices = sampler.rows(step, shard)
    return rows_of(dataset, indices, epochs)


def eval_batches(dataset: Dataset, batch_size: int) -> list[Callable[[], Batch]]:
    """The whole data set in order, epoch 0, cut into batches of `batch_size`; each is loaded when called."""
    batches: list[Callable[[], Batch]] = []
    for first in range(0, dataset.num_samples, batch_size):
        indices = np.arange(first, first + batch_size, dtype=np.int64)
        indices[indices >= dataset.num_samples] = FILLER
        batches.append(partial(rows_of, dataset, indices, np.zeros(batch_size, np.int64)))
    return batches


def rows_of(dataset: Dataset, indices: np.ndarray, epochs: np.ndarray) -> Batch:
    real = indices >= 0
    if not dataset.fills:
        return dataset.batch(indices[real], epochs[real])
    batch = dataset.batch(np.where(real, indices, 0), np.where(real, epochs, 0))
    if "bags" in batch and not real.all():
        batch = {**batch, "bags": {name: replace(bags, is_filler=~real) for name, bags in batch["bags"].items()}}
    return {**batch, "row_weight": real.astype(np.float32)}


class Prefetcher:
    """Loads the batches that are expected next in a background thread, at most `depth` ahead.

    Calling it gives the batch of (step, shard): from the buffer where that batch comes next, else loaded on the spot,
    so the batches are the same whatever was expected. A loader's exception is raised by the call that asks for that
    batch. Calls, `expect` and `close` belong to one thread; until `close`, a load that hangs keeps the process alive.
    """

    def __init__(self, load: Callable[[int, int], Any], depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth = {depth} must be at least 1.")
        self._load, self._depth = load, depth
        self._keys: Iterator[Key] = iter(())
        self._ahead: deque[tuple[Key, Future[Any]]] = deque()
        self._thread = ThreadPoolExecutor(1, "prefetch")

    def expect(self, keys: Iterable[Key]) -> None:
        """Forgets what was buffered and loads ahead in this order from now on."""
        self.close()
        self._thread, self._keys = ThreadPoolExecutor(1, "prefetch"), iter(keys)
        self._fill()

    def _fill(self) -> None:
        """`depth` in the buffer, and one in hand."""
        for key in islice(self._keys, self._depth + 1 - len(self._ahead)):
            self._ahead.append((key, self._thread.submit(self._load, *key)))

    def __call__(self, step: int, shard: int) -> Any:
        if not self._ahead or self._ahead[0][0] != (step, shard):
            return self._load(step, shard)
        _, found = self._ahead.popleft()
        self._fill()
        if found.exception():
            self.close()
        return found.result()

    def close(self) -> None:
        """Ends the thread; may be called again. Batches asked for afterwards are loaded on the spot."""
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()
