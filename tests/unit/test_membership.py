"""The state machine by itself: events in, actions out."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.controller import membership as m
from elastic.controller.policy import MAX_UNSAVED, Bounds
from elastic.messages import STOP, STOP_AND_SAVE, Ready, Standing
from tests.support.machine import BOUNDS, Machine, ballot, kinds, only


def group(*names: str, bounds: Bounds = BOUNDS) -> Machine:
    machine = Machine(bounds)
    machine.ready(*names)
    assert machine.state.group == names and machine.state.phase == "running"
    return machine


# Start.


def test_the_first_group_waits_for_all_that_are_starting() -> None:
    machine = Machine()
    assert machine.done == [m.Want(4)]
    assert machine.feed(m.Starting("a"), m.Starting("b"), Ready("a", "n", 1, "a:1")) == []
    form = only(machine.feed(Ready("b", "n", 1, "b:1")), m.Form)
    assert (form.generation.number, form.generation.members, form.generation.endpoint) == (1, ("a", "b"), "a:1")
    assert (form.generation.committed, form.before, form.cause) == (-1, 0, "start")


def test_one_that_dies_while_starting_is_not_waited_for() -> None:
    machine = Machine()
    machine.feed(m.Starting("a"), m.Starting("b"), Ready("a", "n", 1, "a:1"))
    assert only(machine.feed(m.Lost("b", "killed")), m.Form).generation.members == ("a",)


def test_a_resumed_run_goes_on_counting_generations() -> None:
    machine = Machine(generation=7)
    assert only(machine.ready("a"), m.Form).generation.number == 8


def test_too_few_wait_and_go_on() -> None:
    machine = Machine(Bounds(2, 4, 8))
    assert only(machine.ready("a"), m.Wait) == m.Wait(1, 2)
    form = only(machine.ready("b"), m.Form)
    assert form.generation.members == ("a", "b")
    machine.feed(m.Lost("a", "killed"))
    assert only(machine.stand("b", "broken", 5), m.Wait) == m.Wait(1, 2)
    assert machine.state.phase == "waiting"
    form = only(machine.ready("c"), m.Form)
    assert (form.generation.members, form.generation.committed,
            form.generation.healers) == (("b", "c"), 5, ((0, (1,)),))


# Losses.


def test_a_loss_aborts_the_rest_and_forms_anew_when_all_stand() -> None:
    machine = group("a", "b", "c")
    assert machine.feed(m.Lost("b", "killed")) == [m.Abort("a", 1), m.Abort("c", 1)]
    assert machine.stand("c", "broken", 9) == []
    form = only(machine.stand("a", "broken", 9), m.Form)
    assert (form.generation.members, form.generation.committed, form.generation.healers) == (("a", "c"), 9, ())
    assert (form.before, form.cause) == (3, "killed")


def test_the_word_of_a_peer_is_enough() -> None:
    machine = group("a", "b", "c")
    assert machine.stand("a", "broken", 9) == [m.Abort("b", 1), m.Abort("c", 1)]
    machine.stand("b", "broken", 9)
    assert machine.state.phase == "regrouping"
    assert only(machine.feed(m.Lost("c", "killed")), m.Form).generation.members == ("a", "b")


def test_two_losses_at_once_and_one_while_regrouping() -> None:
    machine = group("a", "b", "c", "d")
    machine.feed(m.Lost("a", "killed"))
    assert machine.feed(m.Lost("b", "killed")) == []  # the others have been told
    machine.stand("c", "broken", 3)
    form = only(machine.feed(m.Lost("d", "killed")), m.Form)
    assert form.generation.members == ("c",)


def test_all_gone_starts_from_whatever_is_saved() -> None:
    machine = group("a", "b")
    machine.feed(m.Lost("a", "killed"))
    assert only(machine.feed(m.Lost("b", "killed")), m.Wait) == m.Wait(0, 1)
    form = only(machine.ready("c"), m.Form)
    assert form.generation.committed == -1  # the carrier puts in the newest checkpoint


def test_who_stood_and_then_fell_is_no_source() -> None:
    machine = group("a", "b", bounds=Bounds(2, 4, 8))
    machine.stand("a", "broken", 9, ballot=ballot(9))
    machine.stand("b", "broken", 8, holds=9)
    assert machine.state.generation == 2 and machine.state.phase == "running"
    machine.stand("a", "broken", 9)
    machine.feed(m.Lost("a", "killed"))
    machine.stand("b", "broken", 9)
    form = only(machine.ready("c"), m.Form)
    assert (form.generation.members, form.generation.committed,
            form.generation.healers) == (("b", "c"), 9, ((0, (1,)),))


def test_an_older_generation_s_word_changes_nothing() -> None:
    machine = group("a", "b", "c")
    machine.feed(m.Lost("c", "killed"))
    machine.stand("a", "broken", 4)
    machine.stand("b", "broken", 4)
    before = machine.state
    assert machine.feed(Standing("a", 1, "broken", 99), Standing("c", 1, "done", 99), Standing("c", 2, "done", 99),
                        Standing("x", 2, "failed", 99, error="no")) == []
    assert machine.state == before


# The rule of recovery.


@pytest.mark.parametrize(("words", "committed", "healed", "source"), [
    ({"a": (8, 9, None), "b": (8, 9, None), "c": (8, -1, None)}, 8, (), -1),  # nobody saw the vote: redo
    ({"a": (9, 9, 9), "b": (9, 9, 9), "c": (9, 9, 9)}, 9, (), -1),
    ({"a": (8, 9, 8), "b": (9, 9, 9), "c": (8, 9, 8)}, 9, (), -1),  # one saw it, the others hold the gradients
    ({"a": (8, -1, 8), "b": (9, 9, 9), "c": (8, 9, 8)}, 9, ("a",), "b"),  # one has not even those
    ({"a": (-1, -1, None), "b": (8, -1, 8), "c": (8, 9, 8)}, 8, ("a",), "b"),  # one is torn
    ({"a": (-1, 9, 9), "b": (8, 9, 8), "c": (-1, -1, None)}, 8, ("a", "c"), "b"),  # torn after the vote: who saw it cannot say so alone
    ({"a": (-1, -1, None), "b": (-1, -1, None), "c": (-1, -1, None)}, -1, (), -1),  # nobody has anything
    ({"a": (8, -1, 8), "b": (9, 9, None), "c": (8, 9, 8)}, 9, ("a", "c"), "b"),  # the step counts, its ballot is gone
])
def test_where_everybody_starts(words: dict[str, tuple[int, int, int | None]], committed: int, healed: tuple[str, ...],
                                source: str | int) -> None:
    machine = group("a", "b", "c")
    actions: list[Any] = []
    for name, (at, holds, seen) in words.items():
        actions = machine.stand(name, "broken", at, holds=holds, ballot=ballot(seen) if seen else None)
    generation = only(actions, m.Form).generation
    ranks = {name: rank for rank, name in enumerate(generation.members)}
    assert set(ranks) == set(words)
    assert generation.committed == committed
    expected = [(source, set(healed))] if healed else []
    assert [(generation.members[s], {generation.members[r] for r in to}) for s, to in generation.healers] == expected
    if any(at == committed - 1 and holds == committed
           for at, holds, _ in words.values()) and committed not in (-1, 8) and not healed:
        assert generation.ballot == ballot(committed)


def test_survivors_come_before_joiners_and_the_furthest_first() -> None:
    machine = group("a", "b", "c")
    machine.feed(m.Starting("d"), m.Lost("a", "killed"), m.ScaleTo(2), Ready("d", "n", 1, "d:1"))
    machine.stand("b", "broken", 8, holds=9)
    generation = only(machine.stand("c", "broken", 9, ballot=ballot(9)), m.Form).generation
    assert generation.members == ("c", "b")  # with room for one only, a committed step must not be left behind
    assert (generation.committed, generation.healers) == (9, ())


# Resizes.


def test_a_joiner_is_let_in_at_a_step_boundary() -> None:
    machine = group("a", "b")
    assert machine.feed(m.Starting("c")) == []
    assert machine.feed(Ready("c", "n", 1, "c:1")) == [m.RequestStop("a", 1, STOP), m.RequestStop("b", 1, STOP)]
    assert machine.feed(m.Starting("d"), Ready("d", "n", 1, "d:1")) == []
    machine.stand("a", "stopped", 7)
    form = only(machine.stand("b", "stopped", 7), m.Form)
    assert (form.generation.members, form.generation.healers) == (("a", "b", "c", "d"), ((0, (2, 3)),))
    assert form.cause == "resize"


def test_no_stop_while_another_joiner_is_on_its_way() -> None:
    machine = group("a")
    assert machine.feed(m.Starting("b"), m.Starting("c"), Ready("b", "n", 1, "b:1")) == []
    assert kinds(machine.feed(Ready("c", "n", 1, "c:1"))) == ["RequestStop"]


def test_a_joiner_that_would_not_help_is_kept_out() -> None:
    machine = group("a", "b", "c", "d", bounds=Bounds(1, 6, 8))
    machine.feed(m.Starting("e"))
    assert machine.feed(Ready("e", "n", 1, "e:1")) == []  # 8 shards over 5 take two rounds, as over 4
    assert machine.state.phase == "running"


def test_scaling_down_releases_and_up_asks_for_more() -> None:
    machine = group("a", "b", "c", "d")
    actions = machine.feed(m.ScaleTo(2))
    assert actions[0] == m.Want(2) and kinds(actions[1:]) == ["RequestStop"] * 4
    for name in "abc":
        machine.stand(name, "stopped", 5)
    actions = machine.stand("d", "stopped", 5)
    assert only(actions, m.Form).generation.members == ("a", "b")
    assert [a.worker for a in actions if isinstance(a, m.Release)] == ["c", "d"]
    assert set(machine.state.ready) == {"a", "b"}
    assert machine.feed(m.ScaleTo(3)) == [m.Want(3)]
    assert machine.feed(m.ScaleTo(99)) == [m.Want(4)]
    assert machine.feed(m.ScaleTo(0)) == [m.Want(1), m.RequestStop("a", 2, STOP), m.RequestStop("b", 2, STOP)]


def test_spares_stand_beside_the_group_and_step_in() -> None:
    machine = group("a", "b", bounds=Bounds(1, 2, 8, spares=1))
    assert machine.done[0] == m.Want(3)
    machine.ready("c")
    assert machine.state.phase == "running" and machine.state.group == ("a", "b")
    machine.feed(m.Lost("a", "killed"))
    form = only(machine.stand("b", "broken", 3), m.Form)
    assert (form.generation.members, form.generation.healers) == (("b", "c"), ((0, (1,)),))


def test_surplus_beyond_the_spares_goes() -> None:
    machine = group("a", "b", "c", "d", bounds=Bounds(1, 4, 8, spares=1))
    machine.feed(m.ScaleTo(2))
    for name in "abc":
        machine.stand(name, "stopped", 5)
    actions = machine.stand("d", "stopped", 5)
    assert [a.worker for a in actions if isinstance(a, m.Release)] == ["d"]
    assert set(machine.state.ready) == {"a", "b", "c"}


# Drains.


def test_a_drained_node_s_workers_leave_and_are_replaced() -> None:
    machine = group("a", "b", "c")
    actions = machine.feed(m.Drain(("node-b",)))
    assert actions == [m.Want(5), *[m.RequestStop(w, 1, STOP) for w in "abc"]]
    machine.stand("a", "stopped", 5)
    machine.stand("b", "stopped", 5)
    actions = machine.stand("c", "stopped", 5)
    assert (only(actions, m.Release).worker, only(actions, m.Want)) == ("b", m.Want(4))
    form = only(actions, m.Form)
    assert (form.generation.members, form.cause) == (("a", "c"), "drain")


def test_a_drain_below_min_workers_waits_for_a_replacement() -> None:
    machine = group("a", "b", bounds=Bounds(2, 2, 8))
    assert machine.feed(m.Drain(("node-b",))) == [m.Want(3)]  # and the two train on
    assert kinds(machine.ready("c")) == ["RequestStop", "RequestStop"]
    machine.stand("a", "stopped", 5)
    assert only(machine.stand("b", "stopped", 5), m.Form).generation.members == ("a", "c")


def test_where_all_must_leave_the_state_is_saved_first() -> None:
    machine = group("a", "b", bounds=Bounds(1, 2, 8))
    assert machine.feed(m.Drain(("node-a", "node-b"))) == [m.Want(4)]
    assert machine.ready("c") == [m.RequestStop(w, 1, STOP_AND_SAVE) for w in "ab"]
    machine.stand("a", "stopped", 5, ballot=ballot(5, STOP_AND_SAVE))
    actions = machine.stand("b", "stopped", 5, ballot=ballot(5, STOP_AND_SAVE))
    form = only(actions, m.Form)
    assert (form.generation.members, form.generation.committed) == (("c",), -1)  # from the checkpoint just written
    assert {a.worker for a in actions if isinstance(a, m.Release)} == {"a", "b"}


def test_nobody_leaves_with_the_only_copy() -> None:
    machine = group("a", "b", bounds=Bounds(1, 2, 8))
    machine.feed(m.Drain(("node-a", "node-b")), m.Lost("a", "killed"))
    machine.feed(m.Starting("c"), Ready("c", "n", 1, "c:1"))
    actions = machine.stand("b", "broken", 5)
    form = only(actions, m.Form)
    assert (form.generation.members, form.generation.committed,
            form.generation.healers) == (("b", "c"), 5, ((0, (1,)),))
    # one step, for the state to be handed over
    assert actions[-2:] == [m.RequestStop("b", 2, STOP), m.RequestStop("c", 2, STOP)]
    machine.stand("b", "stopped", 6)
    actions = machine.stand("c", "stopped", 6)
    assert only(actions, m.Form).generation.members == ("c",) and only(actions, m.Release).worker == "b"


# Ends.


def test_done_when_all_are() -> None:
    machine = group("a", "b")
    assert machine.stand("a", "done", 10, state_sha256="x") == []
    finish = only(machine.stand("b", "done", 10, state_sha256="x"), m.Finish)
    assert (finish.status, finish.standing.state_sha256) == ("done", "x")
    assert machine.feed(m.Lost("a", "killed"), m.ScaleTo(1)) == []


def test_states_that_differ_fail_the_run() -> None:
    machine = group("a", "b")
    machine.stand("a", "done", 10, state_sha256="x")
    finish = only(machine.stand("b", "done", 10, state_sha256="y"), m.Finish)
    assert finish.status == "failed" and "states differ" in finish.error


def test_a_rank_0_that_falls_at_the_end_is_replaced_to_save() -> None:
    machine = group("a", "b")
    machine.stand("b", "done", 10, state_sha256="x")
    form = only(machine.feed(m.Lost("a", "killed")), m.Form)
    assert (form.generation.members, form.generation.committed) == (("b",), 10)
    assert only(machine.stand("b", "done", 10, state_sha256="x"), m.Finish).status == "done"


def test_interrupted_while_running() -> None:
    machine = group("a", "b")
    assert machine.feed(m.Interrupt()) == [m.RequestStop("a", 1, STOP_AND_SAVE), m.RequestStop("b", 1, STOP_AND_SAVE)]
    assert machine.feed(m.Interrupt()) == []
    machine.stand("a", "stopped", 5, ballot=ballot(5, STOP_AND_SAVE))
    assert only(machine.stand("b", "stopped", 5, ballot=ballot(5, STOP_AND_SAVE)), m.Finish).status == "interrupted"


def test_an_interrupt_ends_a_run_that_cannot_be_saved() -> None:
    """Each generation gets a step further, and what it says has another number."""
    machine = group("a", "b")
    machine.feed(m.Interrupt())
    found: list[Any] = []
    for step in range(5, 5 + MAX_UNSAVED + 1):
        assert machine.state.phase == "running" and "Finish" not in kinds(found)
        for worker in "ab":
            found = machine.stand(worker, "failed", step, ballot=ballot(step, STOP_AND_SAVE), error=f"step {step} is not there")
    assert only(found, m.Finish).status == "failed" and "interrupted" in found[-1].error and f"step {step}" in found[-1].error
    assert any(isinstance(action, m.SaveAlone) for action in found), "once more, without the group"


def test_interrupted_while_waiting() -> None:
    machine = Machine()
    assert only(machine.feed(m.Interrupt()), m.Finish).status == "interrupted"


def test_interrupted_while_stopping_for_a_resize_still_saves() -> None:
    machine = group("a", "b")
    machine.feed(m.ScaleTo(1), m.Interrupt())
    machine.stand("a", "stopped", 5, ballot=ballot(5, STOP))  # the vote had been taken before the interrupt came
    actions = machine.stand("b", "stopped", 5, ballot=ballot(5, STOP))
    assert only(actions, m.Form).generation.members == ("a",)
    assert only(actions, m.RequestStop) == m.RequestStop("a", 2, STOP_AND_SAVE)
    assert only(machine.stand("a", "stopped", 6, ballot=ballot(6, STOP_AND_SAVE)), m.Finish).status == "interrupted"


def test_interrupted_while_regrouping() -> None:
    machine = group("a", "b", "c")
    machine.feed(m.Lost("b", "killed"), m.Interrupt())
    machine.stand("a", "broken", 5)
    actions = machine.stand("c", "broken", 5)
    assert [a.worker for a in actions if isinstance(a, m.RequestStop)] == ["a", "c"]
    machine.feed(m.Lost("a", "killed"))  # the one who would have saved
    actions = machine.stand("c", "stopped", 6, ballot=ballot(6, STOP_AND_SAVE))
    assert only(actions, m.Form).generation.members == ("c",)
    assert only(machine.stand("c", "stopped", 7, ballot=ballot(7, STOP_AND_SAVE)), m.Finish).status == "interrupted"


def test_the_same_error_on_the_same_step_twice_is_poison() -> None:
    machine = group("a", "b")
    assert machine.stand("a", "failed", 5, error="ZeroDivisionError") == [m.Abort("b", 1)]
    assert kinds(machine.stand("b", "failed", 5, error="ZeroDivisionError")) == ["Form"]  # both at once is still once
    assert machine.stand("b", "failed", 5, error="ZeroDivisionError") == [m.Abort("a", 2)]
    assert machine.stand("a", "broken", 5) == [m.SaveAlone("b", 2, 5), m.Finish("failed", "ZeroDivisionError")]


@pytest.mark.parametrize(("first", "second"), [((5, "x"), (6, "x")), ((5, "x"), (5, "y"))])
def test_another_step_or_another_error_is_no_poison(first: tuple[int, str], second: tuple[int, str]) -> None:
    machine = group("a")
    assert kinds(machine.stand("a", "failed", first[0], error=first[1])) == ["Form"]
    assert kinds(machine.stand("a", "failed", second[0], error=second[1])) == ["Form"]


def test_an_error_inside_an_update_is_of_the_step_that_was_voted() -> None:
    machine = group("a", "b")
    for step, kind in ((5, "Form"), (9, "Form"), (9, "Finish")):
        machine.stand("a", "failed", -1, ballot=ballot(step), error="x")
        assert kinds(machine.stand("b", "broken", step)) == (["SaveAlone", "Finish"] if kind == "Finish" else [kind])


def test_a_fatal_error_fails_once_all_have_left_and_the_state_is_saved() -> None:
    machine = group("a", "b")
    assert machine.stand("a", "failed", 5, error="The loss is nan", fatal=True) == [m.Abort("b", 1)]
    assert machine.feed(m.GiveUp("another reason"), m.Interrupt()) == [], "the first reason is the one"
    assert machine.stand("b", "broken", 5) == [m.SaveAlone("a", 1, 5), m.Finish("failed", "The loss is nan")]


def test_giving_up_saves_what_there_is_and_ends_the_run() -> None:
    assert Machine().feed(m.GiveUp("no use")) == [m.Finish("failed", "no use")]
    machine = group("a", "b")
    machine.feed(m.GiveUp("no use"))
    assert machine.stand("b", "broken", 0) == [] and machine.feed(m.Lost("a", "killed")) == [m.Finish("failed", "no use")]
    machine = group("a", "b", bounds=Bounds(min_workers=2, max_workers=2, logical_shards=8))
    machine.feed(m.Lost("a", "killed"))
    machine.stand("b", "broken", 7)
    assert machine.feed(m.GiveUp("no use", "interrupted")) == [m.SaveAlone("b", 1, 7),
                                                               m.Finish("interrupted", "no use")]
