"""A state that moves from one mesh to another keeps every bit: parameters, optimizer slots, averages, on threads."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backends.reference.backend import framework
from elastic.boxes import Box
from elastic.checkpoint.manifest import Manifest
from elastic.errors import GroupBroken
from elastic.mesh import Coordinate, Mesh
from elastic.parallel.layout import Layout, Portion
from elastic.state.relayout import relay, whole_arrays
from elastic.state.state import State, parameter_of
from elastic.worker.saver import Saver
from nlp import gpt
from tests.support.threads import together

SETTINGS = SimpleNamespace(device="cpu", precision="float32", threads=1, compile=False)
MODEL = gpt.build({"layers": 3, "heads": 4, "width": 16, "context": 4, "bias": True}, {"vocab_size": 7})


def state_on(mesh: Mesh, coordinate: Coordinate, values: dict[str, np.ndarray] | None = None) -> State:
    """A coordinate's state, with these whole arrays in it."""
    portion = Portion(MODEL, Layout(MODEL, mesh), coordinate)
    state = State(framework.create(portion, SETTINGS), "adamw", ("h1.mlp.*",), ("*ln*",), True, portion)
    for name, view in state.views.items():
        box = state.box(name)
        view[...] = -1.0 if values is None else values[name] if box is None else values[name][
            tuple(slice(s, s + c) for s, c in zip(box.start, box.count))]
    state.committed = 5
    return state


def random_values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(kind)
            for name, (kind, shape) in state_on(Mesh(1), Coordinate()).specs().items()}


MESHES = {"t4": Mesh(1, 1, 4), "t2d2": Mesh(2, 1, 2), "p2t2": Mesh(1, 2, 2), "p4": Mesh(1, 4), "d4": Mesh(4),
          "p2d2": Mesh(2, 2)}


@pytest.mark.parametrize(("before", "after"),
                         [("t4", "t2d2"), ("t2d2", "t4"), ("p2t2", "d4"), ("d4", "p4"), ("p2d2", "p2t2"), ("p4", "t4")])
def test_every_array_arrives(before: str, after: str) -> None:
    old, new, values = MESHES[before], MESHES[after], random_values()
    holders = {rank: old.coordinate(rank) for rank in range(4)}

    def act(group: Any) -> dict[str, np.ndarray]:
        given = state_on(old, Coordinate(**{**vars(old.coordinate(group.rank)), "data": 0}), values)
        taken = state_on(new, Coordinate(**{**vars(new.coordinate(group.rank)), "data": 0}))
        relay(group, Layout(MODEL, old), holders, given, Layout(MODEL, new), taken, lambda number: nullcontext())
        replica = group.subgroup(new.replica(group.rank)) if new.replica_size > 1 else group
        return {name: np.array(array) for name, array in whole_arrays(taken, replica, lambda number: nullcontext())}

    for arrays in together(4, lambda rank, group: act(group)):
        assert arrays.keys() == values.keys()
        for name, array in arrays.items():
            assert array.tobytes() == values[name].tobytes(), name


def test_one_replica_is_enough_and_what_a_joiner_held_is_not_asked() -> None:
    """Of two replicas of tensor = 2 one is left, and two newcomers have nothing."""
    old, new, values = MESHES["t2d2"], MESHES["t4"], random_values()
    holders = {1: old.coordinate(1), 2: old.coordinate(2)}  # coordinate 1 of replica 0, coordinate 0 of replica 1

    def act(group: Any) -> dict[str, np.ndarray]:
        given = state_on(old, Coordinate(tensor=holders[group.rank].tensor), values) if group.rank in holders else None
        taken = state_on(new, Coordinate(tensor=group.rank))
        relay(group, Layout(MODEL, old), holders, given, Layout(MODEL, new), taken, lambda number: nullcontext())
        return {name: np.array(array) for name, array in whole_arrays(taken, group, lambda number: nullcontext())}

    for arrays in together(4, lambda rank, group: act(group)):
        assert all(array.tobytes() == values[name].tobytes() for name, array in arrays.items())


def test_a_state_that_is_cut_off_on_its_way_counts_for_nothing_and_the_one_it_comes_from_as_before() -> None:
    """One that was idle may have an older state on the coordinate that it is given again."""
    old, new, values = Mesh(1, 1, 2), Mesh(1, 2), random_values()

    def tell(number: int) -> Any:
        if number == 3:
            raise GroupBroken("lost rank 1")
        return nullcontext()

    def act(group: Any) -> tuple[int, int]:
        given, taken = state_on(old, Coordinate(tensor=group.rank),
                                values), state_on(new, Coordinate(pipeline=group.rank))
        with pytest.raises(GroupBroken):
            relay(group, Layout(MODEL, old), {0: old.coordinate(0), 1: old.coordinate(1)}, given, Layout(MODEL, new),
                  taken, tell)
        return given.committed, taken.committed

    assert together(2, lambda rank, group: act(group)) == [(5, -1), (5, -1)]


def test_a_worker_that_takes_another_coordinate_saves_under_that_coordinate_s_places() -> None:
    """Two coordinates of a tensor axis have boxes of the same sizes: memory that is ready for the one is not ready for
    the other."""
    saver, mesh = Saver("w0", "unused", Manifest(0, 0, 0, 0, ""), 1, lambda part: None), Mesh(1, 1, 4)
    for rank in (1, 2):
        state = state_on(mesh, Coordinate(tensor=rank))
        saver.prepare(state, rank, 4)
        saver.join()
        assert saver.image is not None
        places = {piece.name: (piece.start, piece.count) for piece in saver.image.pieces}
        box = state.box("h0.mlp.up.weight")
        assert box is not None and places["parameter/h0.mlp.up.weight"] == (box.start, box.count)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_checkpoint_s_ranges_find_their_places_in_a_part(rows: int) -> None:
    """`State.put`: any range of any box of a whole array, into the part that a coordinate holds."""
    values = random_values()
    state = state_on(Mesh(1, 1, 2), Coordinate(tensor=1))
    for name, whole in values.items():
        flat = np.ascontiguousarray(whole).reshape(-1)
        for low in range(0, len(flat), rows):
            state.put(name, Box.all(whole.shape), low, flat[low:low + rows])
    wanted = state_on(Mesh(1, 1, 2), Coordinate(tensor=1), values)
    for name, view in state.views.items():
        assert view.tobytes() == wanted.views[name].tobytes(), name


@pytest.mark.parametrize("holders", [1, 2])
def test_a_checkpoint_s_ranges_find_their_places_in_slots_that_are_shared_out(holders: int) -> None:
    """Out of a checkpoint of four parts into one of two, of which a worker holds some blocks alone: single runs of it,
    and what is none."""
    values, rows, saved = random_values(), 37, Layout(MODEL, Mesh(1, 1, 4))
    wanted = state_on(Mesh(1, 1, 2), Coordinate(tensor=1), values)

    def act(group: Any) -> dict[str, np.ndarray]:
        portion = Portion(MODEL, Layout(MODEL, Mesh(2, 1, 2)), Coordinate(tensor=1))
        state = State(framework.create(portion, SETTINGS), "adamw", ("h1.mlp.*",), ("*ln*",), True, portion,
                      holders=holders)
        state.own_as(group.rank, group.size)
        assert state.num_blocks >= 2 and state.holding.has_all == (holders == 2)
        for name, whole in values.items():
            for box in {saved.box(parameter_of(name), coordinate) for coordinate in saved.owners(parameter_of(name))}:
                flat = whole[box.slices].reshape(-1)
                for low in range(0, len(flat), rows):
                    state.put(name, box, low, flat[low:low + rows])
        return {name: np.array(state.local(name, group)) for name in sorted(state.specs())}

    for arrays in together(2, lambda rank, group: act(group)):
        assert arrays.keys() == wanted.specs().keys()
        assert all(array.tobytes() == wanted.views[name].tobytes() for name, array in arrays.items())
