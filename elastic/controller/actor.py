"""The controller as a named, detached Ray actor."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from elastic.controller import membership as m
from elastic.controller import session
from elastic.controller.controller import Controller, Settings
from elastic.controller.journal import JOURNAL, Journal
from elastic.controller.ray_fleet import RayFleet
from elastic.controller.run_log import RunLog, claimed
from elastic.messages import Begin, Job
from elastic.observe.report import write_report

# for the lock of a controller that fell: on a shared directory it may last as long as the server's lease, 90 s by
# default
CLAIM_S = 100.0
LINGER_S = 60.0  # how long the controller of a finished run waits for a driver
ABSENT_S = 5.0  # without a poll for so long, there is no driver
POLL_S = 0.2  # how long a poll waits for the end of the run before it returns what is new


class ControllerActor:
    """Wraps `Controller`: its loop in a thread, its doors as actor methods."""

    def __init__(self, job: Job, settings: Settings, fleet: dict[str, Any], begin: Begin):
        run_dir = Path(job.run_dir)
        events = claimed(run_dir, CLAIM_S)
        # Ray starts a killed controller anew, with the same arguments
        journal = Journal(run_dir / JOURNAL, job.run_id)
        job = replace(job, secret=journal.secret)
        self.run_log = (RunLog.take_over(run_dir, begin, events) if journal.is_continued
                      else RunLog(run_dir, begin.written, begin.evaluated, begin.generation, events))
        self.fleet = RayFleet(job, lambda event: self.controller.post(event), **fleet)
        self.controller = Controller(job, settings, self.fleet, self.run_log, begin, journal)
        self.controller.opened()
        self.error = ""
        self.done, self.polled = threading.Event(), time.monotonic()
        threading.Thread(target=self.run, name="controller", daemon=True).start()

    def run(self) -> None:
        try:
            session.run(self.controller)
        except BaseException as error:
            self.error = f"The controller failed: {type(error).__name__}: {error}"
            traceback.print_exc()
            session.close(self.controller, m.Finish("failed", self.error))
        finally:
            self.done.set()
        if time.monotonic() - self.polled > ABSENT_S:
            write_report(Path(self.controller.job.run_dir))  # else the driver does
        # for the driver to learn how it ended; one that is gone never will
        while time.monotonic() - self.polled < LINGER_S:
            time.sleep(POLL_S)
        ray.kill(ray.get_runtime_context().current_actor)  # for good: an exit would be followed by a restart

    def receive(self, worker: str, messages: Sequence[Any], number: int) -> int:
        return self.controller.receive(worker, messages, number)

    def announce(self, worker: str, spec: str) -> None:
        self.controller.announce(worker, spec)

    def request(self, event: m.ScaleTo | m.Interrupt) -> None:
        """What a user asks for; in the journal when this returns."""
        self.controller.post(event)
        self.controller.mailbox.wait()

    def end(self, status: str) -> None:
        """Ends a run that has not ended, its state saved, and returns when its workers are gone."""
        self.controller.post(m.GiveUp("The driver gave the run up." if status == "failed" else "", status))
        self.done.wait()

    def poll(self, pid: int, since: int) -> tuple[int, list[dict[str, Any]], int, bool]:
        """This process, the lines after the first `since`, how many there are by now, and whether the run has ended.

        A count that another process gave means nothing here: then all lines come.
        """
        finished = self.done.wait(POLL_S)
        self.polled = time.monotonic()
        return os.getpid(), *self.run_log.since(since if pid == os.getpid() else 0), finished

    def outcome(self) -> tuple[str, str]:
        """Status and error of a run that has ended."""
        found = self.controller.outcome or m.Finish("failed", self.error)
        return found.status, found.error
