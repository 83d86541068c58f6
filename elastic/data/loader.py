"""From (step, shard) to a batch, at once or in the background. A batch depends on nothing else."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from elastic.data.dataset import Dataset
from elastic.data.sampler import FILLER, Sampler

Batch = dict[str, np.ndarray]
Key = tuple[int, int]  # (step, shard)


def load_batch(dataset: Dataset, sampler: Sampler, step: int, shard: int) -> Batch:
    """The batch of one logical shard. With `dataset.fills`, "row_weight" (float32) is 1 for samples and 0 for filler rows."""
    epochs, indices = sampler.locate(sampler.positions(step, shard))
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
    return {**batch, "row_weight": real.astype(np.float32)}


class Prefetcher:
    """Loads the batches that are expected next in a background thread, at most `depth` ahead.

    Calling it gives the batch of (step, shard): from the buffer where that batch comes next, else loaded on the spot, so
    the batches are the same whatever was expected. A loader's exception is raised by the call that asks for that batch.
    Calls, `expect` and `close` belong to one thread.
    """

    def __init__(self, load: Callable[[int, int], Any], depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth = {depth} must be at least 1.")
        self._load, self._depth = load, depth
        self._stream: _Stream | None = None

    def expect(self, keys: Iterable[Key]) -> None:
        """Forgets what was buffered and loads ahead in this order from now on."""
        self.close()
        self._stream = _Stream(self._load, keys, self._depth)

    def __call__(self, step: int, shard: int) -> Any:
        found = self._stream.take((step, shard)) if self._stream else None
        if isinstance(found, BaseException):
            self.close()
            raise found
        return self._load(step, shard) if found is None else found

    def close(self) -> None:
        """Ends the thread; may be called again. Batches asked for afterwards are loaded on the spot."""
        if self._stream:
            self._stream.close()
        self._stream = None


class _Stream:
    """One order of keys, its thread and its bounded buffer."""

    def __init__(self, load: Callable[[int, int], Any], keys: Iterable[Key], depth: int):
        self._load, self._keys = load, keys
        self._buffer: queue.Queue[tuple[Key | None, Any]] = queue.Queue(depth)
        self._head: tuple[Key | None, Any] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for key in self._keys:
                try:
                    value = self._load(*key)
                except BaseException as error:  # handed to the caller, who raises it
                    value = error
                if not self._put((key, value)):
                    return
        finally:
            self._put((None, None))

    def _put(self, entry: tuple[Key | None, Any]) -> bool:
        if not self._closed.is_set():
            self._buffer.put(entry)
        return not self._closed.is_set()

    def take(self, key: Key) -> Any:
        """The batch of `key` if it is the next one, else None."""
        if self._head is None:
            self._head = self._buffer.get()
        if self._head[0] != key:
            return None
        value, self._head = self._head[1], None
        return value

    def close(self) -> None:
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._buffer.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()
