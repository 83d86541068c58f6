"""Who is to leave hands over its buckets beside the training, and goes when all have moved, or when there is no time left."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from elastic.controller import controller as controllers
from elastic.controller import membership as m
from elastic.controller.policy import HAND_OVER_S, Bounds
from elastic.messages import STOP, Generation, Moved, Progress, Ready, RequestStop, Standing
from elastic.tables.buckets import bits_of
from elastic.tables.moving import Moving, roles_of
from tests.support.machine import Machine, formed, kinds
from tests.support.rig import Clock, Rig

SIZE = 16


def ready(name: str, twin: bool = False) -> Ready:
    return Ready(name, f"node-{name}", 1, f"{name}:1", buckets=SIZE, twin=twin)


def group(*names: str, twin: bool = False) -> tuple[Machine, Generation]:
    machine = Machine()
    return machine, formed(machine.feed(*[m.Starting(name) for name in names], *[ready(name, twin) for name in names]))


def reports(generation: Generation, step: int, chunks: int = 1000, reason: str = "stopped") -> list[Standing]:
    """What all members say that stand by after so many chunks of three buckets."""
    assert generation.buckets
    moving = Moving(generation.buckets, 0, 3)
    found = []
    for rank, name in enumerate(generation.members):
        owned, twins = roles_of(rank, moving.at(min(chunks, len(moving.rounds))))
        found.append(Standing(name, generation.number, reason, step, buckets=SIZE, owned=bits_of(owned, SIZE),
                              twins=bits_of(twins, SIZE)))
    return found


def moved(generation: Generation) -> Moved:
    return Moved(generation.members[0], generation.number, 9, 1, 1, 0.1, 1)


def stopped(actions: Iterable[Any]) -> list[str]:
    orders = [action for action in actions if isinstance(action, RequestStop)]
    assert all(order.code == STOP for order in orders)
    return [order.worker for order in orders]


def test_a_smaller_group_waits_until_all_has_moved() -> None:
    machine, first = group("a", "b", "c", "d")
    assert stopped(machine.feed(m.ScaleTo(3))) == ["a", "b", "c", "d"]
    actions = machine.feed(*reports(first, 5))
    second = formed(actions)
    assert second.members == ("a", "b", "c", "d") and second.buckets and not second.buckets.at_once
    assert set(second.buckets.last_owners) == {0, 1, 2} and len(second.buckets.moves) == 4
    assert not stopped(actions) and not machine.feed(moved(first)), "an older generation's word"
    assert stopped(machine.feed(moved(second))) == ["a", "b", "c", "d"]
    actions = machine.feed(*reports(second, 9))
    third = formed(actions)
    assert third.members == ("a", "b", "c") and third.buckets and not third.buckets.moves
    assert m.Release("d") in actions and not stopped(actions)


def test_nobody_waits_for_a_leaver_whose_rows_have_twins() -> None:
    machine, first = group("a", "b", "c", twin=True)
    machine.feed(m.Drain(("node-c",)))
    actions = machine.feed(*reports(first, 5))
    assert formed(actions).members == ("a", "b") and m.Release("c") in actions


def test_a_new_plan_where_others_are_to_stay() -> None:
    machine, first = group("a", "b", "c", "d")
    machine.feed(m.Drain(("node-d",)))
    second = formed(machine.feed(*reports(first, 5)))
    assert stopped(machine.feed(m.Drain(("node-c",)))) == ["a", "b", "c", "d"]
    actions = machine.feed(*reports(second, 6, chunks=1))
    third = formed(actions)
    assert third.buckets and set(third.buckets.last_owners) == {0, 1} and not stopped(actions)


def test_a_joiner_waits_for_who_hands_over() -> None:
    machine, first = group("a", "b", "c")
    machine.feed(m.Drain(("node-c",)))
    second = formed(machine.feed(*reports(first, 5)))
    assert "RequestStop" not in kinds(machine.feed(m.Starting("d"), ready("d")))
    machine.feed(moved(second))
    assert formed(machine.feed(*reports(second, 9))).members == ("a", "b", "d")


def test_where_the_time_is_short_the_rest_goes_at_once() -> None:
    machine, first = group("a", "b", "c")
    machine.feed(m.Drain(("node-c",)))
    second = formed(machine.feed(*reports(first, 5)))
    assert stopped(machine.feed(m.Hurry())) == ["a", "b", "c"]
    actions = machine.feed(*reports(second, 6, chunks=1))
    third = formed(actions)
    assert third.buckets and second.buckets and third.buckets.at_once and 0 < len(third.buckets.moves) < len(second.buckets.moves)
    assert stopped(actions) == ["a", "b", "c"], "its first step is its last"
    actions = machine.feed(*reports(third, 7))
    assert formed(actions).members == ("a", "b") and m.Release("c") in actions
    assert machine.state.handing == () and not machine.state.is_late


def test_a_leaver_that_falls_is_a_loss_as_any() -> None:
    machine, first = group("a", "b", "c")
    machine.feed(m.Drain(("node-c",)))
    second = formed(machine.feed(*reports(first, 5)))
    machine.feed(m.Lost("c", "killed"))
    found = formed(machine.feed(*reports(second, 6, 1, "broken")))
    assert (found.members, found.committed) == (("a", "b"), -1), "its rows went with it"


def test_the_time_of_a_drained_node_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(controllers, "time", clock)
    rig = Rig(tmp_path, clock)
    for name in "abc":
        rig.controller.advance(m.Starting(name))
    for name in "abc":
        rig.say(ready(name))
    first = rig.assigned()[0]
    rig.controller.advance(m.Drain(("node-c",)))
    rig.say(*reports(first, 5))
    second, _ = rig.assigned()
    assert second.number == 2 and rig.controller.state.handing == ("a", "b")
    pulses = [Progress(name, 2, 7, "reduction", 3, True) for name in "abc"]
    rig.wait(HAND_OVER_S - 0.5, *pulses)
    assert not rig.controller.state.is_late
    rig.wait(1.0, *pulses)
    assert rig.controller.state.is_late and rig.controller.state.phase == "stopping"
    rig.say(moved(second))
    (event,) = rig.events("tables_resharded")
    assert (event["buckets"], event["bytes"], event["seconds"], event["steps"], event["step"]) == (1, 1, 0.1, 1, 9)


def test_after_a_loss_all_who_are_left_keep_rows() -> None:
    """Four of eight logical shards' seven replicas would take as long; but nobody goes."""
    names = [f"w{number}" for number in range(8)]
    machine = Machine(Bounds(1, 8, 8))
    first = formed(machine.feed(*[m.Starting(name) for name in names], *[ready(name, twin=True) for name in names]))
    machine.feed(m.Lost("w7", "killed"))
    second = formed(machine.feed(*[one for one in reports(first, 5, reason="broken") if one.worker != "w7"]))
    assert second.buckets and set(second.buckets.last_owners) == set(range(7)) and len(second.members) == 7
    assert machine.state.handing == () and not stopped(machine.feed(moved(second)))
