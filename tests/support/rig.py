"""A controller on a fleet that only writes down what it is asked for, and how a test reports_losses to it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from elastic.checkpoint.manifest import Manifest
from elastic.controller import membership as m
from elastic.controller.controller import Controller, Settings
from elastic.controller.policy import Bounds
from elastic.messages import Begin, Generation, Job, Line, Part, Progress, Ready
from elastic.observe.jsonl import read_lines
from elastic.storage.store import Store
from tests.support.checkpoints import write_part
from tests.support.run_logs import CheckedRunLog

SETTINGS = Settings(Bounds(1, 3, 6), hang_timeout_s=30.0, start_timeout_s=600.0, keep=3, best="")


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class Fleet:
    """Keeps every call as (name, arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))

    def transport(self, ready: Any) -> str:
        return "local"

    def of(self, name: str) -> list[Any]:
        return [call[1:] for call in self.calls if call[0] == name]

    def aborted(self) -> list[m.Abort]:
        return [order for _, order in self.of("send") if isinstance(order, m.Abort)]


class Rig:
    """A controller, what it stands on, and how a test reports_losses to it."""

    def __init__(self, run_dir: Path, clock: Clock | None = None, settings: Settings = SETTINGS,
                 chaos: tuple[str, ...] = (), **run_log: int):
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        self.run_dir, self.clock, self.fleet = run_dir, clock or Clock(), Fleet()
        self.run_log = CheckedRunLog(run_dir, **run_log)
        job = Job(f"run-{self.run_log.generation}", "", {}, str(run_dir), str(run_dir / "checkpoints"), (), chaos)
        self.controller = Controller(job, settings, self.fleet, self.run_log, Begin(**run_log))
        self.controller.perform(self.controller.past.actions)
        self.controller.check()

    def start(self, *names: str) -> None:
        for name in names:
            self.controller.advance(m.Starting(name))
        for name in names:
            self.say(Ready(name, f"node-{name}", 1, f"{name}:1"))

    def say(self, *words: Any, worker: str = "") -> int:
        """What a worker delivers is handled at once."""
        answer = self.controller.deliver(worker or words[0].worker, words)
        self.drain()
        return answer

    def drain(self) -> None:
        while not self.controller.mailbox.empty():
            self.controller.handle(self.controller.mailbox.get(0.0))

    def wait(self, seconds: float, *pulses: Progress, every: float = 0.1) -> None:
        """Time goes by, and these workers go on saying where they are."""
        for _ in range(round(seconds / every)):
            self.clock.now += every
            for pulse in pulses:
                self.controller.take(pulse.worker, pulse)
            self.controller.check()

    def steps(self, *steps: int, worker: str = "a", generation: int = 1) -> None:
        for step in steps:
            self.say(metric(step, generation), worker=worker)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for fields in read_lines(self.run_dir / "events.jsonl") if fields["event"] == name]

    def written(self) -> list[int]:
        return [fields["step"] for fields in read_lines(self.run_dir / "metrics.jsonl")]

    def assigned(self) -> Any:
        """The newest generation and who got it."""
        found = [(worker, order) for worker, order in self.fleet.of("send") if isinstance(order, Generation)]
        return found[-1][1], [worker for worker, generation in found
                              if generation.number == self.controller.state.generation]


def metric(step: int, generation: int = 1) -> Line:
    fields = {"step": step, "loss": 1.0, "time": 1.0, "step_s": 0.1, "world_size": 2, "generation": generation,
              "samples": 4}
    return Line(generation, "metrics", fields)


def save(rig: Rig, step: int, generation: int = 1) -> Part:
    entry = write_part(Store.open(str(rig.run_dir / "checkpoints")), step, generation, "state-a",
                       {"parameter/w": np.arange(3.0)})
    return Part("a", generation, step, json.dumps(asdict(entry)), 0.0, 0.0,
                head=Manifest(step, generation, step, 0, "").dumps())
