"""Runs whose replicas are two workers, in one process: a replica breaks, is filled again, gives way to a smaller mesh and comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic import membership as m
from elastic.observe.events import read_lines
from tests.numerics.inprocess import Result, fit, gpt_recipe

pytest.importorskip("torch", reason="torch is not installed")
STEPS = 40


def room(*changes: tuple[int, int]) -> dict[int, Any]:
    """From a step's line on there is room for so many workers."""
    return {step: lambda run, workers=workers: run.fleet.grow(workers) for step, workers in changes}


def train(folder: Path, *chaos: str, hooks: Any = None, lost: int = 0, **elastic: int) -> tuple[Result, list[tuple[int, ...]], set[str]]:
    """The run, the mesh (data, pipeline, tensor) of each generation, and the events there were."""
    text = folder / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 60)
    recipe = gpt_recipe(text, STEPS, mesh={"tensor": 2}, run={"eval_every": 0}, elastic=elastic)
    result = fit(folder / "run", recipe, chaos, hooks=hooks)
    events = read_lines(folder / "run" / "events.jsonl")
    result.assert_sound(STEPS, lost)
    meshes = [tuple(e["mesh"][axis] for axis in ("data", "pipeline", "tensor")) for e in events if e["event"] == "generation_started"]
    return result, meshes, {e["event"] for e in events}


def test_a_broken_replica_is_filled_again_and_no_bit_differs(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    undisturbed, meshes, _ = train(tmp_path / "other", max_workers=2)
    assert meshes == [(1, 1, 2)]
    result, meshes, told = train(tmp_path, "kill:1@9/backward", hooks=room((1, 3), (12, 4)))
    assert meshes == [(2, 1, 2), (1, 1, 2), (2, 1, 2)]
    assert result.sha == undisturbed.sha and "healed" in told and not told & {"rewound", "relaid", "loaded"}


def test_a_mesh_that_cannot_be_filled_gives_way_and_comes_back(tmp_path: Path) -> None:
    _, meshes, told = train(tmp_path, "kill:1@7/backward", hooks=room((1, 1), (12, 2)), lost=6, max_workers=2)
    assert meshes == [(1, 1, 2), (1, 1, 1), (1, 1, 2)]
    assert {"rewound", "relaid"} <= told, "half of the model was lost, and nothing after that"


def test_a_live_run_is_laid_on_another_mesh(tmp_path: Path) -> None:
    _, meshes, told = train(tmp_path, hooks={5: lambda run: run.controller.post(m.ScaleTo(4, (2, 1, 1)))})
    assert meshes == [(2, 1, 2), (2, 2, 1)] and "relaid" in told and not told & {"rewound", "loaded"}
