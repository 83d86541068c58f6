"""Replicas of several processes on a real Ray: tensor groups and pipelines over shared memory, broken and put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic.trainer import Result, Trainer, scale
from tests.support.frameworks import load
from tests.support.inprocess import fit
from tests.support.runs import assert_sound, assert_survivors_kept, events, recipe, steps, train

pytestmark = pytest.mark.usefixtures("cluster")

STEPS = 60
TENSOR, PIPELINE = {"tensor": 2}, {"pipeline": 2, "micro_batches": 2}


def run(folder: Path, workers: int, mesh: dict[str, Any], chaos: list[str] | None = None, least: int = 2) -> Result:
    return train(folder / "run", workers, chaos or [], run={"name": "mesh", "steps": STEPS, "eval_every": 30}, mesh=mesh,
                 elastic={"max_workers": workers, "min_workers": least})


@pytest.fixture(scope="module")
def bits(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The state of one replica of each kind that nobody disturbs."""
    found = {}
    for name, mesh in (("tensor", TENSOR), ("pipeline", PIPELINE)):
        result = run(tmp_path_factory.mktemp(name), 2, mesh)
        assert result.status == "done", result.error
        assert result.summary["recoveries"] == 0
        found[name] = result.summary["state_sha256"]
    return found


def meshes(result: Result) -> list[tuple[int, int, int]]:
    return [(e["mesh"]["data"], e["mesh"]["pipeline"], e["mesh"]["tensor"]) for e in events(result, "generation_started")]


@pytest.mark.parametrize(("name", "mesh", "fault"), [("tensor", TENSOR, "kill:1@20/forward"), ("tensor", TENSOR, "kill:2@20/reduction"),
                                                     ("pipeline", PIPELINE, "kill:1@20/backward"), ("pipeline", PIPELINE, "kill:0@20/vote")])
def test_a_broken_replica_costs_no_step(name: str, mesh: dict[str, Any], fault: str, bits: dict[str, str], tmp_path: Path) -> None:
    """It goes on with the other one, and with two again when a worker has come."""
    result = run(tmp_path, 4, mesh, [fault])
    assert_sound(result, bits[name], STEPS)
    assert_survivors_kept(result)
    assert meshes(result)[0][0] == 2 and (1, *meshes(result)[0][1:]) in meshes(result)
    assert len(events(result, "worker_lost")) == 1 and not events(result, "rewound")


def test_a_hung_worker_of_a_pipeline_is_found(bits: dict[str, str], tmp_path: Path) -> None:
    """Its peers wait in messages and collectives inside the model."""
    result = train(tmp_path / "run", 4, ["stop:1@20"], run={"name": "mesh", "steps": STEPS, "eval_every": 30}, mesh=PIPELINE,
                   elastic={"max_workers": 4, "min_workers": 2, "hang_timeout_s": 2.0})
    assert_sound(result, bits["pipeline"], STEPS)
    assert [e["rank"] for e in events(result, "worker_lost")] == [1]


def test_a_live_run_is_laid_on_another_mesh(tmp_path: Path) -> None:
    """tensor = 4 becomes two replicas of tensor = 2 on demand: the same processes, nothing rewound, and the loss goes on as one worker's does."""
    folder = tmp_path / "run"

    def ask(line: dict[str, Any]) -> None:
        if line["step"] == 15:
            scale(folder, 4, tensor=2)

    given = {"run": {"name": "mesh", "steps": STEPS, "eval_every": 30}, "model": {"heads": 4, "dropout": 0.0}}
    on_four = recipe(4, **given, mesh={"tensor": 4}, elastic={"max_workers": 4, "min_workers": 4})
    result = Trainer(on_four, folder, "local").fit(on_step=ask)
    assert result.status == "done", result.error
    assert meshes(result) == [(1, 1, 4), (2, 1, 2)] and steps(result) == list(range(1, STEPS + 1))
    assert_survivors_kept(result)
    (moved,) = events(result, "relaid")
    assert moved["bytes"] > 0 and result.summary["steps_lost"] == 0 and not events(result, "rewound")
    one = train(tmp_path / "one", 1, **given)
    assert result.summary["final_loss"] == pytest.approx(one.summary["final_loss"], rel=1e-3)


@pytest.mark.parametrize("framework", ["tensorflow", "mxnet"])
def test_every_framework_s_tensor_groups(framework: str, tmp_path: Path) -> None:
    """Against one undivided worker in this process."""
    load(framework, "backend")
    changes: dict[str, dict[str, Any]] = {"run": {"name": "mesh", "steps": 20, "eval_every": 0}, "backend": {"name": framework},
                                          "model": {"kind": "nlp.gpt", "layers": 2, "heads": 2, "width": 64, "context": 32, "dropout": 0.0}}
    result = train(tmp_path / "run", 2, mesh=TENSOR, elastic={"max_workers": 2, "min_workers": 2, "logical_shards": 2}, **changes)
    assert result.status == "done", result.error
    one = fit(tmp_path / "one", recipe(1, elastic={"max_workers": 1, "logical_shards": 2}, **changes))
    assert result.summary["final_loss"] == pytest.approx(one.summary["final_loss"], rel=1e-5)
