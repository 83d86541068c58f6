"""What no checkpoint can beat: `python -m benchmarks.kit.limits FOLDER ROUNDS SCALE RESULT`."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash

from benchmarks.kit.steploop import QUIET_STEPS, Durable, Step, make_arrays, report, steps_beside

PIECE = 16 * 1024 * 1024


def copy(source: np.ndarray, kept: np.ndarray) -> None:
    np.copyto(kept, source)


def write(path: Path, data: memoryview, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags)
    low = 0
    while low < len(data):
        low += os.write(descriptor, data[low:low + PIECE])
    os.fsync(descriptor)
    os.close(descriptor)


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def beside(path: Path, data: memoryview, step: Step) -> float:
    """A step beside a bare write, against one without."""
    durable, quiet = Durable(), [step() for _ in range(QUIET_STEPS)]

    def work() -> None:
        write(path, data, os.O_DIRECT)
        durable.set()

    threading.Thread(target=work, daemon=True).start()
    return steps_beside(durable, step, quiet)["beside"]


def main(folder: str, rounds: str, scale: str, result: str) -> None:
    torch.set_num_threads(1)
    size = sum(array.nbytes for array in make_arrays(float(scale)).values())
    size += -size % mmap.PAGESIZE  # what goes past the page cache has whole pages
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    kept, path = np.frombuffer(mmap.mmap(-1, size), np.uint8), Path(folder) / "raw"
    found: dict[str, list[float]] = {"copy": [], "raw write": [], "raw write, direct": [], "hash": [], "beside": []}
    step = Step()
    for _ in range(int(rounds) + 1):
        found["copy"].append(timed(lambda: copy(source, kept)))
        found["hash"].append(timed(lambda: xxhash.xxh3_128_digest(kept)))
        for name, flags in (("raw write", 0), ("raw write, direct", os.O_DIRECT)):
            path.unlink(missing_ok=True)
            os.sync()
            found[name].append(timed(lambda flags=flags: write(path, memoryview(kept), flags)))  # type: ignore[misc]
        path.unlink(missing_ok=True)
        os.sync()
        found["beside"].append(beside(path, memoryview(kept), step))
    path.unlink()
    # the first finds cold caches, as with the others
    report({name: values[1:] for name, values in found.items()} | {"bytes": [size]}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
