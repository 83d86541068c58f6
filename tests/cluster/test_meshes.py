"""Replicas of several processes on a real Ray: tensor groups and pipelines over shared memory, broken and put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic.chaos import parse
from elastic.driver.trainer import Result, Trainer, scale
from tests.support.frameworks import load
from tests.support.oracle import undisturbed
from tests.support.runs import assert_fired, assert_sound, assert_survivors_kept, bits, events, recipe, steps, train
from tests.support.sampling import sample, sometimes

pytestmark = pytest.mark.usefixtures("cluster")

STEPS = 60
# a worker comes meanwhile
PACE: dict[str, dict[str, Any]] = {"model": {"layers": 2, "width": 64, "context": 32}, "data": {"batch_size": 16}}
TENSOR, PIPELINE = {"tensor": 2}, {"pipeline": 2, "micro_batches": 2}


def given(workers: int, mesh: dict[str, Any], **elastic: Any) -> dict[str, dict[str, Any]]:
    return {**PACE, "run": {"name": "mesh", "steps": STEPS, "eval_every": 30}, "mesh": mesh,
            "elastic": {"max_workers": workers, "min_workers": 2, "logical_shards": 8, **elastic}}


def meshes(result: Result) -> list[tuple[int, int, int]]:
    return [(e["mesh"]["data"], e["mesh"]["pipeline"], e["mesh"]["tensor"])
            for e in events(result, "generation_started")]


@pytest.mark.parametrize(("mesh", "faults"), sample([(TENSOR, ["kill:1@15/forward", "kill:2@40/reduction"]),
                                                     (PIPELINE, ["kill:1@15/backward", "stop:1@25", "kill:0@45/vote"])],
                                                    1))
def test_a_broken_replica_costs_no_step(mesh: dict[str, Any], faults: list[str], tmp_path: Path) -> None:
    """It goes on with the other one, and with two again when a worker has come. Whoever hangs is found among peers that
    wait in messages and collectives inside the model.
    """
    result = train(tmp_path / "run", 4, faults, **given(4, mesh, hang_timeout_s=3.0, spares=1))
    assert_sound(result, bits(2, **given(2, mesh)), STEPS)
    assert_survivors_kept(result)
    assert_fired(result, faults)
    assert [e["rank"] for e in events(result, "worker_lost")] == [parse(fault).number for fault in faults]
    (first, *_), lost = meshes(result), events(result, "worker_lost")[0]
    one, ready = (1, *first[1:]), [e for e in events(result, "worker_joined") if e["time"] < lost["time"]]
    assert first[0] == 2 and set(meshes(result)) <= {first, one}
    assert one in meshes(result) or len(ready) == 5, "only a spare that was ready at the loss keeps it at two"
    assert not events(result, "rewound")


@sometimes("another mesh", 0.6)
def test_a_live_run_is_laid_on_another_mesh(tmp_path: Path) -> None:
    """tensor = 4 becomes two replicas of tensor = 2 on demand: the same processes, nothing rewound, and the loss goes
    on as one worker's does."""
    folder = tmp_path / "run"

    def ask(line: dict[str, Any]) -> None:
        if line["step"] == 4:
            scale(folder, 4, tensor=2)

    changes = {"run": {"name": "mesh", "steps": STEPS, "eval_every": 30}, **PACE,
               "model": {**PACE["model"], "heads": 4, "dropout": 0.0}}
    on_four = recipe(4, **changes, mesh={"tensor": 4},
                     elastic={"max_workers": 4, "min_workers": 4, "logical_shards": 8})
    result = Trainer(on_four, folder, "local").fit(on_step=ask)
    assert result.status == "done", result.error
    assert meshes(result) == [(1, 1, 4), (2, 1, 2)] and steps(result) == list(range(1, STEPS + 1))
    assert_survivors_kept(result)
    (moved,) = events(result, "relaid")
    assert moved["bytes"] > 0 and result.summary["steps_lost"] == 0 and not events(result, "rewound")
    one = undisturbed(recipe(1, **changes, elastic={"max_workers": 1, "logical_shards": 8}))
    assert result.summary["final_loss"] == pytest.approx(one.summary["final_loss"], rel=1e-3)


@pytest.mark.parametrize("framework", sample(["tensorflow", "mxnet"], 1))
def test_every_framework_s_tensor_groups(framework: str, tmp_path: Path) -> None:
    """Against one undivided worker in this process."""
    load(framework, "backend")
    changes: dict[str, dict[str, Any]] = {"run": {"name": "mesh", "steps": 10, "eval_every": 0},
                                          "backend": {"name": framework},
                                          "model": {"kind": "nlp.gpt", "layers": 1, "heads": 2, "width": 32,
                                                    "context": 16, "dropout": 0.0}}
    result = train(tmp_path / "run", 2, mesh=TENSOR, elastic={"max_workers": 2, "min_workers": 2, "logical_shards": 2},
                   **changes)
    assert result.status == "done", result.error
    one = undisturbed(recipe(1, elastic={"max_workers": 1, "logical_shards": 2}, **changes))
    assert result.summary["final_loss"] == pytest.approx(one.summary["final_loss"], rel=1e-5)
