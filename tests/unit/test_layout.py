"""Layouts: the oracle is a plain reassembly in NumPy, and all ways to cut a row of small numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from elastic.errors import RecipeError
from elastic.mesh import Coordinate, Mesh
from elastic.model.backend import Spec
from elastic.parallel.layout import Layout, balanced
from elastic.state.relayout import moves


class Model:
    """Two layers, an embedding tied to the head, and experts."""

    parameters = {
        "wte": Spec((7, 4), ("vocab", "d_model")), "h0.up": Spec((4, 8), ("d_model", "d_ff")),
        "h0.norm": Spec((4,), ("d_model",)),
        "h1.up": Spec((2, 4, 8), ("expert", "d_model", "d_ff")), "h1.gate": Spec((4, 2), ("d_model", "gates")),
        "head": Spec((4,), ("d_model",))}
    buffers: dict[str, Spec] = {}
    layout = {"vocab": "tensor", "d_ff": "tensor", "expert": "expert"}
    pieces = ("embed", "h0", "h1", "head")

    def names(self, piece: str) -> Sequence[str]:
        return [n for n in self.parameters if n.startswith(piece) or (piece in ("embed", "head") and n == "wte")]


MESHES = [Mesh(1), Mesh(2, 1, 2), Mesh(1, 2), Mesh(2, 2, 2), Mesh(1, 4), Mesh(1, 1, 4), Mesh(1, 1, 1, 2),
          Mesh(2, 2, 2, 2)]
VALUES = {name: np.random.default_rng(len(name)).standard_normal(spec.shape) for name, spec in Model.parameters.items()}


def part(layout: Layout, name: str, coordinate: Coordinate) -> np.ndarray:
    box = layout.box(name, coordinate)
    return VALUES[name][tuple(slice(s, s + c) for s, c in zip(box.start, box.count))]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_rank_has_one_coordinate_and_lines_meet_in_it(mesh: Mesh) -> None:
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    assert len(set(coordinates)) == mesh.world_size and [mesh.rank(coordinate)
                                                         for coordinate in coordinates] == list(range(mesh.world_size))
    for rank in range(mesh.world_size):
        for axis in ("data", "pipeline", "tensor", "expert"):
            line = mesh.axis_ranks(rank, axis)
            assert len(line) == getattr(mesh, axis) and rank == line[getattr(mesh.coordinate(rank), axis)]
        assert {mesh.coordinate(r).data for r in mesh.replica(rank)} == {mesh.coordinate(rank).data} and len(mesh.replica(rank)) == mesh.replica_size


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_owners_parts_are_the_whole_array_once(mesh: Mesh) -> None:
    layout = Layout(Model(), mesh)
    for name, whole in VALUES.items():
        out, hits = np.full(whole.shape, np.nan), np.zeros(whole.shape, int)
        for coordinate in layout.owners(name):
            box = layout.box(name, coordinate)
            inside = tuple(slice(s, s + c) for s, c in zip(box.start, box.count))
            out[inside] = part(layout, name, coordinate)
            hits[inside] += 1
            assert name in layout.held(coordinate.pipeline)
        assert (out == whole).all() and (hits == 1).all()
    for rank in range(mesh.world_size):
        coordinate = mesh.coordinate(rank)
        assert {name: spec.shape for name, spec in layout.specs(coordinate).items()} == {
            name: part(layout, name, coordinate).shape for name in layout.held(coordinate.pipeline)}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_who_shares_a_gradient(mesh: Mesh) -> None:
    """A tied parameter is summed over its stages, and what all experts' workers hold over them."""
    layout = Layout(Model(), mesh)
    for rank in range(mesh.replica_size):
        coordinate = mesh.coordinate(rank)
        shared = {name: one.coordinates for one in layout.shared(coordinate) for name in one.names}
        for name in layout.held(coordinate.pipeline):
            stages = {p for p in range(mesh.pipeline) if name in layout.held(p)}
            expected = len(stages) * (1 if name == "h1.up" else mesh.expert)
            assert len(shared.get(name, (coordinate,))) == expected
            assert coordinate in shared.get(name, (coordinate,)) and {s.tensor
                                                                      for s in shared.get(name, (coordinate,))} == {coordinate.tensor}


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations([Mesh(1, 1, 4), Mesh(2, 1, 2), Mesh(1, 4), Mesh(4),
                                                                      Mesh(2, 2)], 2)), ids=str)
def test_moves_carry_every_part_from_any_mesh_to_any_other(old: Mesh, new: Mesh) -> None:
    before, after = Layout(Model(), old), Layout(Model(), new)
    holders = {rank: old.coordinate(rank) for rank in range(old.world_size)}
    for name, whole in VALUES.items():
        outs = {rank: np.full(after.box(name, new.coordinate(rank)).count, np.nan)
                for rank in range(new.world_size) if name in after.held(new.coordinate(rank).pipeline)}
        for move in moves(name, before, holders, after):
            source, target = before.box(name, holders[move.source]), after.box(name, new.coordinate(move.to))
            given = part(before, name, holders[move.source])[tuple(
                slice(s - b, s - b + c) for s, b, c in zip(move.box.start, source.start, move.box.count))]
            outs[move.to][tuple(slice(s - b, s - b + c)
                                for s, b, c in zip(move.box.start, target.start, move.box.count))] = given
        for rank, out in outs.items():
            assert (out == part(after, name, new.coordinate(rank))).all()
        assert whole.shape == before.box(name, Coordinate()).shape


def test_a_part_that_nobody_holds_is_no_plan() -> None:
    old = Mesh(1, 1, 2)
    with pytest.raises(ValueError, match="of wte the members hold 16 of the 28 elements"):
        moves("wte", Layout(Model(), old), {0: old.coordinate(0)}, Layout(Model(), Mesh(1)))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_stages_are_balanced_as_well_as_any_cut_can(parts: int) -> None:
    random = np.random.default_rng(parts)
    for _ in range(20):
        weights = random.integers(1, 9, 7).tolist()
        found = balanced(weights, parts)
        assert [low for low, _ in found] == [0, *(high for _, high in found[:-1])] and found[-1][1] == len(weights)
        heaviest = max(sum(weights[low:high]) for low, high in found)
        cuts = itertools.combinations(range(1, len(weights)), parts - 1)
        assert heaviest == min(max(sum(weights[a:b]) for a, b in zip((0, *cut), (*cut, len(weights)))) for cut in cuts)


class Plain:
    parameters = {"w": Spec((4, 4), ("a", "b"))}
    buffers: dict[str, Spec] = {}


@pytest.mark.parametrize(("pipeline", "chunks", "remedy"),
                         [(5, 1, "mesh.pipeline = 4 or less"), (3, 2, "mesh.pipeline = 2 or less"),
                                                            (2, 3, "fewer mesh.chunks, or another mesh.schedule")])
def test_the_remedy_for_too_many_stages_works(pipeline: int, chunks: int, remedy: str) -> None:
    with pytest.raises(RecipeError, match=f"write {remedy}"):
        Layout(Model(), Mesh(1, pipeline), num_chunks=chunks)


@pytest.mark.parametrize(("model", "mesh", "dims", "sentence"), [
    (Model, Mesh(1, 1, 3), None, "mesh.tensor = 3 does not divide d_ff = 8 of h0.up; write one of 1, 2, 4, 8."),
    (Model, Mesh(1, 1, 1, 3), None, "mesh.expert = 3 does not divide expert = 2 of h1.up; write one of 1, 2."),
    (Model, Mesh(1, 5), None, "mesh.pipeline = 5 needs 5 pieces, and the model has 4"),
    (Plain, Mesh(1, 2), None, "mesh.pipeline = 2 needs a model in pieces with named dims, which this model.kind is "
                              "not; write mesh.pipeline = 1"),
    (Plain, Mesh(1, 1, 2), None, "mesh.tensor = 2 needs a model in pieces with named dims"),
    (Model, Mesh(1, 1, 8), None, "mesh.tensor = 8 is more than vocab = 7 of wte; write mesh.tensor = 7 or less."),
    (Model, Mesh(1, 1, 2), {"d_fff": "tensor"},
     'mesh.layout.d_fff = "tensor" is no split that the model can make; write some of vocab = "tensor", '
                                                'd_ff = "tensor", expert = "expert".'),
    (Model, Mesh(1, 1, 2), {"d_model": "tensor"}, 'mesh.layout.d_model = "tensor" is no split'),
    (Model, Mesh(1, 1, 1, 2), {"d_ff": "expert"}, 'mesh.layout.d_ff = "expert" is no split'),
    (Plain, Mesh(1), {"a": "tensor"}, 'mesh.layout.a = "tensor" is no split that the model can make; leave mesh.layout '
                                      'out: it can split nothing.'),
    (Model, Mesh(1, 1, 2), {"expert": "expert"},
     "mesh.tensor = 2 splits nothing: no dim of the model is laid out on it; write mesh.tensor = 1."),
])
def test_what_does_not_fit_is_one_sentence(model: Any, mesh: Mesh, dims: Any, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Layout(model(), mesh, dims)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
