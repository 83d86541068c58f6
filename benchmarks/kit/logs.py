"""Step logs: one file per process with a line per committed step, written by the peers and read by the scripts."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One process's word that `step` counts."""

    time: float  # Unix seconds
    step: int
    world: int  # workers that took part
    pid: int


class StepLog:
    """A process's own file in `folder`. Every line is in the system's hands at once, so that a SIGKILL loses none."""

    def __init__(self, folder: str | Path):
        self._file = open(Path(folder) / f"{os.getpid()}.jsonl", "a", buffering=1)  # noqa: SIM115

    def write(self, step: int, world: int) -> None:
        self._file.write(f"[{time.time()!r}, {step}, {world}, {os.getpid()}]\n")


class Tail:
    """The new whole lines of a growing file."""

    def __init__(self, path: Path):
        self.path, self._at = path, 0

    def read(self) -> list[Any]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._at)
            whole = file.read().rpartition(b"\n")[0]
        self._at += len(whole) + bool(whole)
        return [json.loads(line) for line in whole.splitlines()]


class Folder:
    """All step logs of a folder, in the order of time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tails: dict[Path, Tail] = {}
        self.steps: list[Step] = []

    def read(self) -> list[Step]:
        for path in self.folder.glob("*.jsonl"):
            self._tails.setdefault(path, Tail(path))
        for tail in self._tails.values():
            self.steps += [Step(*line) for line in tail.read()]
        self.steps.sort(key=lambda step: step.time)
        return self.steps


def durations(steps: list[Step], skip: int = 10) -> list[float]:
    """Seconds from step to step of the process that logged most, without its first `skip`."""
    by_pid: dict[int, list[float]] = {}
    for step in steps:
        by_pid.setdefault(step.pid, []).append(step.time)
    times = max(by_pid.values(), key=len, default=[])[skip:]
    return [after - before for before, after in zip(times, times[1:], strict=False)]
