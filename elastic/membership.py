"""Who is in the group: a pure state machine. `advance(state, event) -> (state, actions)`; no Ray, no clock, no file.

    waiting ----------- enough workers are ready ----------> running
    running -- a loss, a broken collective, an error -------> regrouping   (Abandon: leave the collectives, stand by)
    running -- a resize, a drain, an interrupt -------------> stopping     (RequestStop: leave together after a vote)
    regrouping, stopping -- every survivor stands by -------> running (the next generation), waiting, or finished

The rule of recovery is in `rejoin`: if any survivor saw a vote complete, its step counts for all; whoever holds that step's
gradients applies them, whoever does not is healed. If none did, all redo the step from untouched state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from elastic.messages import STOP, STOP_AND_SAVE, Ballot, Generation, Ready, Standing
from elastic.policy import MAX_FRUITLESS, Bounds, world_size


# Events beside `Ready` and `Standing`.
@dataclass(frozen=True)
class Starting:
    """A worker process is being started: a place for it was found."""

    worker: str
    node: str = ""


@dataclass(frozen=True)
class Lost:
    """A worker's process is gone, or it was given up. `raised`: by an error of its own code, which is then the cause."""

    worker: str
    cause: str
    raised: bool = False


@dataclass(frozen=True)
class ScaleTo:
    workers: int


@dataclass(frozen=True)
class Drain:
    """These nodes will go away: their workers leave at the next step boundary."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Interrupt:
    """Checkpoint at the next step boundary, then end."""


@dataclass(frozen=True)
class GiveUp:
    """A policy says that it is no use."""

    error: str


# Actions.
@dataclass(frozen=True)
class Want:
    """Keep this many worker processes alive or asked for."""

    workers: int


@dataclass(frozen=True)
class Abandon:
    worker: str
    generation: int


@dataclass(frozen=True)
class RequestStop:
    worker: str
    generation: int
    code: int


@dataclass(frozen=True)
class Form:
    """Start this generation; the carrier fills in what only it knows (transport, what is on disk)."""

    generation: Generation
    cause: str
    before: int  # world size of the generation before


@dataclass(frozen=True)
class Release:
    worker: str


@dataclass(frozen=True)
class Wait:
    """Too few workers: the survivors stay warm."""

    ready: int
    needed: int


@dataclass(frozen=True)
class SaveAlone:
    """This worker is to write down all that it has, if no checkpoint has it: the run cannot go on without others."""

    worker: str
    generation: int
    step: int


@dataclass(frozen=True)
class Finish:
    status: str  # "done" | "failed" | "interrupted"
    error: str = ""
    standing: Standing | None = None


@dataclass(frozen=True)
class State:
    """All that the machine knows."""

    bounds: Bounds
    phase: str = "waiting"
    generation: int = 0
    target: int = 0
    group: tuple[str, ...] = ()
    ready: Mapping[str, Ready] = field(default_factory=dict)
    starting: frozenset[str] = frozenset()
    standing: Mapping[str, Standing] = field(default_factory=dict)
    leaving: frozenset[str] = frozenset()
    last: Mapping[str, Standing] = field(default_factory=dict)  # the word of those who stood when a group could not form
    ending: bool = False
    failure: tuple[int, int, str] = (0, -1, "")  # generation, step and error of the last failed step
    cause: str = "start"
    told: int = -1  # how many were ready when a wait was last spoken of
    saver: str = ""  # who was asked to save alone during this wait
    drained: frozenset[str] = frozenset()  # nodes that will go away
    reached: int = -1  # where the last generation started
    barren: int = 0  # generations in a row that started there


def begin(bounds: Bounds, generation: int = 0) -> tuple[State, tuple[Any, ...]]:
    """A run's first state; `generation` is the last one of the run that is resumed."""
    target = bounds.max_workers
    return State(bounds, target=target, generation=generation), (Want(wanted(bounds, target)),)


def wanted(bounds: Bounds, target: int, leaving: int = 0) -> int:
    """Worker processes to have: a group, its spares, and a replacement for everyone who is about to leave."""
    return max(1, world_size(target, target, bounds)) + bounds.spares + leaving


def advance(state: State, event: Any) -> tuple[State, tuple[Any, ...]]:
    """One event in, the new state and what is to be done out."""
    if state.phase == "finished":
        return state, ()
    state, actions = HANDLERS[type(event)](state, event)
    more: tuple[Any, ...] = actions or (None,)
    while more:  # a group that was just formed may be due for another resize
        state, more = settle(state)
        actions += more
    return state, actions


def on_starting(state: State, event: Starting) -> tuple[State, tuple[Any, ...]]:
    return replace(state, starting=state.starting | {event.worker}), ()


def on_ready(state: State, event: Ready) -> tuple[State, tuple[Any, ...]]:
    leaving = state.leaving | ({event.worker} if event.node in state.drained else set())
    return replace(state, starting=state.starting - {event.worker}, ready={**state.ready, event.worker: event}, leaving=leaving), ()


def on_lost(state: State, event: Lost) -> tuple[State, tuple[Any, ...]]:
    ready = {w: r for w, r in state.ready.items() if w != event.worker}
    last = {w: s for w, s in state.last.items() if w != event.worker}
    standing = {w: s for w, s in state.standing.items() if w != event.worker}
    state = replace(state, starting=state.starting - {event.worker}, ready=ready, last=last, standing=standing,
                    leaving=state.leaving - {event.worker})
    if event.worker in state.group and state.phase in ("running", "stopping"):
        return regroup(state, event.cause)
    return state, ()


def on_standing(state: State, event: Standing) -> tuple[State, tuple[Any, ...]]:
    if event.generation != state.generation or event.worker not in state.group or event.worker not in state.ready:
        return state, ()  # an older generation's word changes nothing
    state = replace(state, standing={**state.standing, event.worker: event})
    if event.reason == "failed" and not event.rejected:
        failure = (event.generation, failed_step(event), event.error)
        is_redone = state.failure[0] < event.generation
        if event.fatal or (is_redone and failure[1:] == state.failure[1:]):
            return finish(state, Finish("failed", event.error))
        state = replace(state, failure=failure)
    if event.reason in ("broken", "failed") and state.phase in ("running", "stopping"):
        return regroup(state, event.reason)
    return state, ()


def failed_step(word: Standing) -> int:
    """The step that a worker failed in, also where it failed half-way through its update."""
    if word.committed >= 0 or word.ballot is None:
        return word.committed + 1
    return word.ballot.step


def on_scale(state: State, event: ScaleTo) -> tuple[State, tuple[Any, ...]]:
    target = max(state.bounds.min_workers, min(event.workers, state.bounds.max_workers))
    return replace(state, target=target), (Want(wanted(state.bounds, target, len(state.leaving))),)


def on_drain(state: State, event: Drain) -> tuple[State, tuple[Any, ...]]:
    leaving = state.leaving | {w for w, ready in state.ready.items() if ready.node in event.nodes}
    state = replace(state, leaving=leaving, drained=state.drained | set(event.nodes))
    return state, (Want(wanted(state.bounds, state.target, len(leaving))),)


def on_interrupt(state: State, event: Interrupt) -> tuple[State, tuple[Any, ...]]:
    if state.ending:
        return state, ()
    state = replace(state, ending=True)
    if state.phase == "waiting":  # survivors with steps that no checkpoint has form once more, to save them
        return (state, ()) if any(s.committed >= 0 for s in state.last.values()) else finish(state, Finish("interrupted"))
    return state, tuple(RequestStop(w, state.generation, STOP_AND_SAVE) for w in state.group)


def on_give_up(state: State, event: GiveUp) -> tuple[State, tuple[Any, ...]]:
    return finish(state, Finish("failed", event.error))


HANDLERS: dict[type, Callable[[State, Any], tuple[State, tuple[Any, ...]]]] = {
    Starting: on_starting, Ready: on_ready, Lost: on_lost, Standing: on_standing, ScaleTo: on_scale, Drain: on_drain,
    Interrupt: on_interrupt, GiveUp: on_give_up}


def finish(state: State, action: Finish) -> tuple[State, tuple[Any, ...]]:
    return replace(state, phase="finished"), (action,)


def regroup(state: State, cause: str) -> tuple[State, tuple[Any, ...]]:
    still = [w for w in state.group if w in state.ready and w not in state.standing]
    return replace(state, phase="regrouping", cause=cause), tuple(Abandon(w, state.generation) for w in still)


def settle(state: State) -> tuple[State, tuple[Any, ...]]:
    """What follows from the state itself, whatever event led to it."""
    if state.phase == "finished":
        return state, ()
    survivors = [w for w in state.group if w in state.ready]
    if state.phase == "waiting":
        is_time = state.ending or not state.starting or len(usable(state)) >= state.target
        return form(state) if is_time else (state, ())
    if all(w in state.standing for w in survivors):
        return depart(state, survivors)
    if state.phase == "running" and not state.ending and wants_resize(state):
        cause = "drain" if state.leaving & set(state.group) else "resize"
        code = STOP_AND_SAVE if state.leaving.issuperset(survivors) else STOP  # those who stay get the state from the checkpoint
        return replace(state, phase="stopping", cause=cause), tuple(RequestStop(w, state.generation, code) for w in survivors)
    return state, ()


def depart(state: State, survivors: list[str]) -> tuple[State, tuple[Any, ...]]:
    """Every survivor stands by: end the run, or go on in another group."""
    words = [state.standing[w] for w in survivors]
    if is_saved(state, "done"):
        return finish(state, done(words))
    if state.ending and is_saved(state, "stopped"):
        return finish(state, Finish("interrupted", standing=words[0]))
    return form(state)


def is_saved(state: State, reason: str) -> bool:
    """Every member stands by for this reason, after each has saved its part. Without one nobody knows whether it came to that."""
    words = [state.standing.get(w) for w in state.group]
    if not words or any(s is None or s.reason != reason for s in words):
        return False
    return reason == "done" or all(s and s.ballot and s.ballot.stop == STOP_AND_SAVE for s in words)


def done(words: list[Standing]) -> Finish:
    """All replicas must hold the same bits; anything else is a fault that no result should hide."""
    if len({s.state_sha256 for s in words}) > 1:
        return Finish("failed", "The workers' states differ at the end: " + ", ".join(f"{s.worker} {s.state_sha256[:12]}" for s in words))
    return Finish("done", standing=words[0])


def usable(state: State) -> list[str]:
    """Workers that may be in the next group: survivors, the furthest first, then joiners in the order they became ready.

    Who is to leave stays as long as nobody else has the state and it is not saved.
    """
    words = {**state.last, **state.standing}
    survivors = sorted((w for w in state.group if w in state.ready), key=lambda w: -words[w].committed if w in words else 0)
    everybody = survivors + [w for w in state.ready if w not in state.group]
    staying = [w for w in everybody if w not in state.leaving]
    furthest = max((words[w].committed for w in survivors if w in words), default=-1)
    whole = [w for w in survivors if w not in words or words[w].committed == furthest >= 0]
    is_free = not whole or any(w in whole for w in staying) or state.phase == "running" or is_saved(state, "stopped")
    return staying if staying and is_free else everybody


def wants_resize(state: State) -> bool:
    candidates = usable(state)
    size = world_size(len(candidates), state.target, state.bounds)
    if state.leaving & set(state.group) and not state.leaving.issuperset(candidates):
        return size > 0
    is_all = size == world_size(state.target, state.target, state.bounds)  # nobody who is still starting is needed
    return 0 < size < len(state.group) or (size > len(state.group) and (is_all or not state.starting))


def form(state: State) -> tuple[State, tuple[Any, ...]]:
    """The next generation from whoever is usable, or a wait for more."""
    words = {**state.last, **state.standing}
    candidates = usable(state)
    bounds = replace(state.bounds, min_workers=1) if state.ending else state.bounds
    size = world_size(len(candidates), state.target, bounds)
    leavers = [w for w in state.ready if w in state.leaving and w not in candidates]
    leaving = state.leaving & set(candidates)
    want = [Want(wanted(state.bounds, state.target, len(leaving)))] if leavers else []  # first: nobody is to replace a leaver twice
    gone = (*want, *(Release(w) for w in leavers))
    ready = {w: r for w, r in state.ready.items() if w not in leavers}
    state = replace(state, ready=ready, leaving=leaving, standing={}, last={w: s for w, s in words.items() if w in ready})
    if not size and state.ending:
        return finish(state, Finish("interrupted"))
    if not size:
        told = len(candidates)
        waiting: tuple[Any, ...] = () if told == state.told else (Wait(told, state.bounds.min_workers),)
        furthest = max(state.last.values(), key=lambda s: s.committed, default=None)
        if furthest and furthest.committed > 0 and furthest.worker != state.saver:
            waiting += (SaveAlone(furthest.worker, state.generation, furthest.committed),)
            state = replace(state, saver=furthest.worker)
        return replace(state, phase="waiting", told=told), gone + waiting
    members, extra = tuple(candidates[:size]), candidates[size:]
    surplus = extra[state.bounds.spares:]
    generation = rejoin(state, members)
    is_barren = generation.committed == state.reached and not any(s.rejected for s in words.values())
    barren = state.barren + 1 if is_barren else 0
    if barren > MAX_FRUITLESS + len(members):
        why = next((s.error for s in words.values() if s.error), state.cause)
        return finish(state, Finish("failed", f"Generation after generation ends without a step, the last with: {why}"))
    action = Form(generation, state.cause, len(state.group))
    state = replace(state, phase="running", generation=generation.number, group=members, last={}, told=-1, saver="", cause="resize",
                    reached=generation.committed, barren=barren,
                    ready={w: r for w, r in ready.items() if w not in surplus})
    stops = tuple(RequestStop(w, generation.number, STOP_AND_SAVE) for w in members) if state.ending else ()
    return state, (*gone, *(Release(w) for w in surplus), action, *stops)


def rejoin(state: State, members: tuple[str, ...]) -> Generation:
    """Where everybody starts: the furthest committed step, its vote for those who hold its gradients, a heal for the rest."""
    words = {w: state.last[w] for w in members if w in state.last}
    number = state.generation + 1
    endpoint = state.ready[members[0]].endpoint
    committed = max((s.committed for s in words.values()), default=-1)
    if committed < 0:
        return Generation(number, members, endpoint, "", committed=-1)
    ballot: Ballot | None = next((s.ballot for s in words.values() if s.ballot and s.ballot.step == committed), None)
    source = next(r for r, w in enumerate(members) if w in words and words[w].committed == committed)

    def behind(worker: str) -> bool:
        word = words.get(worker)
        if word is None or word.committed < 0:
            return True
        return word.committed < committed and not (ballot and word.committed == committed - 1 and word.holds == committed)

    healed = tuple(r for r, w in enumerate(members) if behind(w))
    return Generation(number, members, endpoint, "", committed, ballot, source if healed else -1, healed)
