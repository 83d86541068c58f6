"""A worker's side of checkpoints: copy at the step boundary, write beside the training, hand the manifest to the controller."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from elastic.checkpoint.hashing import hashes
from elastic.checkpoint.manager import load, read_start, split, write_part
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.store import Store
from elastic.messages import Part
from elastic.state import State


class Saver:
    """Writes at most one checkpoint at a time; a second waits for the first. `post` takes the `Part` of each that is durable."""

    def __init__(self, worker: str, location: str, recipe: str, batch_size: int, seed: int, info: Mapping[str, Any],
                 post: Callable[[Any], None]):
        self.worker, self.location, self.recipe, self.info, self.post = worker, location, recipe, dict(info), post
        self.batch_size, self.seed = batch_size, seed
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, state: State, generation: int, step: int, evaluation: Mapping[str, float], wait: bool) -> None:
        """Returns once the state is copied, or with `wait` once it is durable. Raises what went wrong with the one before."""
        started = time.perf_counter()
        self.join()
        arrays = {name: array.copy() for name, array in state.arrays().items()}
        stall_s = time.perf_counter() - started
        self.thread = threading.Thread(target=self._write, args=(arrays, generation, step, dict(evaluation), stall_s, started), daemon=True)
        self.thread.start()
        if wait:
            self.join()

    def _write(self, arrays: dict[str, np.ndarray], generation: int, step: int, evaluation: dict[str, float], stall_s: float,
               started: float) -> None:
        try:
            entry = write_part(Store.open(self.location), step, generation, f"state-{self.worker}", arrays)
            manifest = Manifest(step, generation, step * self.batch_size, self.seed, self.recipe, (entry,), evaluation, {"info": self.info})
            self.post(Part(self.worker, generation, step, manifest.dumps(), stall_s, time.perf_counter() - started))
        except Exception as error:
            self.error = error

    def join(self) -> None:
        """Waits for the write in flight."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise OSError(f"A checkpoint could not be written to {self.location}: {reason(error)}.") from error

    def hashes(self, state: State) -> dict[str, str]:
        parameters, whole = hashes(state.arrays(), state.committed * self.batch_size)
        return {"parameters_sha256": parameters, "state_sha256": whole}

    def load(self, path: str) -> tuple[dict[str, np.ndarray], int, dict[str, float]]:
        """Arrays, step and evaluation of a checkpoint. `BadCheckpoint` if it is not whole."""
        arrays, manifest = load(*split(path))
        return arrays, manifest.step, dict(manifest.eval)

    def initial(self, path: str, state: State) -> dict[str, np.ndarray]:
        """The values of [model] init by parameter name, which fit the model."""
        return read_start(path, state.layout.places)


def reason(error: BaseException) -> str:
    """Without the storage's own words, which name a temporary file: the same fault is the same sentence."""
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    return os.strerror(error.errno) if error.errno else type(error).__name__
