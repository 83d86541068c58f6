"""What the controller has on disk: events.jsonl and metrics.jsonl, each committed step once, and what follows from them."""

from __future__ import annotations

import math
import pickle
import statistics
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic.errors import UserError
from elastic.messages import Axes, Begin, shape
from elastic.observe.jsonl import JsonLines
from elastic.observe.ledger_files import LedgerFiles
from elastic.observe.metrics import evaluations_of, steps_of
from elastic.observe.run_files import lines_of

RECENT = 50  # steps whose median is an ordinary one
FEED_BYTES = 8 << 20  # of the latest lines, kept for a driver that polls several times a second
NEW = Begin()  # a run that has no past


@dataclass(frozen=True)
class Pause:
    """From the last commit, at `since` (Unix seconds), of a group of `before` on the mesh `was`, until one of
    `generation` commits a step."""

    since: float
    before: int
    was: Axes
    generation: int = 0
    after: int = 0
    mesh: Axes = (0, 1, 1, 1)
    steps_lost: int = 0
    causes: tuple[str, ...] = ()  # of each generation in between


class RunLog:
    """The only writer of the run directory's logs. Every line is flushed at once."""

    def __init__(self, run_dir: Path, written: int = 0, evaluated: int = 0, generation: int = 0, events: JsonLines
                 | None = None):
        self.events = events or claimed(run_dir)
        self.metrics, self.ledger = JsonLines(run_dir / "metrics.jsonl"), LedgerFiles(run_dir, written)
        self.written, self.evaluated = written, evaluated
        self.on_disk = written  # steps whose lines are there: those after them are held while the disk is full
        self.generation = generation
        self.feed: deque[tuple[int, bytes]] = deque()  # the latest lines, numbered, for the driver: packed, a third of the size
        self.fed, self.feed_bytes, self.is_behind = 0, 0, False
        self.seen: set[str] = set()  # the events there were in this run
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.last_commit = 0.0
        self.stepped = 0  # generation of the last step
        self.pause: Pause | None = None

    @classmethod
    def take_over(cls, run_dir: Path, begin: Begin = NEW, events: JsonLines | None = None) -> RunLog:
        """The log of a controller that was killed, from its files alone; `begin`: what they held before its run."""
        lines, metrics = lines_of(run_dir)
        steps, evaluated = steps_of(metrics), max((fields["step"] for fields in evaluations_of(metrics)), default=0)
        run_log = cls(run_dir, max((s["step"] for s in steps), default=begin.written), evaluated,
                      max((e["generation"] for e in lines), default=0), events)
        if steps:
            run_log.last_commit, run_log.stepped = steps[-1]["time"], steps[-1]["generation"]
        run_log.recent.extend(s["step_s"] for s in steps[-RECENT:])
        for fields in in_order(lines[begin.events:], since(begin, metrics)):
            run_log._feed(fields)
        run_log.seen = {fields["event"] for fields in lines[begin.events:]}
        return run_log

    def event(self, name: str, step: int | None = None, generation: int | None = None, **fields: Any) -> None:
        """One event line; generation and step are where the run is, unless given."""
        line = {"time": time.time(), "event": name, "generation": self.generation if generation is None else generation,
                "step": self.written if step is None else step, **fields}
        self._write(self.events, line)
        self.seen.add(name)

    def metric(self, generation: int, fields: dict[str, Any]) -> None:
        """A worker's line. A step that is on disk already is dropped: a new rank 0 repeats what may have been lost."""
        if "eval" in fields:
            if fields["step"] > self.evaluated:
                self.evaluated = fields["step"]
                self._write(self.metrics, fields)
            return
        if fields["step"] <= self.written:
            return
        if fields["step"] > self.written + 1:  # those between come with the next report of whoever has them
            if not self.is_behind:
                self.event("lines_missing", first=self.written + 1, last=fields["step"] - 1)
            self.is_behind = True
            return
        self.is_behind = False
        if "ledger" in fields:
            fields = dict(fields)
            self.ledger.append(fields["generation"], fields["step"], fields.pop("ledger"))
        self.written = fields["step"]
        self._write(self.metrics, fields)
        if self.pause and fields["generation"] >= self.pause.generation:
            self._resume(self.pause, fields["time"])
        self.recent.append(fields["step_s"])
        self.last_commit, self.stepped = fields["time"], fields["generation"]

    def _write(self, file: JsonLines, fields: dict[str, Any]) -> None:
        file.hold(fields)
        if file is self.metrics:
            self._retry_steps()
        else:
            file.retry()
        self._feed(fields)

    def _feed(self, fields: dict[str, Any]) -> None:
        packed = pickle.dumps(fields)
        self.feed.append((self.fed, packed))
        self.fed, self.feed_bytes = self.fed + 1, self.feed_bytes + len(packed)
        while self.feed_bytes > FEED_BYTES and len(self.feed) > 1:
            self.feed_bytes -= len(self.feed.popleft()[1])

    def retry(self) -> bool:
        """Writes what a full disk did not take; whether it takes everything now."""
        return self._retry_steps() and self.events.retry()

    def _retry_steps(self) -> bool:
        """A step's line comes after its rows."""
        if not (self.ledger.retry() and self.metrics.retry()):
            return False
        self.on_disk = self.written
        return True

    @property
    def error(self) -> OSError | None:
        """Why lines are held."""
        return self.ledger.error or self.metrics.error or self.events.error

    def cut_back(self, step: int) -> None:
        """Drops the lines of later steps."""
        self.ledger.cut_back(step)
        self.metrics.cut_back(step)
        self.written, self.on_disk, self.evaluated = step, min(self.on_disk, step), min(self.evaluated, step)

    def sync(self) -> None:
        """Returns when every committed step is on the disk itself."""
        self.ledger.sync()
        self.metrics.sync()
        self.on_disk = self.written

    def close(self) -> None:
        self.ledger.close()
        self.metrics.close()
        self.events.close()

    def since(self, number: int) -> tuple[list[dict[str, Any]], int]:
        """The lines from the `number`-th on, as far back as they are kept, and the number of the next. From any thread.
        """
        if number >= self.fed:
            return [], number
        found = [(n, packed) for n, packed in self.feed.copy() if n >= number]
        return [pickle.loads(packed) for _, packed in found], found[-1][0] + 1 if found else number

    def interrupted(self, generation: int, cause: str, before: int, after: int, steps_lost: int,
                    was: Axes = (0, 1, 1, 1),
                    mesh: Axes = (0, 1, 1, 1)) -> None:
        """A generation was formed after another: its first commit ends the pause that is measured from the last one."""
        pause = self.pause or Pause(self.last_commit, before, was)
        self.pause = replace(pause, generation=generation, after=after, mesh=mesh, steps_lost=pause.steps_lost
                             + steps_lost,
                             causes=(*pause.causes, cause))

    def _resume(self, pause: Pause, time_s: float) -> None:
        """pause_s is the time between the two commits beyond one ordinary step."""
        self.pause = None
        pause_s = max(0.0, time_s - pause.since - (statistics.median(self.recent) if self.recent else 0.0))
        is_other = pause.was[1:] != pause.mesh[1:]
        more: dict[str, Any] = {"mesh": shape(pause.mesh, pause.after).as_dict()} if is_other else {}
        if not {"resize", "drain"}.issuperset(pause.causes):
            self.event("recovered", pause_s=pause_s, steps_lost=pause.steps_lost, **more)
        if pause.before != pause.after or is_other:
            self.event("resized", pause_s=pause_s, **{"from": pause.before, "to": pause.after}, **more)


def claimed(run_dir: Path, wait_s: float = 0.0) -> JsonLines:
    """events.jsonl, with this process as its only writer. Nothing else of the run may be touched before.

    UserError where another one is, still after `wait_s`.
    """
    events = JsonLines(run_dir / "events.jsonl")
    if not events.claim(wait_s):
        raise UserError(f"The run in {run_dir} is alive: another controller writes there.")
    return events


def since(begin: Begin, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that came after `begin`. Those before may have been cut back since, too."""
    start = max((n + 1 for n, fields in enumerate(metrics) if fields.get("generation", math.inf) <= begin.generation),
                default=0)
    while start < len(metrics) and "eval" in metrics[start] and metrics[start]["step"] <= begin.evaluated:
        start += 1
    return metrics[start:]


def in_order(events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of both files by time, each file's in its own order; a generation's steps follow its start, an
    evaluation its step."""
    timed, time_s, started = [], 0.0, dict[int, float]()
    for fields in events:
        time_s = max(time_s, fields["time"])
        timed.append((time_s, fields))
        if fields["event"] == "generation_started":
            started[fields["generation"]] = time_s
    time_s = 0.0
    for fields in metrics:
        time_s = max(time_s, fields.get("time", 0.0), started.get(fields.get("generation", 0), 0.0))
        timed.append((time_s, fields))
    return [fields for _, fields in sorted(timed, key=lambda pair: pair[0])]
