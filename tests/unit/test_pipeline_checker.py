"""What the checker proves of a schedule, against a run of it that knows only what values must arrive where."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from elastic.parallel.actions import NAMES, Action, Kind, Name, Schedule
from elastic.parallel.checker import ScheduleError, check
from elastic.parallel.message_order import place
from elastic.parallel.schedules import build, one_forward_one_backward

CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1}
STRICTER = ("in flight", "ascending")  # rules that are not about right values


def outcome(schedule: Schedule, seed: int) -> str:
    """Runs the lists with blocking messages, stages in random turns. A value is named by how it was made; "" if all
    come out right."""
    chance, stages = random.Random(seed), schedule.num_stages
    at, slots = [0] * stages, [{} for _ in range(stages)]
    last = stages * schedule.num_chunks - 1
    while True:
        able = []
        for stage, actions in enumerate(schedule.actions):
            if at[stage] == len(actions):
                continue
            other = ends(stage, actions[at[stage]], stages)
            if other is None:
                able.append((stage, None))
            elif actions[at[stage]].kind.startswith("send") and at[other] < len(schedule.actions[other]):
                theirs = schedule.actions[other][at[other]]
                if theirs.kind.startswith("receive") and ends(other, theirs, stages) == stage:
                    able.append((stage, other))
        if not able:
            break
        stage, other = chance.choice(able)
        action = schedule.actions[stage][at[stage]]
        at[stage] += 1
        if other is None:
            compute(slots[stage], action, action.chunk * stages + stage, last)
        else:
            theirs = schedule.actions[other][at[other]]
            at[other] += 1
            slots[other][theirs.kind, theirs.micro_batch, theirs.chunk] = slots[stage].get(
                ("out" if action.kind == "send_activation" else "gradient", action.micro_batch, action.chunk))
    if any(position < len(actions) for position, actions in zip(at, schedule.actions)):
        return "stuck"
    right = {("counted", m, chunk): 1 for m in range(schedule.num_micro_batches)
             for chunk in range(schedule.num_chunks)}
    wrong = [stage for stage in range(stages) if {k: v for k, v in slots[stage].items() if k[0] == "counted"} != right]
    return f"stages {wrong} are wrong" if wrong else ""


def ends(stage: int, action: Action, stages: int) -> int | None:
    """The other end of a message; None for a computation."""
    way = {"send_activation": 1, "receive_gradient": 1, "send_gradient": -1, "receive_activation": -1}.get(action.kind)
    return None if way is None else (stage + way) % stages


def compute(slots: dict, action: Action, depth: int, last: int) -> None:
    """`counted` goes up by one where a gradient is made of exactly the values it must be made of."""
    m, chunk = action.micro_batch, action.chunk
    if action.kind == "forward":
        source = slots.get(("receive_activation", m, chunk)) if depth else ("out", depth - 1, m)
        slots["out", m, chunk] = ("out", depth, m) if source == ("out", depth - 1, m) else "wrong"
    if action.kind in ("backward", "backward_input"):
        source = slots.get(("receive_gradient", m, chunk)) if depth < last else ("gradient", depth + 1, m)
        good = source == ("gradient", depth + 1, m) and slots.get(("out", m, chunk)) == ("out", depth, m)
        slots["gradient", m, chunk] = ("gradient", depth, m) if good else "wrong"
    if action.kind in ("backward", "backward_weight"):
        good = slots.get(("gradient", m, chunk)) == ("gradient", depth, m)
        slots["counted", m, chunk] = slots.get(("counted", m, chunk), 0) + (1 if good else 100)


def changed(schedule: Schedule, stage: int, change: Callable[[list[Action]], None]) -> Schedule:
    actions = list(schedule.actions[stage])
    change(actions)
    return replace(schedule, actions=(*schedule.actions[:stage], tuple(actions), *schedule.actions[stage + 1:]))


def places(schedule: Schedule) -> Iterator[tuple[int, int]]:
    return ((stage, position) for stage, actions in enumerate(schedule.actions) for position in range(len(actions)))


@pytest.mark.parametrize("num_stages", range(2, 9))
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_passes(name: Name, num_stages: int) -> None:
    chunks = CHUNKS[name]
    for num_micro_batches in range(1, 33):
        schedule = build(name, num_stages, num_micro_batches, chunks)
        check(schedule)
        messages = sum(action.is_message for actions in schedule.actions for action in actions)
        assert messages == 2 * 2 * (num_stages * chunks - 1) * num_micro_batches  # each cut, each way, both ends


@pytest.mark.parametrize(("chunks", "pace"), [(3, (1, 1, 1)), (4, (2, 1, 1)), (2, (10, 9, 8)), (1, (1, 1, 1))])
def test_interleaved_with_other_chunks_and_paces_passes(chunks: int, pace: tuple[int, int, int]) -> None:
    for num_stages in (2, 3, 5):
        for num_micro_batches in (1, 4, 7, 12):
            schedule = build("interleaved", num_stages, num_micro_batches, chunks, pace)
            check(schedule)
            assert schedule.num_depths == num_stages * chunks and outcome(schedule, 0) == ""


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_one_stage_needs_no_message(name: Name) -> None:
    schedule = build(name, 1, 4)
    check(schedule)
    assert not any(action.is_message for action in schedule.actions[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_right_schedule_comes_out_right_in_any_order(name: Name) -> None:
    for num_stages, num_micro_batches in ((2, 1), (3, 5), (4, 8)):
        schedule = build(name, num_stages, num_micro_batches, CHUNKS[name])
        assert {outcome(schedule, seed) for seed in range(3)} == {""}


@pytest.mark.parametrize("name", NAMES)
def test_an_action_dropped_or_doubled_is_caught(name: Name) -> None:
    schedule = build(name, 3, 4, CHUNKS[name])
    for stage, position in places(schedule):
        with pytest.raises(ScheduleError, match=rf"{name}: stage \d, position \d+, .*: "):
            check(changed(schedule, stage, lambda actions: actions.pop(position)))
        with pytest.raises(ScheduleError, match=rf"stage {stage}, position {position + 1}, .*: "):
            check(changed(schedule, stage, lambda actions: actions.insert(position + 1, actions[position])))


@pytest.mark.parametrize("name", NAMES)
def test_a_swap_is_caught_or_harmless(name: Name) -> None:
    schedule = build(name, 3, 4, CHUNKS[name])
    verdicts = []
    for stage, position in places(schedule):
        if position + 1 == len(schedule.actions[stage]):
            continue

        def swap(actions: list[Action]) -> None:
            actions[position:position + 2] = reversed(actions[position:position + 2])

        swapped = changed(schedule, stage, swap)
        found = outcome(swapped, seed=position)
        try:
            check(swapped)
            assert found == "", f"passed, but {found}: stage {stage}, position {position}"
            verdicts.append("harmless")
        except ScheduleError as error:
            assert found or any(rule in str(error) for rule in STRICTER), f"stage {stage}, position {position}: {error}"
            verdicts.append("caught")
    assert verdicts.count("caught") > len(verdicts) // 2 and "harmless" in verdicts


def naive(num_stages: int, num_micro_batches: int) -> Schedule:
    """1F1B with every receive right before and every send right behind its computation."""
    lists = []
    for stage in range(num_stages):
        actions: list[Action] = []
        for action in one_forward_one_backward(stage, num_stages, num_micro_batches, 1):
            around: dict[str, tuple[Kind, Kind, bool, bool]] = {
                "forward": ("receive_activation", "send_activation", stage > 0, stage < num_stages - 1),
                "backward": ("receive_gradient", "send_gradient", stage < num_stages - 1, stage > 0)}
            before, after, has_before, has_after = around[action.kind]
            actions += [Action(before, action.micro_batch)] * has_before + [action] + [Action(after, action.micro_batch)] * has_after
        lists.append(tuple(actions))
    return Schedule("1f1b", num_micro_batches, 1, tuple(lists))


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_sends_right_behind_their_computation_do_not_pass(num_stages: int) -> None:
    assert outcome(naive(num_stages, 4), 0) == "stuck"
    with pytest.raises(ScheduleError, match="does not fit"):
        check(naive(num_stages, 4))
    check(naive(num_stages, 1))  # one micro-batch has nothing to cross


def test_a_ring_in_which_all_send_first_is_a_deadlock() -> None:
    """Three stages with two chunks: the messages of one micro-batch's moment all go round, and nobody receives first.
    """
    ring = build("interleaved", 3, 3, 2)

    def wait_for_each_other(actions: list[Action]) -> None:
        receive = actions.index(Action("receive_activation", 0, 1))
        send = actions.index(Action("send_activation", 2, 0))
        actions.insert(min(receive, send), actions.pop(max(receive, send)))

    assert outcome(ring, 0) == ""
    stuck = changed(ring, 0, wait_for_each_other)
    assert outcome(stuck, 0) == "stuck"
    with pytest.raises(ScheduleError, match="deadlock: stage 1 does not come to it; stuck as well: stage 1 at "
                                            "position"):
        check(stuck)


def test_the_memory_bound_is_the_schedules_own() -> None:
    """GPipe's lists under 1F1B's name hold too much from the first stage's fourth forward on."""
    with pytest.raises(ScheduleError, match=r"stage 0, position \d+, forward\(micro-batch 3, chunk 0\): 4 micro-batches are in flight; at most 3"):
        check(replace(build("gpipe", 3, 4), name="1f1b"))


def test_weight_gradients_out_of_order_are_caught() -> None:
    """Right values, another sum: the order of micro-batches decides the bits."""
    schedule = build("zb-h1", 2, 3)

    def swap(actions: list[Action]) -> None:
        first, second = (actions.index(Action("backward_weight", m)) for m in (1, 2))
        actions[first], actions[second] = actions[second], actions[first]

    swapped = changed(schedule, 1, swap)
    assert outcome(swapped, 0) == ""
    with pytest.raises(ScheduleError, match=r"backward_weight\(micro-batch 1, chunk 0\): the weight gradient of micro-batch 2 is in the sum already"):
        check(swapped)


def test_computations_that_wait_in_a_circle_cannot_be_placed() -> None:
    orders = [[Action("forward", 0), Action("backward", 0)], [Action("backward", 0), Action("forward", 0)]]
    with pytest.raises(ValueError, match="the order deadlocks: stage 0 waits to do backward"):
        place([orders[0], [Action("forward", 1), *orders[1]]], 1)


@pytest.mark.parametrize(("arguments", "says"), [
    (("1f1b", 0, 4), "1f1b over 0 stages: there must be at least 1"),
    (("interleaved", 1, 4, 2), "interleaved over 1 stages: there must be at least 2"),
    (("gpipe", 2, 0), "gpipe over 0 micro-batches"),
    (("zb-h1", 2, 4, 2), 'zb-h1 with 2 chunks a stage: it has one; "interleaved" has several'),
    (("1f1b", 2, 4, 1, (1, 0, 1)), r"pace = \(1, 0, 1\)")])
def test_what_cannot_be_built_is_one_sentence(arguments: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(*arguments)
