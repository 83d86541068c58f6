"""Proves of a schedule that it computes the right thing, cannot deadlock and keeps its published memory bound.

A stage's own list is checked by itself: what each action needs was there before it, each micro-batch goes through each
chunk once each way, weight gradients come in ascending order of micro-batches, and no more is in flight than `bound`
allows. Then the lists are run against each other. A message blocks both ends, and messages do not say what they are:
what two stages do with each other next must fit. With blocking messages the order in which independent stages go on
changes nothing of what can be reached (each has one next action, and no choice), so one run without a deadlock proves
that there is none, whatever things cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from elastic.parallel.actions import Action, Schedule, in_flight

# (stage, position in its list) of one computation, or of a message's sender and receiver
Ends = tuple[tuple[int, int], ...]
Task = tuple[str, int, int]  # kind, micro-batch, chunk; a backward in two parts is one `backward`

BEFORE = {"forward": ("receive_activation",), "send_activation": ("forward",),
          "backward": ("forward", "receive_gradient"),
          "send_gradient": ("backward",), "receive_activation": (), "receive_gradient": ()}  # on the same stage


class ScheduleError(ValueError):
    """The sentence names schedule, stage, position and action."""


def check(schedule: Schedule) -> None:
    """Raises `ScheduleError` at the first thing that is wrong."""
    for stage in range(schedule.num_stages):
        check_stage(schedule, stage)
    for _ in happenings(schedule):
        pass


def bound(schedule: Schedule, stage: int) -> int:
    """The most (micro-batch, chunk) pairs that may be in flight on a stage.

    GPipe keeps every micro-batch; 1F1B K - stage (Narayanan et al. 2021, section 2.2.1); the interleaved schedule's
    first stage K V + K - 1 chunks, which is 1 + (K - 1) / (K V) of 1F1B's memory (Korthikanti et al. 2022, section
    4.2.3), each later one two less; ZB-H1 on every stage what 1F1B has on its first (Qi et al. 2023, section 2.1).
    """
    stages, most = schedule.num_stages, schedule.num_micro_batches * schedule.num_chunks
    return min(most, {"gpipe": most, "1f1b": stages - stage, "zb-h1": stages,
                      "interleaved": 2 * (stages - stage - 1) + (schedule.num_chunks - 1) * stages + 1}[schedule.name])


def failure(schedule: Schedule, stage: int, position: int, what: str) -> ScheduleError:
    actions = schedule.actions[stage]
    action = str(actions[position]) if position < len(actions) else "the end"
    return ScheduleError(f"{schedule.name}: stage {stage}, position {position}, {action}: {what}")


def required(schedule: Schedule, stage: int) -> set[Task]:
    """All that a stage must do."""
    tasks: set[Task] = set()
    for chunk in range(schedule.num_chunks):
        depth = schedule.depth(stage, chunk)
        kinds = ["forward", "backward"]
        kinds += ["receive_activation", "send_gradient"] if depth else []
        kinds += ["send_activation", "receive_gradient"] if depth < schedule.num_depths - 1 else []
        tasks |= set(product(kinds, range(schedule.num_micro_batches), [chunk]))
    return tasks


def check_stage(schedule: Schedule, stage: int) -> None:
    """What can be said of one stage's list without the others'."""
    needed, done = required(schedule, stage), set[Task]()
    owed: set[tuple[int, int]] = set()  # (micro-batch, chunk) whose weight gradient is put off
    summed = [-1] * schedule.num_chunks  # the last micro-batch whose weight gradient is in the sum
    held, most = in_flight(schedule.actions[stage]), bound(schedule, stage)
    for position, action in enumerate(schedule.actions[stage]):
        what, item = "", (action.micro_batch, action.chunk)
        if action.kind == "backward_weight":
            what = "" if item in owed else "no backward_input that lacks its weight gradient comes before it."
            owed.discard(item)
        else:
            what = amiss(action, needed, done)
            done.add(task(action))
            if action.kind == "backward_input":
                owed.add(item)
        if not what and action.kind in ("backward", "backward_weight"):
            if action.micro_batch < summed[action.chunk]:
                what = f"the weight gradient of micro-batch {summed[action.chunk]} is in the sum already; they must come in ascending order."
            summed[action.chunk] = action.micro_batch
        if not what and held[position] > most:
            what = f"{held[position]} micro-batches are in flight; at most {most} may be."
        if what:
            raise failure(schedule, stage, position, what)
    if left := sorted(needed - done) or sorted(("backward_weight", *item) for item in owed):
        raise failure(schedule, stage, len(schedule.actions[stage]), f"{Action(*left[0])} is missing.")  # type: ignore[arg-type]


def task(action: Action) -> Task:
    return "backward" if action.kind == "backward_input" else action.kind, action.micro_batch, action.chunk


def amiss(action: Action, needed: set[Task], done: set[Task]) -> str:
    """What is wrong with doing `action` after what is done; "" if nothing. A message that nobody sends is not waited
    for."""
    kind, *item = this = task(action)
    if this not in needed:
        return "there is no such thing to do on this stage."
    if this in done:
        return "it comes a second time."
    missing = [(before, *item) for before in BEFORE[kind] if (before, *item) in needed and (before, *item) not in done]
    return f"{Action(*missing[0])} must come before it." if missing else ""  # type: ignore[arg-type]


def happenings(schedule: Schedule) -> Iterator[Ends]:
    """Everything that happens, in one order in which it can; raises where two ends do not fit or nobody can go on."""
    at = [0] * schedule.num_stages
    turn = list(range(schedule.num_stages))  # stages that may be able to go on
    while turn:
        stage = turn.pop()
        while at[stage] < len(schedule.actions[stage]):
            action = schedule.actions[stage][at[stage]]
            if not action.is_message:
                yield ((stage, at[stage]),)
                at[stage] += 1
                continue
            peer = schedule.peer(stage, action)
            theirs = schedule.actions[peer][at[peer]] if at[peer] < len(schedule.actions[peer]) else None
            if theirs is None or not theirs.is_message or schedule.peer(peer, theirs) != stage:
                break
            if theirs != schedule.counterpart(stage, action):
                raise failure(schedule, stage, at[stage],
                              f"stage {peer} is at position {at[peer]}, {theirs}, which does not fit.")
            ends = (stage, at[stage]), (peer, at[peer])
            yield ends if action.kind.startswith("send") else ends[::-1]
            at[stage] += 1
            at[peer] += 1
            turn.append(peer)
    stuck = [stage for stage in range(schedule.num_stages) if at[stage] < len(schedule.actions[stage])]
    if stuck:
        stage, *others = stuck
        peer = schedule.peer(stage, schedule.actions[stage][at[stage]])
        too = ", ".join(f"stage {other} at position {at[other]}, {schedule.actions[other][at[other]]}"
                        for other in others)
        raise failure(schedule, stage, at[stage],
                      f"deadlock: stage {peer} does not come to it{'; stuck as well: ' + too if too else ''}.")
