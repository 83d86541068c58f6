"""A controller's life: it begins a run or takes a live one over, goes through its events, and ends it.

The end is the final checkpoint of those who have a state that no other has, then what is written down.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from elastic.checkpoint.manager import folder_of
from elastic.controller import membership as m
from elastic.controller.controller import Controller
from elastic.messages import Line, Moved, Part
from elastic.observe.jsonl import read_lines
from elastic.observe.metrics import build_summary
from elastic.storage.atomic import write_atomically
from elastic.storage.remote import shown

GONE = "its process was gone when the controller came back"
LOOK_S = 0.1


def run(controller: Controller) -> m.Finish:
    """Blocks until the run has ended."""
    try:
        with controller.claim.kept(lambda why: controller.post(m.GiveUp(why))):
            if controller.journal.is_continued:
                take_over(controller)
            else:
                controller.perform(list(controller.past.actions))
            outcome = controller.work()
            close(controller, outcome)
    finally:
        controller.mailbox.gone.set()
    return outcome


def take_over(controller: Controller) -> None:
    """Carries on what a predecessor, killed at any point, left half done. An order may be a repetition: who has carried
    it out does nothing."""
    past, state, workers, fleet = controller.past, controller.state, controller.workers, controller.fleet
    for path in past.refused:
        controller.checkpoints.refuse(path)
    with contextlib.suppress(OSError):  # it may answer again before it is needed
        controller.checkpoints.newest = controller.checkpoints.newest_good()[1]
    controller.run_log.event("controller_restarted", pid=os.getpid(), phase=state.phase)
    controller.expect([w for w in state.group if w in state.ready], state.generation, 0)
    for worker in state.starting:
        workers[worker].starting_s = time.monotonic()
    known = set(workers)
    alive = set(fleet.adopt(known))
    gone = {w for w in alive & known if workers[w].lost or workers[w].released}
    for worker in sorted(gone):
        fleet.kill(worker)  # first: it holds a place that may be asked for again
    repeat(controller)
    if controller.outcome is not None:
        return
    for worker in sorted(alive - known):
        controller.advance(m.Starting(worker))
    for worker in sorted((set(controller.state.ready) | set(controller.state.starting)) - alive):
        controller.advance(m.Lost(worker, GONE))
    for worker in sorted(alive - gone):
        fleet.resync(worker)


def repeat(controller: Controller) -> None:
    """The actions since the last group was formed, each as far as it may not have been carried out."""
    for action in list(controller.past.actions):
        if isinstance(action, m.Form):
            form_again(controller, action)
        elif not isinstance(action, m.Wait):
            controller.perform([action])


def form_again(controller: Controller, action: m.Form) -> None:
    """A generation that was made public stays as it was, on disk and with those who have it already."""
    generation, run_log = controller.past.published, controller.run_log
    if generation is None or generation.number != action.generation.number:
        controller.perform([action])
        return
    if run_log.stepped < generation.number and (action.before or run_log.last_commit):
        run_log.interrupted(generation.number, action.cause, action.before, len(generation.members), 0, action.was,
                            generation.mesh)
    if run_log.generation < generation.number:
        controller.announce_generation(generation)
    for worker in generation.members:
        if worker in controller.state.ready and worker not in controller.state.standing:
            controller.fleet.send(worker, generation)


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
    return (f"The run directory {controller.job.run_dir} cannot be written ({why}); make room there, then `elastic "
            f"resume {controller.job.run_dir}`.")


def await_parts(controller: Controller, timeout_s: float) -> None:
    """Returns when all that was ordered of `Controller.save_alone` is on disk, or will not be."""
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
    if isinstance(item, tuple) and isinstance(item[1], (Line, Part, Moved)):
        controller.take(*item)


def with_checkpoint(error: str, step: int, written: int, run_dir: str) -> str:
    """The sentence of a run that failed, with what is left of it."""
    if not step:
        return error
    where = f"step {step} is saved" if step >= written else f"the newest checkpoint is that of step {step}, of {written}"
    return f"{error.rstrip('. ')}; {where}: `elastic resume {run_dir}` goes on from there."
