"""Where everybody starts when each has the optimizer's state of some blocks only. The oracle: sets of blocks, counted by hand."""

from __future__ import annotations

from typing import Any

from elastic.controller import membership as m
from elastic.controller.policy import Bounds
from elastic.messages import STOP, STOP_AND_SAVE, Generation
from elastic.state.ownership import held
from elastic.tables.buckets import bits_of
from tests.support.machine import Machine, ballot, formed, only, running, stand

TWINS, SINGLE = Bounds(1, 4, 8, holders=2), Bounds(1, 4, 8, holders=1)
BLOCKS = 8


def stands(machine: Machine, name: str, committed: int, **more: Any) -> list[Any]:
    group, bounds = machine.state.group, machine.state.bounds
    mine = held(group.index(name), len(group), BLOCKS, bounds.holders > 1)
    return stand(machine, name, committed, **{"held": mine, "blocks": BLOCKS, **more})


def places(generation: Generation) -> set[int]:
    return {block for ranges in generation.held for low, high in ranges for block in range(low, high)}


def test_a_lost_owner_has_a_twin() -> None:
    machine = running("a", "b", "c", "d", bounds=TWINS)
    machine.feed(m.Lost("b", "killed"))
    for name in "ac":
        stands(machine, name, 7)
    generation = formed(stands(machine, "d", 7))
    assert generation.committed == 7 and not generation.load and generation.torn == ()
    assert generation.held == (((0, 2), (6, 8)), ((4, 6), (2, 4)),
                               ((6, 8), (4, 6))) and places(generation) == set(range(8))


def test_owner_and_twin_lost_is_a_start_from_a_checkpoint() -> None:
    machine = running("a", "b", "c", "d", bounds=TWINS)
    machine.feed(m.Lost("b", "killed"), m.Lost("c", "killed"))
    stands(machine, "a", 7)
    generation = formed(stands(machine, "d", 7))
    assert generation.committed == -1 and generation.held == ()


def test_without_twins_any_loss_is_one_and_a_stop_of_all_is_none() -> None:
    machine = running("a", "b", "c", bounds=SINGLE)
    machine.feed(m.Lost("b", "killed"))
    stands(machine, "a", 7)
    assert formed(stands(machine, "c", 7)).committed == -1
    machine = running("a", "b", "c", bounds=SINGLE)
    for name in "ab":
        stands(machine, name, 7)
    assert formed(stands(machine, "c", 7)).committed == 7


def test_who_lacks_what_others_keep_is_named() -> None:
    """b saw everything; c applied what it keeps and missed the rest; d holds the gradients and learns of the vote now.
    """
    machine = running("a", "b", "c", "d", bounds=TWINS)
    machine.feed(m.Lost("a", "killed"))
    stands(machine, "b", 7)
    stands(machine, "c", 7, torn=True)
    generation = formed(stands(machine, "d", 6, holds=7, ballot=None))
    assert generation.committed == -1, "nobody knows what was voted: the machine must not guess"
    machine = running("a", "b", "c", "d", bounds=TWINS)
    machine.feed(m.Lost("a", "killed"))
    stands(machine, "b", 7, ballot=ballot(7))
    stands(machine, "c", 7, torn=True, ballot=ballot(7))
    generation = formed(stands(machine, "d", 6, holds=7))
    assert generation.committed == 7 and generation.ballot == ballot(7)
    assert [generation.members[r] for r in generation.torn] == ["c", "d"] and places(generation) == set(range(8))


def test_a_joiner_has_nothing() -> None:
    machine = running("a", "b", bounds=Bounds(1, 3, 9, holders=2))
    machine.feed(m.Starting("c"), m.Ready("c", "n", 1, "c:1"))
    stands(machine, "a", 7, reason="stopped")
    generation = formed(stands(machine, "b", 7, reason="stopped"))
    assert generation.members == ("a", "b", "c") and generation.held == (((0, 4), (4, 8)), ((4, 8), (0, 4)), ())
    assert generation.healers == ((0, (2,)),) and generation.torn == ()


def test_a_group_with_twins_shrinks_one_by_one_and_one_without_by_way_of_a_checkpoint() -> None:
    machine = running("a", "b", "c", "d", bounds=TWINS)
    sizes = []
    actions = machine.feed(m.ScaleTo(1))
    while len(machine.state.group) > 1:
        assert {action.code for action in actions if isinstance(action, m.RequestStop)} == {STOP}
        for name in machine.state.group:
            actions = stands(machine, name, 7, reason="stopped", ballot=ballot(7, STOP))
        generation = formed(actions)
        assert generation.committed == 7 and places(generation) == set(range(8))
        sizes.append(len(generation.members))
    assert sizes == [3, 2, 1]
    machine = running("a", "b", "c", "d", bounds=SINGLE)
    actions = machine.feed(m.ScaleTo(2))
    assert {action.code for action in actions if isinstance(action, m.RequestStop)} == {STOP_AND_SAVE}
    for name in machine.state.group:
        actions = stands(machine, name, 7, reason="stopped", ballot=ballot(7, STOP_AND_SAVE))
    assert formed(actions).members == ("a", "b") and formed(actions).committed == -1


def saves(actions: list[Any]) -> list[tuple[str, int, int]]:
    return [(a.worker, a.rank, a.world_size) for a in actions if isinstance(a, m.SaveAlone)]


def test_too_few_write_down_what_they_own_and_what_they_are_the_twin_of() -> None:
    machine = running("a", "b", "c", bounds=Bounds(3, 3, 9, holders=2))
    machine.feed(m.Lost("b", "killed"))
    stands(machine, "a", 7)
    actions = stands(machine, "c", 7)
    assert only(actions, m.Wait).needed == 3 and saves(actions) == [("a", 0, 3), ("c", 1, 3), ("c", 2, 3)]


def rows(owned: list[int], twins: list[int]) -> dict[str, Any]:
    """Of three buckets."""
    return {"buckets": 3, "owned": bits_of(owned, 3), "twins": bits_of(twins, 3)}


def test_with_rows_each_still_writes_the_blocks_that_it_has() -> None:
    machine = running("a", "b", "c", bounds=Bounds(3, 3, 9, holders=2))
    machine.feed(m.Lost("b", "killed"))
    stands(machine, "a", 7, **rows([0], [2]))
    assert saves(stands(machine, "c", 7, **rows([2], [1]))) == [("a", 0, 3), ("c", 1, 3), ("c", 2, 3)]
    machine = running("a", "b", "c", bounds=Bounds(3, 3, 9, holders=2))
    machine.feed(m.Lost("b", "killed"))
    stands(machine, "a", 7, **rows([0], []))
    assert saves(stands(machine, "c", 7, **rows([2], []))) == [], "bucket 1 is nowhere"


def test_rows_make_nobody_torn() -> None:
    """Of two that hold all blocks one did not see the vote."""
    machine = running("a", "b", bounds=TWINS)
    stands(machine, "a", 7, ballot=ballot(7), **rows([0], [1, 2]))
    generation = formed(stands(machine, "b", 6, holds=7, **rows([1, 2], [0])))
    assert generation.committed == 7 and generation.torn == ()


def test_at_a_failed_end_each_owner_writes_its_part() -> None:
    machine = running("a", "b", "c", "d", bounds=TWINS)
    for name in "abc":
        stands(machine, name, 7, reason="failed", error="no", fatal=True)
    actions = stands(machine, "d", 7, reason="failed", error="no", fatal=True)
    assert saves(actions) == [("a", 0, 4), ("b", 1, 4), ("c", 2, 4),
                              ("d", 3, 4)] and only(actions, m.Finish).status == "failed"


def test_a_torn_owner_is_its_twin_s_to_write_down() -> None:
    """b's update failed half-way: it has no state any more."""
    machine = running("a", "b", "c", bounds=Bounds(1, 3, 9, holders=2))
    stands(machine, "b", -1, reason="failed", error="no", fatal=True, held=(), coordinate=-1)
    stands(machine, "a", 7)
    assert saves(stands(machine, "c", 7)) == [("a", 0, 3), ("c", 1, 3), ("c", 2, 3)]


def test_nobody_writes_down_what_is_nowhere() -> None:
    machine = running("a", "b", "c", bounds=Bounds(3, 3, 9, holders=1))
    machine.feed(m.Lost("b", "killed"))
    stands(machine, "a", 7)
    assert saves(stands(machine, "c", 7)) == []


def test_who_holds_the_last_step_applies_it_before_the_end_and_only_then() -> None:
    """Of three one is lost in a vote that one other saw complete."""
    machine = running("a", "b", "c", bounds=Bounds(3, 3, 9, holders=2))
    machine.feed(m.Lost("b", "killed"))
    stands(machine, "a", 7, ballot=ballot(7))
    assert saves(stands(machine, "c", 6, holds=7)) == [], "they may go on, from where they say that they stand"
    actions = machine.feed(m.GiveUp("no more"))
    assert [(a.worker, a.step, a.ballot) for a in actions
            if isinstance(a, m.SaveAlone)] == [("a", 7, None), ("c", 7, ballot(7)), ("c", 7, ballot(7))]


def test_a_survivor_that_shortens_no_step_trains_along_rather_than_leave_in_a_pause_of_its_own() -> None:
    names = [f"w{number:02}" for number in range(16)]
    machine = running(*names, bounds=Bounds(1, 16, 32, holders=2))
    machine.feed(m.Lost("w05", "killed"))
    actions = [action for rank, name in enumerate(names) if name != "w05"
               for action in stands(machine, name, 7, held=held(rank, 16, 64, True), blocks=64)]
    assert len(formed(actions).members) == 14 and machine.state.phase == "running", "what the last one has another has too"
    actions = machine.feed(m.Starting("x"), m.Ready("x", "n", 1, "x:1"))
    assert {action.code for action in actions if isinstance(action, m.RequestStop)} == {STOP}, "it makes a step shorter"
    machine = running(*names, bounds=Bounds(1, 16, 32, holders=2))
    assert machine.feed(m.ScaleTo(11)), "who is not wanted any more is asked to stop"


def test_a_group_with_twins_that_shrinks_by_many_goes_by_a_checkpoint() -> None:
    codes = {}
    for size in (7, 8):
        machine = running(*(f"w{number:02}" for number in range(16)), bounds=Bounds(1, 16, 16, holders=2))
        codes[size] = {a.code for a in machine.feed(m.ScaleTo(size)) if isinstance(a, m.RequestStop)}
    assert codes == {8: {STOP}, 7: {STOP_AND_SAVE}}
