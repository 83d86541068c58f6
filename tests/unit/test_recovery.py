"""Groups whose replicas are several workers: who sits where, who gives its state to whom, and what it takes to go on."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.controller import membership as m
from elastic.controller.policy import Bounds, choose, fewest, legal, world_size
from elastic.controller.recovery import find_whole, rejoin
from elastic.controller.seating import assign, gaps
from elastic.messages import STOP, STOP_AND_SAVE, Holder, Standing, shape
from tests.support.machine import PAIRS, ballot, formed, kinds, only, running, stand

FALLBACK = Bounds(1, 4, 8, meshes=((1, 2, 1), (1, 1, 1)))


# Which mesh.


@pytest.mark.parametrize(("available", "mesh"),
                         [(0, None), (1, None), (2, (1, 1, 2, 1)), (3, (1, 1, 2, 1)), (4, (2, 1, 2, 1)),
                          (9, (2, 1, 2, 1))])
def test_whole_replicas_only(available: int, mesh: Any) -> None:
    assert choose(available, 9, PAIRS) == mesh


def test_a_broken_replica_falls_back_to_what_fits() -> None:
    assert [choose(n, 4, FALLBACK) for n in range(5)] == [None, (1, 1, 1, 1), (1, 1, 2, 1), (1, 1, 2, 1), (2, 1, 2, 1)]
    assert choose(1, 4, Bounds(2, 4, 8, meshes=FALLBACK.meshes)) is None, "min_workers of a replica forbid it"
    assert fewest(FALLBACK) == 1 and fewest(PAIRS) == 2 and fewest(Bounds(3, 8, 8, meshes=((1, 2, 1),))) == 4


def test_no_replica_that_would_not_lower_the_rounds() -> None:
    bounds = Bounds(2, 20, 8, meshes=((1, 2, 1),))
    assert [world_size(n, 20, bounds) // 2 for n in range(0, 21, 2)] == [0, 1, 2, 3, 4, 4, 4, 4, 8, 8, 8]


def test_legal_meshes_begin_with_the_recipe_s() -> None:
    assert legal((2, 2, 1)) == ((2, 2, 1), (2, 1, 1), (1, 2, 1), (1, 1, 1))
    assert legal((1, 1, 1)) == ((1, 1, 1),)
    assert legal((1, 4, 1)) == ((1, 4, 1), (1, 2, 1), (1, 1, 1))


# Losses.


def test_a_lost_member_breaks_its_replica_and_the_other_stays_warm() -> None:
    machine = running("a", "b", "c", "d")
    assert machine.state.mesh == (2, 1, 2, 1)
    machine.feed(m.Lost("b", "killed"))
    stand(machine, "a", 9)
    stand(machine, "c", 9)
    actions = stand(machine, "d", 9)
    generation = formed(actions)
    assert (generation.members, generation.mesh, generation.committed) == (("a", "d"), (1, 1, 2, 1), 9)
    assert generation.healers == () and generation.resharded == (), "one of each coordinate is left"
    assert kinds(actions) == ["Form"] and set(machine.state.ready) == {"a", "c",
                                                                       "d"}, "four are wanted: nobody is let go"
    actions = machine.ready("e")
    assert kinds(actions) == ["RequestStop"] * 2
    stand(machine, "a", 12, "stopped")
    generation = formed(stand(machine, "d", 12, "stopped"))
    assert (generation.members, generation.mesh) == (("a", "d", "c", "e"), (2, 1, 2, 1))
    assert generation.healers == ((0, (2,)), (1, (3,)))


def test_only_a_holder_of_the_same_coordinate_heals() -> None:
    machine = running("a", "b", "c", "d")
    machine.ready("x")
    machine.feed(m.Lost("c", "killed"))  # it held what `a` holds
    stand(machine, "a", 9, ballot=ballot(9))
    stand(machine, "b", 8, holds=9)
    generation = formed(stand(machine, "d", -1, ballot=ballot(9)))  # torn in its update
    assert (generation.members, generation.committed, generation.ballot) == (("a", "b", "d", "x"), 9, ballot(9))
    assert generation.healers == ((0, (2,)), (1, (3,)))


def test_all_copies_of_a_part_are_lost_and_the_checkpoint_is_all_there_is() -> None:
    machine = running("a", "b", "c", "d")
    machine.feed(m.Lost("b", "killed"), m.Lost("d", "killed"))
    stand(machine, "a", 9)
    generation = formed(stand(machine, "c", 9))
    assert (generation.committed, generation.healers, generation.resharded) == (-1, (), ())


def test_a_spare_s_state_counts_while_nobody_has_gone_on() -> None:
    machine = running("a", "b", "c", "d")
    machine.feed(m.Lost("d", "killed"))
    for name in "abc":
        actions = stand(machine, name, 9)
    assert formed(actions).members == ("a", "b") and "c" in machine.state.ready
    machine.feed(m.Lost("a", "killed"))  # before another step
    generation = formed(stand(machine, "b", 9))
    assert (generation.members, generation.committed, generation.healers) == (("c", "b"), 9, ())
    machine.ready("e", "f")
    stand(machine, "c", 11, "stopped")
    assert formed(stand(machine, "b", 11, "stopped")).members[:2] == ("c", "b")


def test_a_spare_s_state_does_not_count_after_a_step() -> None:
    machine = running("a", "b", "c", "d")
    machine.feed(m.Lost("d", "killed"))
    for name in "abc":
        stand(machine, name, 9)
    machine.feed(m.Lost("a", "killed"))
    assert formed(stand(machine, "b", 10)).committed == -1


def test_a_spare_of_a_past_that_is_given_up_counts_no_more() -> None:
    machine = running("a", "b", "c", "d", "e", "f", bounds=Bounds(2, 6, 6, meshes=((1, 2, 1),)))
    machine.feed(*[m.Lost(w, "killed") for w in "bdf"])
    stand(machine, "a", 9)
    stand(machine, "c", 9)
    generation = formed(stand(machine, "e", 9))
    assert (generation.members, generation.committed) == (("a", "c"), -1) and "e" in machine.state.ready
    machine.feed(m.Lost("a", "killed"))  # when step 9 was reached anew
    assert formed(stand(machine, "c", 9)).committed == -1, "what e has of coordinate 0 is of another step 9"


def test_who_has_no_coordinate_has_no_state() -> None:
    machine = running("a", "b")
    stand(machine, "a", 9)
    assert formed(stand(machine, "b", 9, coordinate=-1)).committed == -1


def test_who_moves_to_another_coordinate_is_healed_there() -> None:
    machine = running("a", "b", "c", "d", "e", "f", bounds=Bounds(2, 6, 6, meshes=((1, 2, 1),)))
    machine.feed(m.Lost("d", "killed"), m.Lost("f", "killed"))
    for name in "ac":
        stand(machine, name, 9)
    stand(machine, "b", 9)
    generation = formed(stand(machine, "e", 9))
    assert (generation.members, generation.healers) == (("a", "b", "c", "e"), ((1, (3,)),)), "e held what a and c hold"


# Another mesh.


def test_a_replica_that_cannot_be_filled_gives_way_to_smaller_ones_from_the_checkpoint() -> None:
    machine = running("a", "b", bounds=FALLBACK)
    machine.feed(m.Lost("b", "killed"))
    generation = formed(stand(machine, "a", 9))
    assert (generation.members, generation.mesh,
            generation.committed) == (("a",), (1, 1, 1, 1), -1), "half of the model is gone"


def test_back_on_the_preferred_mesh_the_state_is_laid_anew() -> None:
    machine = running("a", bounds=FALLBACK)
    assert machine.state.mesh == (1, 1, 1, 1)
    assert kinds(machine.ready("b")) == ["RequestStop"]
    generation = formed(stand(machine, "a", 7, "stopped"))
    assert (generation.members, generation.mesh, generation.committed) == (("a", "b"), (1, 1, 2, 1), 7)
    assert generation.resharded == (Holder(0, (0, 1, 1, 1), 0),
                                    Holder(1, (0, 1, 1, 1), -1)) and generation.healers == ()


def test_scaling_to_another_mesh_moves_the_state() -> None:
    machine = running("a", "b", "c", "d", bounds=Bounds(1, 4, 8, meshes=legal((2, 2, 1))))
    assert machine.state.mesh == (1, 2, 2, 1)
    actions = machine.feed(m.ScaleTo(4, (1, 2, 1)))
    assert actions[1:] == [m.RequestStop(w, 1, STOP) for w in "abcd"]
    for name in "abc":
        stand(machine, name, 5, "stopped")
    generation = formed(stand(machine, "d", 5, "stopped"))
    assert generation.shape == shape((2, 1, 2, 1)) and [h.coordinate for h in generation.resharded] == [0, 1, 2, 3]
    assert {h.mesh for h in generation.resharded} == {(0, 2, 2, 1)}


def test_a_mesh_too_small_for_all_parts_waits_for_a_checkpoint() -> None:
    machine = running("a", "b", bounds=FALLBACK)
    assert machine.feed(m.ScaleTo(1))[1:] == [m.RequestStop(w, 1, STOP_AND_SAVE) for w in "ab"]
    saved = {"ballot": ballot(5, STOP_AND_SAVE)}
    stand(machine, "a", 5, "stopped", **saved)
    generation = formed(stand(machine, "b", 5, "stopped", **saved))
    assert (generation.members, generation.mesh, generation.committed) == (("a",), (1, 1, 1, 1), -1)


def test_a_break_before_that_checkpoint_loses_nothing() -> None:
    machine = running("a", "b", bounds=FALLBACK)
    machine.feed(m.ScaleTo(1))
    stand(machine, "a", 5)
    actions = stand(machine, "b", 5)
    assert (formed(actions).members, formed(actions).committed) == (("a", "b"),
                                                                    5), "for another step, to save what both have"
    assert actions[-2:] == [m.RequestStop(w, 2, STOP_AND_SAVE) for w in "ab"]


def test_a_move_that_broke_starts_from_where_the_state_is_whole() -> None:
    old, new = {"mesh": (0, 1, 1, 1), "coordinate": 0}, {"mesh": (1, 1, 2, 1), "coordinate": 1}
    words = {"a": Standing("a", 3, "broken", 7, **old), "b": Standing("b", 3, "broken", 7, **new)}
    whole = find_whole(words, "ab", (1, 2, 1))
    assert whole and whole.degrees == (1, 1, 1)
    generation = rejoin(4, ("a", "b"), "", (1, 1, 2, 1), whole)
    assert [h.coordinate for h in generation.resharded] == [0, -1]
    words["c"] = Standing("c", 3, "broken", 7, **{**new, "coordinate": 0})
    words |= {name: Standing(name, 3, "broken", 7, **old) for name in "de"}
    whole = find_whole(words, "abcde", (1, 2, 1))
    assert whole and whole.degrees == (1, 2, 1), "the preferred mesh's, where both are whole"


# Too few.


def test_one_of_each_coordinate_saves_what_it_has() -> None:
    machine = running("a", "b", "c", "d", bounds=Bounds(4, 4, 8, meshes=((1, 2, 1),)))
    machine.feed(m.Lost("c", "killed"))
    stand(machine, "a", 9)
    stand(machine, "b", 9)
    actions = stand(machine, "d", 9)
    assert actions == [m.Wait(3, 4), m.SaveAlone("a", 1, 9, 0, 2), m.SaveAlone("b", 1, 9, 1, 2)]
    assert machine.feed(m.Lost("d", "killed")) == [m.Wait(2, 4)], "they have been asked"


def test_nobody_saves_half_a_model() -> None:
    machine = running("a", "b")
    machine.feed(m.Lost("b", "killed"))
    assert stand(machine, "a", 9) == [m.Wait(1, 2)]


# Ends.


def test_replicas_that_differ_fail_the_run() -> None:
    machine = running("a", "b")
    stand(machine, "a", 9, "done", state_sha256="x")
    assert only(stand(machine, "b", 9, "done", state_sha256="y"), m.Finish).status == "failed"


# Who sits where.


def test_a_tensor_group_sits_on_one_node() -> None:
    nodes = {"a": "n1", "b": "n2", "c": "n1", "d": "n2"}
    members = assign("abcd", (2, 1, 2, 1), None, nodes)
    assert members == ("a", "c", "b", "d")
    assert assign("abcd", (1, 2, 2, 1), None, nodes) == ("a", "c", "b", "d")
    assert assign("abcd", (4, 1, 1, 1), None, nodes) == tuple("abcd"), "where nobody shares a replica, the order stays"


def test_a_replacement_comes_from_the_node_of_its_tensor_group() -> None:
    nodes = {"a": "n1", "b": "n1", "c": "n2", "x": "n1", "y": "n2"}
    words = {w: Standing(w, 1, "broken", 9, mesh=(2, 1, 2, 1), coordinate=s)
             for w, s in {"a": 0, "b": 1, "c": 0}.items()}
    assert assign("abcxy", (2, 1, 2, 1), find_whole(words, "abc", (1, 2, 1)), nodes) == ("a", "b", "c", "y")


def test_members_on_one_node_are_put_beside_each_other() -> None:
    nodes = {"a": "n1", "b": "n2", "c": "n2", "d": "n1"}
    words = {w: Standing(w, 1, "broken", 9, mesh=(2, 1, 2, 1), coordinate=i % 2) for i, w in enumerate("abcd")}
    assert assign("abcd", (2, 1, 2, 1), find_whole(words, "abcd", (1, 2, 1)), nodes) == ("a", "d", "c", "b")


@pytest.mark.parametrize(("nodes", "tensor", "found"), [
    (["n1", "n2", "n2"], 2, ("n1",)), (["n1", "n1", "n2", "n2"], 2, ()),
    (["n1"] * 3 + ["n2"] * 2, 4, ("n1", "n2", "n2")),
    (["n1", "n2", "n3"], 1, ()), ([""], 2, ()), ([], 2, ()),
])
def test_a_replacement_is_looked_for_where_a_tensor_group_lacks_one(nodes: list[str], tensor: int,
                                                                    found: tuple[str, ...]) -> None:
    assert gaps(nodes, tensor) == found
