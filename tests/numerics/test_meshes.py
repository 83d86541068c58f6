"""Runs on a mesh, in one process: bits depend on the tensor and pipeline degrees alone, and nothing is lost when a worker of a replica falls."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.mesh import Mesh
from elastic.recipe import Recipe
from tests.support.crew import train_on
from tests.support.frameworks import load, names
from tests.support.inprocess import Result, fit, gpt_recipe
from tests.support.sampling import sample

torch = pytest.importorskip("torch", reason="torch is not installed")

STEPS = 16
PHASES = ("forward", "backward", "reduction", "vote", "update")


def recipe(text: Path, degrees: Mapping[str, Any], steps: int = STEPS, **changes: Mapping[str, Any]) -> Recipe:
    return gpt_recipe(text, steps, **{"model": {"layers": 2, "heads": 4}, "mesh": degrees,
                                      "optimizer": {"clip_norm": 0.5}, **changes})


DEGREES = [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "tensor": 2, "micro_batches": 2}, {"pipeline": 4},
           {"tensor": 4}]


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_one_hash_for_each_degree_along_the_data_axis(degrees: dict[str, int], text: Path) -> None:
    given = recipe(text, degrees, 5, elastic={"max_workers": 8})
    mesh = given.mesh
    found = [train_on(given, Mesh(data, mesh.pipeline, mesh.tensor)) for data in (1, 2)]
    assert len(found[0].hashes | found[1].hashes) == 1
    assert found[0].losses == found[1].losses
    whole = train_on(recipe(text, {"micro_batches": mesh.micro_batches}, 5), Mesh(1))
    np.testing.assert_allclose(found[0].losses, whole.losses, rtol=1e-5)
    assert found[0].hashes != whole.hashes  # so that the hash can tell


@pytest.mark.parametrize(("name", "degrees"), sample(list(product(names("reference"), DEGREES[:3])), 3), ids=str)
def test_on_every_framework(name: str, degrees: dict[str, int], text: Path) -> None:
    """As above, and in the losses what one worker has."""
    load(name, "ops")
    given = recipe(text, degrees, 3, backend={"name": name}, elastic={"max_workers": 8})
    found = [train_on(given, Mesh(data, given.mesh.pipeline, given.mesh.tensor)) for data in (1, 2)]
    assert len(found[0].hashes | found[1].hashes) == 1
    whole = train_on(recipe(text, {"micro_batches": given.mesh.micro_batches}, 3, backend={"name": name}), Mesh(1))
    np.testing.assert_allclose(found[0].losses, whole.losses, rtol=1e-5)
    assert found[0].evaluations == found[1].evaluations
    for parameter, gradient in whole.first_gradient.items():
        np.testing.assert_allclose(found[1].first_gradient[parameter], gradient, rtol=1e-3,
                                   atol=1e-4 * np.abs(gradient).max())


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])
def test_every_schedule_gives_the_same_bits(schedule: str, text: Path) -> None:
    hashes = [train_on(recipe(text, {"pipeline": 2, "micro_batches": 2, "schedule": name}, 4), Mesh(1, 2)).hashes
              for name in ("1f1b", schedule)]
    assert hashes[0] == hashes[1]


def test_an_interleaved_schedule_trains_as_one_worker_does(text: Path) -> None:
    given = {"pipeline": 2, "micro_batches": 2, "schedule": "interleaved"}
    found = [train_on(recipe(text, given, 4, elastic={"max_workers": 4}), Mesh(data, 2)) for data in (1, 2)]
    assert found[0].hashes == found[1].hashes
    np.testing.assert_allclose(found[0].losses, train_on(recipe(text, {"micro_batches": 2}, 4), Mesh(1)).losses,
                               rtol=1e-5)


@pytest.mark.parametrize("degrees", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_a_sharded_optimizer_on_a_mesh_changes_no_bit(degrees: dict[str, int], text: Path) -> None:
    given = {"elastic": {"max_workers": 8}}
    mesh = Mesh(2, **degrees)
    whole = train_on(recipe(text, degrees, 4, **given), mesh)
    for data in (1, 2, 3):
        found = train_on(recipe(text, degrees, 4, **given, optimizer={"clip_norm": 0.5, "sharded": True}),
                         Mesh(data, **degrees))
        assert found.hashes == whole.hashes and found.losses == whole.losses


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """One replica of each kind, and nothing happens."""
    found = {}
    for axis in ("tensor", "pipeline"):
        result = fit(tmp_path_factory.mktemp(axis) / "run",
                     recipe(text, {axis: 2}, elastic={"max_workers": 2, "min_workers": 2}))
        result.assert_sound(STEPS)
        assert result.summary["recoveries"] == 0
        found[axis] = result
    return found


def meshes(result: Result) -> list[tuple[int, int, int]]:
    return [(e["mesh"]["data"], e["mesh"]["pipeline"], e["mesh"]["tensor"]) for e in result.named("generation_started")]


@pytest.mark.parametrize(("axis", "phase", "rank"), sample(list(product(("tensor", "pipeline"), PHASES, (0, 3))), 3))
def test_a_worker_of_a_replica_is_killed(axis: str, phase: str, rank: int, text: Path, undisturbed: dict[str, Result],
                                         tmp_path: Path) -> None:
    """Two replicas of two: one is broken, the other goes on alone until a worker has joined; no step is lost and no bit
    is another.

    With a pipeline, a kill in the reduction or the vote finds the other stage's gradients reduced: no stage may be a
    step ahead.
    """
    result = fit(tmp_path / "run", recipe(text, {axis: 2}, elastic={"max_workers": 4, "min_workers": 2}),
                 [f"kill:{rank}@6/{phase}"])
    result.assert_sound(STEPS)
    assert result.sha == undisturbed[axis].sha
    assert [m["loss"] for m in result.metrics if "loss" in m] == [m["loss"] for m in undisturbed[axis].metrics
                                                                  if "loss" in m]
    assert len(result.named("worker_lost")) == 1
    assert meshes(result)[0][0] == 2 and not result.named("rewound") and not result.named("loaded")


def resize(capacity: int) -> Any:
    return lambda run: run.fleet.grow(capacity)


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_it_goes_on_with_one_replica_and_comes_back_when_a_worker_joins(axis: str, text: Path, undisturbed: dict[str, Result],
                                                                        tmp_path: Path) -> None:
    hooks = {2: resize(3), 8: resize(4)}
    result = fit(tmp_path / "run", recipe(text, {axis: 2}, elastic={"max_workers": 4, "min_workers": 2}),
                 ["kill:1@4/backward"], hooks=hooks)
    result.assert_sound(STEPS)
    assert result.sha == undisturbed[axis].sha
    assert [data for data, _, _ in meshes(result)] == [2, 1, 2]
    assert {mesh[1:] for mesh in meshes(result)} == {(1, 2) if axis == "tensor" else (2, 1)}
    pids = [{worker["worker"] for worker in e["workers"]} for e in result.named("generation_started")]
    # the healthy half of the broken replica stayed warm, and serves again
    assert pids[1] < pids[0] and len(pids[2] & pids[0]) == 3


def test_a_replica_is_put_together_from_the_halves_of_two(text: Path, undisturbed: dict[str, Result],
                                                          tmp_path: Path) -> None:
    """Coordinate 0 of one replica and coordinate 1 of the other fall: what is left is a whole model."""
    chaos = ["kill:0@5/forward", "kill:3@5/forward"]
    given = recipe(text, {"tensor": 2}, elastic={"max_workers": 4, "min_workers": 2})
    result = fit(tmp_path / "run", given, chaos, hooks={2: resize(2), 9: resize(4)})
    result.assert_sound(STEPS)
    assert result.sha == undisturbed["tensor"].sha and not result.named("loaded")


def test_where_no_copy_of_a_part_is_left_the_checkpoint_has_it(text: Path, undisturbed: dict[str, Result],
                                                               tmp_path: Path) -> None:
    chaos = ["kill:0@11/forward", "kill:2@11/forward"]
    result = fit(tmp_path / "run", recipe(text, {"tensor": 2}, elastic={"max_workers": 4, "min_workers": 2}), chaos)
    assert result.outcome.status == "done" and result.sha == undisturbed["tensor"].sha
    assert len(result.named("rewound")) == 1 and len(result.named("loaded")) == 1


def test_a_live_run_changes_its_mesh(text: Path, tmp_path: Path) -> None:
    """tensor = 4 becomes tensor = 2 with two replicas: nothing is lost, and the state that moved is the one that was
    there."""
    given = recipe(text, {"tensor": 4}, elastic={"max_workers": 4, "min_workers": 4},
                   checkpoint={"every_steps": 1, "keep": 20})
    result = fit(tmp_path / "run", given, hooks={6: lambda run: run.scale_mesh(4, (1, 2, 1))})
    result.assert_sound(STEPS)
    assert meshes(result) == [(1, 1, 4), (2, 1, 2)]
    (moved,) = result.named("relaid")
    assert moved["from"]["tensor"] == 4 and moved["to"]["tensor"] == 2
    whole = train_on(recipe(text, {}), Mesh(1))
    losses = [m["loss"] for m in result.metrics if "loss" in m]
    np.testing.assert_allclose(losses, whole.losses, rtol=2e-5)


def test_fewer_workers_than_a_replica_go_on_with_a_smaller_one(text: Path, tmp_path: Path) -> None:
    given = recipe(text, {"pipeline": 4}, elastic={"max_workers": 4, "min_workers": 1})
    result = fit(tmp_path / "run", given, ["kill:2@10/forward"], hooks={3: resize(3), 13: resize(4)})
    assert result.outcome.status == "done", result.outcome.error
    assert [mesh[1] for mesh in meshes(result)] == [4, 2, 4]
    assert len(result.named("rewound")) == 1  # a stage was gone with its worker
    losses = [m["loss"] for m in result.metrics if "loss" in m]
    np.testing.assert_allclose(losses, train_on(recipe(text, {}), Mesh(1)).losses, rtol=2e-5)


def test_a_kill_on_a_mesh_with_a_sharded_optimizer(text: Path, undisturbed: dict[str, Result], tmp_path: Path) -> None:
    """Coordinates have twins along the data axis: of three replicas, one is broken after its vote and before its
    parameters have gone out."""
    given = recipe(text, {"tensor": 2}, elastic={"max_workers": 6, "min_workers": 2},
                   optimizer={"clip_norm": 0.5, "sharded": True})
    result = fit(tmp_path / "run", given, ["kill:2@6/gather"])
    result.assert_sound(STEPS)
    assert result.sha == undisturbed["tensor"].sha
    assert result.named("twin_used") and not result.named("rewound")
