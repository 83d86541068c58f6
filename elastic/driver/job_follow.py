"""A submission followed to its end: by the run's files where they are to be seen here, else by what its driver writes into the job's log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic.controller.run_log import in_order
from elastic.driver.follow import Callbacks, Result, result_of
from elastic.driver.job_client import Jobs, NoAnswer
from elastic.driver.rundir import live_of
from elastic.driver.submit import ENDED, Submission, spoken, why_of
from elastic.errors import BAD_USAGE, DONE, FAILED, INTERRUPTED
from elastic.observe.progress import Progress
from elastic.observe.run_files import summary_of

POLL_S, MAX_POLL_S = 0.5, 10.0
SHARE = 20  # the log comes whole each time: that may take one part in so many of the time
SAVE_S = 60.0  # for a controller to save and end a run whose job was stopped


class Tail:
    """The whole lines that a file of JSON lines has gained. One that was cut back is read again."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0

    def new(self) -> list[dict[str, Any]]:
        try:
            with open(self.path, "rb") as file:
                if file.seek(0, 2) < self.offset:
                    self.offset = 0
                file.seek(self.offset)
                whole = file.read().rpartition(b"\n")[0]
        except OSError:  # not there yet, or not to be seen from here
            return []
        self.offset += len(whole) + 1 if whole else 0
        return [json.loads(text) for text in whole.split(b"\n") if text]


class Follower:
    """`result` is there at the end where the run's files are to be seen; else its driver has said how it ended."""

    def __init__(self, jobs: Jobs, submission: Submission, say: Callable[[str], None]):
        self.jobs, self.submission, self.say = jobs, submission, say
        self.run_dir = Path(submission.run_dir).expanduser()
        self.shown = 0  # lines of the log
        self.log, self.cost_s = "", 0.0
        self.events, self.metrics = Tail(self.run_dir / "events.jsonl"), Tail(self.run_dir / "metrics.jsonl")
        self.sees_files = self.is_away = False
        self.callbacks = Callbacks()
        self.result: Result | None = None

    def see_out(self, progress: Progress) -> int:
        """The run's exit code. Only the job's own status ends this: a server that does not answer is asked again."""
        self.callbacks.on_step, self.callbacks.on_eval, self.callbacks.on_event = (progress.on_step, progress.on_eval,
                                                                                  progress.on_event)
        while True:
            try:
                details = self.jobs.details(self.submission.id)
                self.look(progress, details.status in ENDED)
                self.is_away = False
                if details.status in ENDED:
                    return self.end(details)
            except NoAnswer as error:
                if not self.is_away:
                    self.say(f"{error} The run goes on without this command, which tries again.")
                self.is_away = True
            time.sleep(POLL_S if self.sees_files else min(MAX_POLL_S, max(POLL_S, SHARE * self.cost_s)))

    def look(self, progress: Progress, is_over: bool) -> None:
        """Shows what is new. What a log says was in the files before, so that nothing is shown twice."""
        if not self.sees_files:
            began = time.monotonic()
            self.log = self.jobs.log_of(self.submission.id)
            self.cost_s = time.monotonic() - began
            live = live_of(self.run_dir)
            self.sees_files = not is_over and live is not None and live["run_id"].startswith(self.submission.id)
        if self.sees_files:
            self.callbacks.feed(in_order(self.events.new(), self.metrics.new()))
            return
        lines = list(spoken(self.log if is_over else self.log.rpartition("\n")[0]))
        for line in lines[self.shown:]:
            progress.on_text(line)
        self.shown = len(lines)

    def end(self, details: Any) -> int:
        """How the run has ended, by its files or by its driver's exit code."""
        if self.sees_files:
            until = time.monotonic() + SAVE_S
            while summary_of(self.run_dir) is None and time.monotonic() < until:
                time.sleep(POLL_S)
            self.callbacks.feed(in_order(self.events.new(), self.metrics.new()))
            if summary_of(self.run_dir) is not None:
                self.result = result_of(self.run_dir)
                return DONE
        if why := why_of(details, self.log):
            self.say(why)
        if details.status == "STOPPED":
            return INTERRUPTED
        code = details.driver_exit_code
        return code if code in (DONE, BAD_USAGE, FAILED, INTERRUPTED) else FAILED
