"""The end of a run: the final checkpoint of those who have a state that no other has, then what is written down."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from elastic.checkpoint.manager import folder_of
from elastic.controller import membership as m
from elastic.controller.controller import Controller
from elastic.messages import Line, Part
from elastic.observe.jsonl import read_lines
from elastic.observe.metrics import build_summary
from elastic.storage.atomic import write_atomically
from elastic.storage.remote import shown

LOOK_S = 0.1


def close(controller: Controller, outcome: m.Finish) -> None:
    """Ends the workers, and writes down how the run ended."""
    run_log, checkpoints = controller.run_log, controller.checkpoints
    await_parts(controller, controller.settings.start_timeout_s)
    controller.mailbox.over = True
    controller.mailbox.gone.set()
    controller.fleet.close()
    while not controller.mailbox.empty():  # lines and checkpoints that were under way
        take(controller, controller.mailbox.get(0.0))
    checkpoints.settle()
    saved = checkpoints.newest if outcome.status != "done" else 0
    error = with_checkpoint(outcome.error, saved, run_log.written, controller.job.run_dir) if outcome.error else ""
    if not run_log.retry() and outcome.status == "done":
        outcome = m.Finish("failed", full(controller, run_log.error))
        error = outcome.error
    if not run_log.seen & {"run_failed", "run_finished"}:  # else by a controller that fell right after
        if outcome.status == "failed":
            run_log.event("run_failed", error=error)
        else:
            run_log.event("run_finished", status=outcome.status)
    last = outcome.standing
    summary = build_summary(read_lines(run_log.events.path), read_lines(run_log.metrics.path), outcome.status,
                            last.parameters_sha256 if last else "", last.state_sha256 if last else "", error)
    if saved:
        summary["checkpoint"] = shown(checkpoints.path(folder_of(saved)))
    try:
        write_atomically(Path(controller.job.run_dir) / "summary.json", json.dumps(summary, indent=2) + "\n")
    except OSError as refused:
        controller.outcome = m.Finish("failed", error or full(controller, refused))
    with contextlib.suppress(OSError):
        run_log.close()


def full(controller: Controller, error: OSError | None) -> str:
    """Why a run that has trained to its end is not done."""
    why = error.strerror if error else "it takes no more lines"
    return (f"The run directory {controller.job.run_dir} cannot be written ({why}); make room there, then `elastic resume "
            f"{controller.job.run_dir}`.")


def await_parts(controller: Controller, timeout_s: float) -> None:
    """Returns when all that was ordered of `do_save_alone` is on disk, or will not be."""
    until = time.monotonic() + timeout_s
    if controller.journal.is_continued:  # they may have reported it to a controller that fell
        for worker in set(controller.saving.values()):
            controller.fleet.resync(worker)
    while controller.saving and time.monotonic() < until:
        item = controller.mailbox.get(LOOK_S)
        take(controller, item)
        if isinstance(item, m.Lost) and item.worker in controller.saving.values():
            return  # a part of it will never come
        if isinstance(item, m.GiveUp):
            return


def take(controller: Controller, item: Any) -> None:
    """What still counts when the machine has finished."""
    if isinstance(item, tuple) and isinstance(item[1], (Line, Part)):
        controller.take(*item)


def with_checkpoint(error: str, step: int, written: int, run_dir: str) -> str:
    """The sentence of a run that failed, with what is left of it."""
    if not step:
        return error
    where = f"step {step} is saved" if step >= written else f"the newest checkpoint is that of step {step}, of {written}"
    return f"{error.rstrip('. ')}; {where}: `elastic resume {run_dir}` goes on from there."
