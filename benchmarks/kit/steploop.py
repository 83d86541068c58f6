"""A step loop that saves now and then: what it sees of a save, and what the save costs the steps beside it."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from nlp.gpt import Config, specs

QUIET_STEPS = 25  # before every save, to compare with
LOADS = 3
SLOTS = ("exp_avg", "exp_avg_sq")
LAYERS, WIDTH, VOCAB = 11, 768, 5400  # parameters and two Adam slots: 1.00 GB


class Contestant(Protocol):
    """One way to save and load `arrays`, float32 by name, which it has from the start."""

    def save(self, path: Path, step: int) -> Durable:
        """Returns as soon as the step loop may change the arrays again."""

    def load(self, path: Path, step: int) -> None:
        """Brings the arrays back from the disk."""


class Durable:
    """Set once a save is on the disk, whole."""

    def __init__(self) -> None:
        self.event, self.at, self.error = threading.Event(), 0.0, ""

    def set(self, error: str = "") -> Durable:
        self.at, self.error = time.perf_counter(), error
        self.event.set()
        return self


def make_arrays(scale: float) -> dict[str, np.ndarray]:
    """A GPT's parameters with Adam's two slots: `scale` GB in all, random, so that nothing can be left out."""
    config = Config(layers=max(1, round(LAYERS * scale)), heads=1, width=WIDTH)
    generator, arrays = np.random.default_rng(0), {}
    for name, spec in specs(config, VOCAB).items():
        for kind in ("parameter", *(f"optimizer/{slot}" for slot in SLOTS)):
            arrays[f"{kind}/{name}"] = generator.random(spec.shape, np.float32)
    return arrays


class Step:
    """About twenty milliseconds of one thread: products, and a pass over some memory as an optimizer makes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.left, self.right = (torch.randn(256, 1024, generator=generator),
                                 torch.randn(1024, 1024, generator=generator))
        self.memory = torch.zeros(4_000_000)
        self.repeat = 1
        once = min(self() for _ in range(5))
        self.repeat = max(1, round(0.02 / once))

    def __call__(self) -> float:
        started = time.perf_counter()
        for _ in range(self.repeat):
            self.left @ self.right
        self.memory.add_(1.0)
        return time.perf_counter() - started


def measure(contestant: Contestant, arrays: dict[str, np.ndarray], folder: Path, saves: int) -> dict[str, Any]:
    """Seconds of `saves` saves after one that is not counted, and of loads from a disk whose cache was dropped."""
    step, found = Step(), {"stall": [], "total": [], "beside": [], "load": []}
    path = folder
    for number in range(1, saves + 2):
        shutil.rmtree(path, ignore_errors=True)
        os.sync()
        path = folder / str(number)
        path.mkdir(parents=True)
        one = one_save(contestant, path, number, step)
        if number > 1:
            for key, value in one.items():
                found[key].append(value)
    wanted = digest(arrays)
    for _ in range(LOADS):
        for array in arrays.values():
            array.fill(0)
        drop_cache(path)
        started = time.perf_counter()
        contestant.load(path, saves + 1)
        found["load"].append(time.perf_counter() - started)
    if digest(arrays) != wanted:
        raise RuntimeError("what was loaded is not what was saved")
    shutil.rmtree(path)
    return found


def one_save(contestant: Contestant, path: Path, number: int, step: Step) -> dict[str, float]:
    quiet = [step() for _ in range(QUIET_STEPS)]
    started = time.perf_counter()
    durable = contestant.save(path, number)
    found = {"stall": time.perf_counter() - started} | steps_beside(durable, step, quiet)
    if durable.error:
        raise RuntimeError(durable.error)
    return found | {"total": durable.at - started}


def steps_beside(durable: Durable, step: Step, quiet: list[float]) -> dict[str, float]:
    """Steps until it is durable, the mean of one against the mean of `quiet` ones."""
    beside = []
    while not durable.event.is_set():
        beside.append(step())
    # the last ran on when all was over
    return {"beside": statistics.mean(beside[:-1]) / statistics.mean(quiet)} if len(beside) > 2 else {}


def digest(arrays: dict[str, np.ndarray]) -> str:
    whole = xxhash.xxh3_128()
    for name in sorted(arrays):
        whole.update(arrays[name].reshape(-1).view(np.uint8))
    return whole.hexdigest()


def drop_cache(path: Path) -> None:
    """A load is from the disk, not from what the save left in memory."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def report(found: dict[str, Any], file: str) -> None:
    Path(file).write_text(json.dumps(found))
    print(json.dumps(found), file=sys.stderr)
