"""Ours, in a process of its own: `python -m benchmarks.kit.own_checkpoints NAME FOLDER SAVES SCALE RESULT`.

A worker's `Saver` and the controller's `Checkpoints` in one process: durable means that the manifest is committed.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kit.steploop import WIDTH, Durable, make_arrays, measure, report
from elastic.checkpoint.manifest import Manifest
from elastic.collective.solo import SoloGroup
from elastic.controller.checkpoints import Checkpoints
from elastic.messages import Part, Save
from elastic.model.backend import Spec
from elastic.state.state import State
from elastic.worker.saver import Saver


class Memory:
    """As much of a backend as a state needs."""

    def __init__(self, parameters: dict[str, Spec]):
        self.parameters, self.buffers = parameters, {}

    def allocate(self, size: int) -> np.ndarray:
        room = np.zeros(size + 16, np.float32)
        start = -room.ctypes.data % 64 // 4
        return room[start:start + size]

    def bind(self, params: Any, buffers: Any) -> None:
        self.bound = params


class Own:
    def __init__(self, arrays: dict[str, np.ndarray], folder: Path, mb_s: float):
        prefix = "parameter/"
        specs = {name.removeprefix(prefix): Spec(array.shape) for name, array in arrays.items()
                 if name.startswith(prefix)}
        self.state = State(Memory(specs), "adamw")  # type: ignore[arg-type]
        self.state.load(arrays, 0)
        self.saver = Saver("worker-0", str(folder), Manifest(0, 0, 0, 0, f"[model]\nwidth = {WIDTH}\n"), 1, self.take,
                           mb_s=mb_s)
        self.durable = Durable()

    def save(self, path: Path, step: int) -> Durable:
        self.saver.location, self.durable = str(path), Durable()
        self.checkpoints, self.state.committed = Checkpoints(str(path), 3, ""), step
        self.saver.save(self.state, Save(1, step), {})
        return self.durable

    def take(self, part: Part) -> None:
        outcome = self.checkpoints.take(part, part.step)
        self.durable.set(outcome.error if outcome else "no outcome")

    def load(self, path: Path, step: int) -> None:
        self.saver.restore(f"{path}/step-{step:08d}", self.state, SoloGroup(), lambda number: nullcontext())


def main(name: str, folder: str, saves: str, scale: str, result: str) -> None:
    torch.set_num_threads(1)
    pace = name.partition("at ")[2].partition(" MB/s")[0]
    own = Own(make_arrays(float(scale)), Path(folder), float(pace or 0))
    report(measure(own, own.state.arrays(), Path(folder), int(saves)), result)
    own.saver.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
