"""How a new controller takes over a live run: its predecessor was killed at any point, its workers went on."""

from __future__ import annotations

import contextlib
import os
import time

from elastic.controller import membership as m
from elastic.controller.controller import Controller

GONE = "its process was gone when the controller came back"


def take_over(controller: Controller) -> None:
    """Carries on what was half done. Every order may be a repetition: whoever has carried it out already does nothing."""
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
    for worker in sorted((set(controller.state.ready) | controller.state.starting) - alive):
        controller.advance(m.Lost(worker, GONE))
    for worker in sorted(alive - gone):
        fleet.resync(worker)


def repeat(controller: Controller) -> None:
    """The actions since the last group was formed, each as far as it may not have been carried out."""
    for action in controller.past.actions:
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
        run_log.interrupted(generation.number, action.cause, action.before, len(generation.members), 0, action.was, generation.mesh)
    if run_log.generation < generation.number:
        controller.announce_generation(generation)
    for worker in generation.members:
        if worker in controller.state.ready and worker not in controller.state.standing:
            controller.fleet.assign(worker, generation)
