"""Killing a random worker at a random moment, and what the survivors' own step logs say about the pause."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.kit.logs import Step

STEPS_BETWEEN = (5, 20)  # committed by the whole group before the next kill
LOOK_S = 0.02


@dataclass(frozen=True)
class Kill:
    time: float  # Unix seconds, just before the signal
    pid: int
    step: int  # committed by then


@dataclass(frozen=True)
class Outcome:
    """What a kill came to. `pause_s`: from the kill to the next commit without the victim, minus one ordinary step if
    it was redone."""

    survived: bool
    pause_s: float
    steps_lost: int


class Stalled(Exception):
    """The group is not whole again in time."""


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline or not alive():
            raise Stalled(what)
        time.sleep(LOOK_S)


def kill_one(group: Callable[[], tuple[list[int], int]], size: int, generator: random.Random, timeout_s: float,
             alive: Callable[[], bool] = lambda: True,
             spare: Callable[[list[int]], list[int]] = lambda pids: []) -> Kill:
    """Waits for a whole group of `size` that has committed a random number of steps; then SIGKILL for one of it.

    `group` gives the pids that train together now, and the last committed step; `spare`, which of these stay alive.
    """
    wait_until(lambda: len(group()[0]) == size, timeout_s, f"no group of {size} within {timeout_s:g} s", alive)
    target = group()[1] + generator.randint(*STEPS_BETWEEN)
    wait_until(lambda: group()[1] >= target and len(group()[0]) == size, timeout_s, "no steps", alive)
    time.sleep(generator.random() * 0.1)  # anywhere in a step
    pids, step = group()
    spared = spare(pids)
    victim = generator.choice([pid for pid in pids if pid not in spared])
    kill = Kill(time.time(), victim, step)
    os.kill(victim, signal.SIGKILL)
    return kill


def peer_outcome(kill: Kill, steps: list[Step], size: int, restarts: bool) -> Outcome:
    """From step logs. `restarts`: it starts every process again, so that the next commit is another process's."""
    before = {s.pid for s in steps if s.time <= kill.time and s.step >= kill.step - 2 and s.world == size}
    later = [s for s in steps if s.time > kill.time]
    candidates = [s for s in later if (s.pid not in before if restarts else s.pid in before and s.world < size)]
    if not candidates:
        return Outcome(False, float("nan"), 0)
    first = candidates[0]
    committed = max(s.step for s in steps if s.time <= kill.time or (s.time < first.time and s.pid in before))
    going_on = [s.time for s in later if s.pid == first.pid]
    step_s = statistics.median(b - a for a, b in zip(going_on, going_on[1:],
                                                     strict=False)) if len(going_on) > 2 else 0.0
    return Outcome(True, max(0.0, first.time - kill.time - step_s), max(0, committed + 1 - first.step))
