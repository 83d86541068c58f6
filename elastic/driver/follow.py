"""A driver's part of a run: it hands every line to the callbacks, once, and clears up after the end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from elastic.controller.events import Interrupt
from elastic.controller.run_log import in_order
from elastic.driver.place import Place
from elastic.errors import RunFailed
from elastic.observe.jsonl import line

Callback = Callable[[dict[str, Any]], None]
AWAY_S, AGAIN_S = 120.0, 0.1  # how long a controller may take to come back, and between tries
# for the workers to end where a callback has failed, and where the user does not want to wait
END_S, QUICK_S = 60.0, 10.0


@dataclass(frozen=True)
class Result:
    """How a run ended. `summary` is summary.json."""

    status: str  # "done" | "failed" | "interrupted"
    summary: dict[str, Any]
    run_dir: Path
    error: str = ""


def result_of(run_dir: Path, error: str = "", place: Place | None = None) -> Result:
    """As summary.json has it; RunFailed where there is none."""
    summary = (place or Place(run_dir)).summary()
    if summary is None:
        raise RunFailed(error or f"The run in {run_dir} is over and left no summary; `elastic resume {run_dir}` goes on.")
    return Result(summary["status"], summary, run_dir, summary.get("error", ""))


class Callbacks:
    """Hands every line to its callback, once, whoever repeats it: a step or evaluation by its number, an event by its
    text."""

    def __init__(self, on_step: Callback | None = None, on_eval: Callback | None = None, on_event: Callback
                 | None = None):
        self.on_step, self.on_eval, self.on_event = on_step, on_eval, on_event
        self.reached = {"step": 0, "eval": 0}
        self.events: set[str] = set()

    def feed(self, lines: Iterable[dict[str, Any]]) -> None:
        for fields in lines:
            callback = self.on_event if "event" in fields else self.on_eval if "eval" in fields else self.on_step
            if self.is_new(fields) and callback is not None:
                callback(fields)

    def is_new(self, fields: dict[str, Any]) -> bool:
        """And from now on it is not. A run that goes back to a checkpoint has its later steps once more."""
        if "event" in fields:
            text = line(fields)
            is_new = text not in self.events
            self.events.add(text)
            if is_new and fields["event"] == "rewound":
                self.reached = {kind: min(step, fields["to"]) for kind, step in self.reached.items()}
            return is_new
        kind = "eval" if "eval" in fields else "step"
        before, self.reached[kind] = self.reached[kind], max(self.reached[kind], fields["step"])
        return self.reached[kind] > before

    def rest(self, events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> None:
        """What came after the last event that was fed, from the files: another driver has seen the run out."""
        after = max((n + 1 for n, fields in enumerate(events) if line(fields) in self.events), default=None)
        if after is not None:
            self.feed(in_order(events[after:], metrics))


def see_out(controller: Any, run_id: str, run_dir: Path, callbacks: Callbacks, place: Place | None = None) -> Result:
    """Follows a run to its end, and clears up after it, unless another driver has: one of them writes the report.

    `place`: the run's directory, if it is not this node's."""
    error, is_first, place = "", False, place or Place(run_dir)
    with interrupting(controller):
        try:
            follow(controller, callbacks)
            error = ask(controller, "outcome")[1]
        except ray.exceptions.RayError as gone:
            if place.summary() is None:
                raise RunFailed(f"Ray or the run's controller is gone ({str(gone).splitlines()[0]}); `elastic resume "
                                f"{run_dir}` goes on.") from gone
            callbacks.rest(*place.lines())
        except BaseException as failure:
            asked = isinstance(failure, KeyboardInterrupt)
            with contextlib.suppress(ray.exceptions.RayError):  # no worker may stay behind
                ray.get(controller.end.remote("interrupted" if asked else "failed"), timeout=QUICK_S if asked
                        else END_S)
            raise
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(controller)
            with contextlib.suppress(RunFailed):  # the head is gone, and that is being said
                is_first = place.clear_live(run_id)
    result = result_of(run_dir, error, place)
    if is_first:
        with contextlib.suppress(OSError):  # a full disk has no room for it
            place.write_report()
    return result


@contextmanager
def interrupting(controller: Any) -> Iterator[None]:
    """The first Ctrl-C asks for a checkpoint at the next step and the end, the second for the end, the third exits at
    once. SIGTERM is the same."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = 0

    def on_signal(number: int, frame: Any) -> None:
        nonlocal asked
        asked += 1
        if asked > 2:
            os._exit(130)
        if asked == 2:
            raise KeyboardInterrupt
        print("\nInterrupted: a final checkpoint is written; press Ctrl-C again to end in the middle of the step.",
              file=sys.stderr)
        # it may be on its way back
        threading.Thread(target=ask, args=(controller, "request", Interrupt()), daemon=True).start()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(controller: Any, callbacks: Callbacks) -> None:
    """Until the run has ended."""
    pid, known, finished = 0, 0, False
    while not finished:
        pid, lines, known, finished = ask(controller, "poll", pid, known)  # a new controller sends all of it again
        callbacks.feed(lines)


def ask(controller: Any, method: str, *arguments: Any) -> Any:
    """A call that waits for a controller on its way back."""
    until = time.monotonic() + AWAY_S
    while True:
        try:
            return ray.get(getattr(controller, method).remote(*arguments))
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() > until:
                raise
            time.sleep(AGAIN_S)
