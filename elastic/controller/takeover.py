"""How a new controller takes over a live run: its predecessor was killed at any point, its workers went on."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from elastic.chaos import parse
from elastic.controller import membership as m
from elastic.controller.journal import Past
from elastic.controller.policy import Pulse

if TYPE_CHECKING:
    from elastic.controller.controller import Controller

GONE = "its process was gone when the controller came back"


def recall(controller: Controller, past: Past) -> None:
    """What a controller knows of its predecessor's time before it looks at anything."""
    controller.lost, controller.given_up, controller.released = set(past.lost), set(past.lost), set(past.released)
    for path in past.refused:
        controller.commits.refuse(path)
    with contextlib.suppress(OSError):  # it may answer again before it is needed
        controller.commits.newest = controller.commits.newest_good()[1]
    controller.chaos = [spec for spec in controller.chaos if spec not in past.spent]
    controller.stopped = {parse(spec).number: ready for spec, ready in past.spent.items() if ready}


def take_over(controller: Controller, past: Past) -> None:
    """Carries on what was half done. Every order may be a repetition: whoever has carried it out already does nothing."""
    controller.state, state = past.state, past.state
    controller.live = dict(state.ready)
    controller.books.event("controller_restarted", pid=os.getpid(), phase=state.phase)
    now = time.monotonic()
    controller.pulses = {w: Pulse(0, "start", 0, False, now, now) for w in state.group if w in state.ready}
    controller.started = dict.fromkeys(state.starting, now)
    alive = set(controller.fleet.adopt(past.known))
    for worker in sorted(alive & (past.lost | past.released)):
        controller.fleet.kill(worker)  # first: it holds a place that may be asked for again
    repeat(controller, past)
    if controller.outcome is not None:
        return
    for worker in sorted(alive - past.known):
        controller.advance(m.Starting(worker))
    for worker in sorted((set(controller.state.ready) | controller.state.starting) - alive):
        controller.advance(m.Lost(worker, GONE))
    for worker in sorted(alive - past.lost - past.released):
        controller.fleet.resync(worker)


def repeat(controller: Controller, past: Past) -> None:
    """The actions since the last group was formed, each as far as it may not have been carried out."""
    for action in past.actions:
        if isinstance(action, m.Form):
            again(controller, action, past)
        elif not isinstance(action, m.Wait):
            controller.perform([action])


def again(controller: Controller, action: m.Form, past: Past) -> None:
    """A generation that was made public stays as it was, on disk and with those who have it already."""
    generation = past.published
    if generation is None or generation.number != action.generation.number:
        controller.perform([action])
        return
    books = controller.books
    if books.stepped < generation.number and (action.before or books.last_commit):
        books.interrupted(generation.number, action.cause, action.before, len(generation.members), 0, action.was, generation.mesh)
    if books.generation < generation.number:
        controller.announce_generation(generation)
    tell(controller, generation, (w for w in generation.members if w in controller.state.ready and w not in controller.state.standing))


def tell(controller: Controller, generation: Any, members: Iterable[str]) -> None:
    for worker in members:
        controller.fleet.assign(worker, generation)
