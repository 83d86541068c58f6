"""Who is in the group: a pure state machine. `advance(state, event) -> (state, actions)`; no Ray, no clock, no file.

    waiting ----------- enough workers are ready ----------> running
    running -- a loss, a broken collective, an error -------> regrouping   (Abort: leave the collectives, stand by)
    running -- a resize, a drain, an interrupt -------------> stopping     (RequestStop: leave together after a vote)
    regrouping, stopping -- every survivor stands by -------> running (the next generation), waiting, or finished

A run that fails is finished when every survivor stands by too: the last state that counts is saved by then (SaveAlone).

It counts in replicas: a group lies on one of the meshes that the bounds allow, the first whose replica is complete.
What counts of the state, who sits where and who heals whom is `recovery`'s to decide.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from elastic.boxes import Range
from elastic.controller.bucket_holders import with_buckets
from elastic.controller.events import (
    Drain,
    Finish,
    Form,
    GiveUp,
    Hurry,
    Interrupt,
    Lost,
    Release,
    SaveAlone,
    ScaleTo,
    Starting,
    Wait,
    Want,
    done,
)
from elastic.controller.persistent_map import PersistentMap
from elastic.controller.policy import MAX_FRUITLESS, MAX_UNSAVED, ONE_BY_ONE, Bounds, choose, fewest, wanted, world_size
from elastic.controller.recovery import Whole, covers, find_whole, rejoin, writers
from elastic.controller.seating import assign
from elastic.messages import STOP, STOP_AND_SAVE, Abort, Axes, Moved, Ready, RequestStop, Standing
from elastic.state.ownership import held, lacking


@dataclass(frozen=True)
class State:
    """All that the machine knows. No event costs more with many workers, but those that form a group or end it."""

    bounds: Bounds
    phase: str = "waiting"
    generation: int = 0
    target: int = 0
    group: tuple[str, ...] = ()
    mesh: Axes = (0, 1, 1, 1)  # of the group
    survivors: PersistentMap[None] = field(default_factory=PersistentMap)  # those of the group that are ready
    ready: PersistentMap[Ready] = field(default_factory=PersistentMap)
    starting: PersistentMap[None] = field(default_factory=PersistentMap)
    standing: PersistentMap[Standing] = field(default_factory=PersistentMap)  # survivors that have left the group's loop
    leaving: frozenset[str] = frozenset()  # of those that are ready
    # the report of those who stood and are in no group since
    last: PersistentMap[Standing] = field(default_factory=PersistentMap)
    ending: bool = False
    over: Finish | None = None  # how the run will have ended once its state is saved
    failure: tuple[int, int, str] = (0, -1, "")  # generation, step and error of the last failed step
    cause: str = "start"
    announced: int = -1  # how many were ready when a wait was last announced
    savers: tuple[str, ...] = ()  # who was asked to save alone during this wait
    drained: frozenset[str] = frozenset()  # nodes that will go away
    reached: int = -1  # where the last generation started
    barren: int = 0  # generations in a row that started there
    handing: tuple[str, ...] = ()  # those members to whom the others are handing over their buckets
    is_late: bool = False  # there is no time to do that beside the training
    unsaved: int = 0  # generations that were to save and end the run, and did not


def begin(bounds: Bounds, generation: int = 0) -> tuple[State, tuple[Any, ...]]:
    """A run's first state; `generation` is the last one of the run that is resumed."""
    target = bounds.max_workers
    return State(bounds, target=target, generation=generation), (Want(wanted(bounds, target)),)


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
    return replace(state, starting=state.starting.having(event.worker, None)), ()


def on_ready(state: State, event: Ready) -> tuple[State, tuple[Any, ...]]:
    state = replace(state, starting=state.starting.without(event.worker), ready=state.ready.having(event.worker, event))
    if event.node not in state.drained:
        return state, ()
    state = replace(state, leaving=state.leaving | {event.worker})
    return state, (Want(wanted(state.bounds, state.target, len(state.leaving))),)


def on_lost(state: State, event: Lost) -> tuple[State, tuple[Any, ...]]:
    is_in, leaving = event.worker in state.survivors, state.leaving - {event.worker}
    maps = {name: getattr(state, name).without(event.worker) for name in ("survivors", "starting", "ready", "last", "standing")}
    state = replace(state, leaving=leaving, **maps)
    if is_in and state.phase in ("running", "stopping"):
        return regroup(state, event.cause)
    return state, ()


def on_standing(state: State, event: Standing) -> tuple[State, tuple[Any, ...]]:
    if event.generation != state.generation or event.worker not in state.survivors:
        return state, ()  # an older generation's report changes nothing
    state = replace(state, standing=state.standing.having(event.worker, event))
    if event.reason == "failed" and not event.rejected:
        failure = (event.generation, failed_step(event), event.error)
        is_redone = state.failure[0] < event.generation
        if event.fatal or (is_redone and failure[1:] == state.failure[1:]):
            return fail(state, Finish("failed", event.error))
        state = replace(state, failure=failure)
    if event.reason in ("broken", "failed") and state.phase in ("running", "stopping"):
        return regroup(state, event.reason)
    return state, ()


def failed_step(report: Standing) -> int:
    """The step that a worker failed in, also where it failed half-way through its update."""
    if report.committed >= 0 or report.ballot is None:
        return report.committed + 1
    return report.ballot.step


def on_scale(state: State, event: ScaleTo) -> tuple[State, tuple[Any, ...]]:
    bounds = state.bounds
    if event.degrees:
        bounds = replace(bounds, meshes=(event.degrees, *(mesh for mesh in bounds.meshes if mesh != event.degrees)))
    target = max(fewest(bounds), min(event.workers, bounds.max_workers))
    return replace(state, bounds=bounds, target=target), (Want(wanted(bounds, target, len(state.leaving))),)


def on_drain(state: State, event: Drain) -> tuple[State, tuple[Any, ...]]:
    leaving = state.leaving | {w for w, ready in state.ready.items() if ready.node in event.nodes}
    state = replace(state, leaving=leaving, drained=state.drained | set(event.nodes))
    return state, (Want(wanted(state.bounds, state.target, len(leaving))),)


def on_moved(state: State, event: Moved) -> tuple[State, tuple[Any, ...]]:
    return (replace(state, handing=()) if event.generation == state.generation else state), ()


def on_hurry(state: State, event: Hurry) -> tuple[State, tuple[Any, ...]]:
    return replace(state, is_late=bool(state.handing)), ()


def on_interrupt(state: State, event: Interrupt) -> tuple[State, tuple[Any, ...]]:
    if state.ending or state.over:
        return state, ()
    state = replace(state, ending=True)
    if state.phase == "waiting":  # survivors with steps that no checkpoint has form once more, to save them
        return (state, ()) if find_whole(state.last, state.group) else finish(state, Finish("interrupted"))
    return state, tuple(RequestStop(w, state.generation, STOP_AND_SAVE) for w in state.group)


def on_give_up(state: State, event: GiveUp) -> tuple[State, tuple[Any, ...]]:
    return fail(state, Finish(event.status, event.error))


HANDLERS: dict[type, Callable[[State, Any], tuple[State, tuple[Any, ...]]]] = {
    Starting: on_starting, Ready: on_ready, Lost: on_lost, Standing: on_standing, ScaleTo: on_scale, Drain: on_drain,
    Interrupt: on_interrupt, GiveUp: on_give_up, Moved: on_moved, Hurry: on_hurry}


def finish(state: State, action: Finish) -> tuple[State, tuple[Any, ...]]:
    return replace(state, phase="finished"), (action,)


def fail(state: State, action: Finish) -> tuple[State, tuple[Any, ...]]:
    """The run ends so, once all have left their collectives and the state is saved. The first reason is the one."""
    state = replace(state, over=state.over or action)
    return regroup(state, "failed") if state.phase in ("running", "stopping") else (state, ())


def regroup(state: State, cause: str) -> tuple[State, tuple[Any, ...]]:
    still = [w for w in state.survivors if w not in state.standing]
    return replace(state, phase="regrouping", cause=cause), tuple(Abort(w, state.generation) for w in still)


def settle(state: State) -> tuple[State, tuple[Any, ...]]:
    """What follows from the state itself, whatever event led to it."""
    if state.phase == "finished":
        return state, ()
    is_apart = len(state.standing) == len(state.survivors)
    if state.over and (state.phase == "waiting" or is_apart):
        reports = {w: s for w, s in {**state.last, **state.standing}.items() if w in state.ready}
        return end_saved(replace(state, last=PersistentMap(reports)), state.over)
    if state.phase == "waiting":
        is_early = state.starting and (len(state.ready) < state.target or len(usable(state)) < state.target)
        return (state, ()) if is_early and not state.ending else form(state)
    if is_apart:
        return depart(state)
    if state.phase == "running" and not state.ending and (mesh := resized(state)) and not waits(state):
        cause = "drain" if any(w in state.survivors for w in state.leaving) else "resize"
        code = STOP if hands_over(state, mesh) else STOP_AND_SAVE
        stops = tuple(RequestStop(w, state.generation, code) for w in state.survivors)
        return replace(state, phase="stopping", cause=cause), stops
    return state, ()


def waits(state: State) -> bool:
    """Whether the group goes on as it is until all of its buckets are with those members that the next one will have."""
    return bool(state.handing) and not state.is_late and state.handing == remaining(state, state.group)


def hands_over(state: State, mesh: Axes) -> bool:
    """Whether those who stay have the whole state, and a place each for its parts; else the next group gets it from a
    checkpoint."""
    data, size, holders = state.mesh[0], math.prod(state.mesh[1:]), state.bounds.holders
    staying = [rank for rank, w in enumerate(state.group) if w in state.survivors and w not in state.leaving]
    if not covers([rank % size for rank in staying], state.mesh[1:]) or math.prod(mesh) < size:
        return False
    if not holders:
        return True
    if mesh[1:] != state.mesh[1:] or data - mesh[0] > ONE_BY_ONE * (holders - 1):
        return False
    by_place: list[list[tuple[Range, Range]]] = [[] for _ in range(size)]
    for place in staying:
        by_place[place % size].append(held(place // size, data, data, holders > 1))
    return not any(lacking(have, data) for have in by_place)


def depart(state: State) -> tuple[State, tuple[Any, ...]]:
    """Every survivor stands by: end the run, or go on in another group."""
    reports = [state.standing[w] for w in state.survivors]
    if is_saved(state, "done"):
        return finish(state, done(reports))
    if state.ending and is_saved(state, "stopped"):
        return finish(state, Finish("interrupted", standing=reports[0]))
    if state.ending and len(state.survivors) == len(state.group):  # no loss is to blame
        state = replace(state, unsaved=state.unsaved + 1)
    if state.unsaved <= MAX_UNSAVED:
        return form(state)
    why = next((s.error for s in reports if s.error), state.cause)
    return end_saved(replace(state, last=PersistentMap({**state.last, **state.standing})),
                     Finish("failed", f"The run was interrupted, and its last checkpoint is not there: {why}"))


def is_saved(state: State, reason: str) -> bool:
    """Every member stands by for this reason, after each has saved its part. Without one nobody knows whether it came
    to that."""
    reports = [state.standing.get(w) for w in state.group]
    if not reports or any(s is None or s.reason != reason for s in reports):
        return False
    return reason == "done" or all(s and s.ballot and s.ballot.stop == STOP_AND_SAVE for s in reports)


def usable(state: State) -> list[str]:
    """Workers that may be in the next group: survivors, the furthest first, then joiners in the order they became
    ready.

    Who is to leave stays as long as nobody else has the state and it is not saved.
    """
    reports = {**state.last, **state.standing}
    survivors = sorted(state.survivors, key=lambda w: -reports[w].committed if w in reports else 0)
    everybody = survivors + [w for w in state.ready if w not in state.survivors]
    staying = [w for w in everybody if w not in state.leaving]
    if not staying or state.phase == "running" or is_saved(state, "stopped"):
        return staying or everybody
    whole = find_whole(reports, survivors)
    still = whole and find_whole({w: reports[w] for w in staying if w in reports}, survivors)
    return everybody if whole and not (still and still.step == whole.step) else staying


def resized(state: State) -> Axes | None:
    """The mesh for which a running group is to stop; None if it is right as it is."""
    staying = len(state.ready) - len(state.leaving)
    mesh = choose(staying or len(state.ready), state.target, state.bounds)
    if staying and any(w in state.survivors for w in state.leaving):
        return mesh
    if mesh is None or mesh == state.mesh or (
            mesh[1:] == state.mesh[1:] and mesh[0] < state.mesh[0] and math.prod(state.mesh) <= state.target):
        return None  # who trains along does no harm where fewer would do
    size = math.prod(mesh)
    is_all = size == world_size(state.target, state.target, state.bounds)  # nobody who is still starting is needed
    return mesh if size <= len(state.group) or is_all or not state.starting else None


def form(state: State) -> tuple[State, tuple[Any, ...]]:
    """The next generation from whoever is usable, or a wait for more."""
    reports = {**state.last, **state.standing}
    candidates = usable(state)
    here = {w: reports[w] for w in candidates if w in reports}
    mesh, whole = next_mesh(state, candidates, here)
    leaving = state.leaving.intersection(candidates)
    leavers = [w for w in state.ready if w in state.leaving and w not in leaving]
    want = Want(wanted(state.bounds, state.target, len(leaving)))
    gone = (*([want] if leavers else []), *(Release(w) for w in leavers))  # first: nobody is to replace a leaver twice
    ready = {w: r for w, r in state.ready.items() if w not in state.leaving or w in leaving}
    state = replace(state, ready=PersistentMap(ready), leaving=leaving, standing=PersistentMap(),
                    survivors=PersistentMap(dict.fromkeys(w for w in state.survivors if w in ready)),
                    last=PersistentMap({w: s for w, s in reports.items() if w in ready}))
    if mesh is None and state.ending:
        return finish(state, Finish("interrupted"))
    if mesh is None:
        waiting = () if len(candidates) == state.announced else (Wait(len(candidates), fewest(state.bounds)),)
        state, saves = save_alone(replace(state, phase="waiting", announced=len(candidates)))
        return state, (*gone, *waiting, *saves)
    members = assign(candidates, mesh, whole, {w: r.node for w, r in ready.items()})
    there = dict.fromkeys(members)
    surplus = dict.fromkeys([w for w in candidates if w not in there][max(0, want.workers - len(members)):])
    staying = remaining(state, members)
    generation = with_buckets(rejoin(state.generation + 1, members, ready[members[0]].endpoint, mesh, whole),
                              ready[members[0]], {w: whole.reports[w] for w in whole.coordinates} if whole else {},
                              staying, state.is_late)
    handing = staying if len(staying) < len(members) and generation.buckets and generation.buckets.moves else ()
    is_barren = generation.committed == state.reached and not any(s.rejected for s in reports.values())
    barren = state.barren + 1 if is_barren else 0
    if barren > MAX_FRUITLESS + len(members):
        why = next((s.error for s in reports.values() if s.error), state.cause)
        return end_saved(state, Finish("failed", f"Generation after generation ends without a step, the last with: {why}"))
    action = Form(generation, state.cause, len(state.group), state.mesh)
    idle = {w: replace(s, holds=-1, ballot=None) for w, s in here.items()
            if w not in there and w not in surplus and s.committed <= generation.committed}
    state = replace(state, phase="running", generation=generation.number, group=members, mesh=mesh,
                    survivors=PersistentMap(there), last=PersistentMap(idle), announced=-1, savers=(), cause="resize",
                    reached=generation.committed, barren=barren, handing=handing, is_late=state.is_late and bool(handing),
                    ready=PersistentMap({w: r for w, r in ready.items() if w not in surplus}))
    stops = tuple(RequestStop(w, generation.number, STOP_AND_SAVE) for w in members) if state.ending else ()
    return state, (*gone, *(Release(w) for w in surplus), action, *stops)


def remaining(state: State, members: tuple[str, ...]) -> tuple[str, ...]:
    """Those members that the next group will have too, as far as it is known: the others are only there to hand over."""
    stay = [w for w in members if w not in state.leaving]
    mesh = None if len(stay) == len(members) <= state.target else choose(len(stay), state.target, state.bounds)  # see `resized`
    return tuple(stay[:math.prod(mesh)]) if mesh else members


def next_mesh(state: State, candidates: list[str], reports: Mapping[str, Standing]) -> tuple[Axes | None, Whole | None]:
    """What the next group lies on, and the state that it starts from.

    A mesh that has no place for all parts of a state that is nowhere else has to wait until a group that has one has
    saved it; one with too few holders of a sharded optimizer shrinks step by step.
    """
    bounds = replace(state.bounds, min_workers=1) if state.ending else state.bounds
    mesh = choose(len(candidates), state.target, bounds)
    whole = find_whole(reports, state.group, mesh[1:] if mesh else (1, 1, 1))
    if not mesh or not whole or is_saved(state, "stopped"):
        return mesh, whole
    if math.prod(mesh) < math.prod(whole.degrees):
        mesh = (1, *whole.degrees)
    if whole.degrees != mesh[1:]:
        return mesh, whole
    sizes = range(mesh[0], len(candidates) // math.prod(mesh[1:]))  # a larger group has all that a smaller one has
    more = bisect_left(sizes, True, key=lambda data: whole.is_in(assign(candidates, (data, *mesh[1:]), whole, {})))
    return (mesh[0] + more, *mesh[1:]), whole  # who leaves next has a copy elsewhere by then


def end_saved(state: State, action: Finish) -> tuple[State, tuple[Any, ...]]:
    """The end, before which those who are left write down what they have."""
    state, saves = save_alone(replace(state, savers=(), over=action))
    state, finished = finish(state, action)
    return state, (*saves, *finished)


def save_alone(state: State) -> tuple[State, tuple[Any, ...]]:
    """Too few are left: those who have it write down what there is, once. Whoever goes on after that stays where it
    reported to stand."""
    reports = state.last if state.over else {w: replace(s, holds=-1) for w, s in state.last.items()}
    whole = find_whole(reports, state.group)
    savers = writers(whole, state.mesh[0], state.bounds.max_workers) if whole and whole.step > 0 else ()
    if not whole or not savers or savers == state.savers:
        return state, ()
    orders = tuple(SaveAlone(w, state.generation, whole.step, rank, len(savers), None if w in whole.exact else whole.ballot)
                   for rank, w in enumerate(savers))
    return replace(state, savers=savers), orders


def confirmed(state: State, report: Standing, newest: int, error: str) -> Standing:
    """The last report of a group that ends with its state saved is another if no checkpoint of that step was committed after all.

    `newest`: step of the newest committed checkpoint; `error`: why the last one was not. With a reason it is a failure,
    which ends the run when it comes again; without one parts of it fell with a controller, no member is to blame, and
    the group saves once more.
    """
    is_kept = report.reason == "stopped" and report.ballot and report.ballot.stop == STOP_AND_SAVE
    is_last = (report.generation == state.generation and report.worker in state.survivors
               and len(state.standing.having(report.worker, report)) == len(state.group))
    if not (report.reason == "done" or is_kept) or not is_last or report.committed <= newest:
        return report
    return replace(report, reason="failed" if error else "broken", error=error
                   or f"The checkpoint of step {report.committed} was not committed.")
