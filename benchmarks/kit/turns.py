"""Groups of processes that are all alive and train in turns: one group at a time, a few steps each.

So two contestants meet the same moods of the machine, and nothing but steps is on the clock.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from benchmarks.kit.processes import ONE_THREAD

PATIENCE_S = 120.0


class Turns:
    """One process's side. It calls `begin` before every step, and `note` with a loss where it knows one."""

    def __init__(self, pipe: Connection, length: int):
        self._pipe, self._length = pipe, length
        self._steps = 0
        self._losses: list[tuple[int, float]] = []

    def note(self, step: int, loss: float) -> None:
        """Steps count from 1. Where several processes know losses of a step, each of its own rows, theirs is the mean.
        """
        self._losses.append((step, loss))

    def begin(self) -> None:
        """Returns when it is this process's turn."""
        if self._steps % self._length == 0:
            self._pipe.send(self._losses)
            self._losses = []
            self._pipe.recv()
        self._steps += 1


class Contestant:
    """`target(rank, turns, *arguments)` in `size` processes, which end with this."""

    def __init__(self, name: str, target: Callable[..., None], size: int, length: int, *arguments: Any):
        self.name, self._length = name, length
        self.losses: dict[int, list[float]] = {}
        context = multiprocessing.get_context("spawn")
        os.environ.update(ONE_THREAD)
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=begin, args=(target, rank, theirs, length, arguments), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Contestant:
        self.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType
                 | None) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def wait(self) -> None:
        """Until all have done their turn. RuntimeError if one has ended."""
        for pipe in self._pipes:
            if not pipe.poll(PATIENCE_S):
                raise RuntimeError(f"{self.name}: no answer in {PATIENCE_S:g} s")
            try:
                for step, loss in pipe.recv():
                    self.losses.setdefault(step, []).append(loss)
            except EOFError as error:
                raise RuntimeError(f"{self.name}: a process has ended") from error

    def turn(self) -> float:
        """Seconds of one step of a turn."""
        started = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(None)
        self.wait()
        return (time.perf_counter() - started) / self._length


def begin(target: Callable[..., None], rank: int, pipe: Connection, length: int, arguments: tuple[Any, ...]) -> None:
    target(rank, Turns(pipe, length), *arguments)
