"""What the controller has on disk: events.jsonl and metrics.jsonl, each committed step once, and what follows from them."""

from __future__ import annotations

import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from elastic.errors import UserError
from elastic.observe.events import JsonLines

FEED = 20_000  # lines kept for a driver that polls several times a second


class Books:
    """The only writer of the run directory's logs. Every line is flushed at once."""

    def __init__(self, run_dir: Path, written: int = 0, evaluated: int = 0, generation: int = 0):
        self.events = JsonLines(run_dir / "events.jsonl")
        if not self.events.claim():
            raise UserError(f"The run in {run_dir} is alive: another controller writes there.")
        self.metrics = JsonLines(run_dir / "metrics.jsonl")
        self.written, self.evaluated = written, evaluated
        self.generation = generation
        self.feed: deque[tuple[int, dict[str, Any]]] = deque(maxlen=FEED)  # the latest lines, numbered, for the driver
        self.fed, self.is_behind = 0, False
        self.recent: deque[float] = deque(maxlen=50)
        self.last_commit = 0.0
        self.pause: dict[str, Any] | None = None

    def event(self, name: str, step: int | None = None, generation: int | None = None, **fields: Any) -> None:
        """One event line; generation and step are where the run is, unless given."""
        line = {"time": time.time(), "event": name, "generation": self.generation if generation is None else generation,
                "step": self.written if step is None else step, **fields}
        self._write(self.events, line)

    def metric(self, generation: int, fields: dict[str, Any]) -> None:
        """A worker's line. A step that is on disk already is dropped: a new rank 0 repeats what may have been lost."""
        if "eval" in fields:
            if fields["step"] > self.evaluated:
                self.evaluated = fields["step"]
                self._write(self.metrics, fields)
            return
        if fields["step"] <= self.written:
            return
        if fields["step"] > self.written + 1:  # those between come with the next word of whoever has them
            if not self.is_behind:
                self.event("lines_missing", first=self.written + 1, last=fields["step"] - 1)
            self.is_behind = True
            return
        self.is_behind = False
        self.written = fields["step"]
        self._write(self.metrics, fields)
        if self.pause and fields["generation"] >= self.pause["generation"]:
            self._resume(fields["time"])
        self.recent.append(fields["step_s"])
        self.last_commit = fields["time"]

    def _write(self, file: JsonLines, fields: dict[str, Any]) -> None:
        file.append(fields)
        self.feed.append((self.fed, fields))
        self.fed += 1

    def close(self) -> None:
        self.metrics.close()
        self.events.close()

    def since(self, number: int) -> tuple[list[dict[str, Any]], int]:
        """The lines from the `number`-th on, as far back as they are kept, and the number of the next. From any thread."""
        if number >= self.fed:
            return [], number
        found = [(n, line) for n, line in self.feed.copy() if n >= number]
        return [line for _, line in found], found[-1][0] + 1 if found else number

    def interrupted(self, generation: int, cause: str, before: int, after: int, steps_lost: int) -> None:
        """A generation was formed after another: its first commit ends the pause that is measured from the last one."""
        since = self.pause["since"] if self.pause else self.last_commit
        lost = steps_lost + (self.pause["steps_lost"] if self.pause else 0)
        first = self.pause["before"] if self.pause else before
        causes = (*self.pause["causes"], cause) if self.pause else (cause,)
        self.pause = {"generation": generation, "since": since, "causes": causes, "before": first, "after": after, "steps_lost": lost}

    def _resume(self, time_s: float) -> None:
        """pause_s is the time between the two commits beyond one ordinary step."""
        pause, self.pause = self.pause, None
        assert pause is not None
        step_s = statistics.median(self.recent) if self.recent else 0.0
        pause_s = max(0.0, time_s - pause["since"] - step_s)
        if any(cause not in ("resize", "drain") for cause in pause["causes"]):
            self.event("recovered", pause_s=pause_s, steps_lost=pause["steps_lost"])
        if pause["before"] != pause["after"]:
            self.event("resized", pause_s=pause_s, **{"from": pause["before"], "to": pause["after"]})
