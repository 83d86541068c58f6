"""A run that writes its checkpoints to a place of its own: its proof looks there, its replay writes nothing there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic.driver.follow import Result
from elastic.driver.replay import replay, undisturbed, verify_run
from elastic.errors import UserError
from elastic.recipe import Recipe, load_recipe
from tests.support.checkpoints import Arrays, saver, values
from tests.support.ended import make_run


def test_every_hash_is_checked_where_the_checkpoints_are(tmp_path: Path) -> None:
    away = tmp_path / "away"
    run_dir = make_run(tmp_path, str(away))
    for step in (5, 6):
        assert saver(str(away)).leave(Arrays(values(step), step), 1, {}, ())
    verdict = verify_run(run_dir)
    assert not verdict.problems and "2 whole checkpoints, every hash checked" in verdict.facts
    file = next((away / "step-00000006").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert len(verify_run(run_dir).problems) == 1 and f"{away}/step-00000006: " in verify_run(run_dir).problems[0]


def test_a_storage_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "s3://KEY:SECRET@bucket/run?endpoint_override=http://127.0.0.1:9&region=us-east-1")
    with pytest.raises(UserError, match='checkpoint.path = "s3://bucket/run" cannot be read') as error:
        verify_run(run_dir)
    assert "SECRET" not in str(error.value) and "\n" not in str(error.value)


def test_a_replay_leaves_the_run_s_checkpoints_alone(tmp_path: Path) -> None:
    (tmp_path / "plays.txt").write_text("to be or not to be")
    run_dir = make_run(tmp_path, str(tmp_path / "away"))
    assert load_recipe(run_dir / "recipe.toml", undisturbed(1)).checkpoint.path == ""


def test_a_run_that_changed_its_mesh_has_no_replay(tmp_path: Path) -> None:
    (tmp_path / "plays.txt").write_text("to be or not to be")
    run_dir = make_run(tmp_path, str(tmp_path / "away"))
    (run_dir / "summary.json").write_text('{"status": "done"}')
    other = {"time": 3.0, "event": "generation_started", "generation": 2, "step": 1, "world_size": 2, "workers": [],
             "mesh": {"data": 1, "pipeline": 1, "tensor": 2, "expert": 1}}
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps(other) + "\n")
    with pytest.raises(UserError, match="meshes of other degrees"):
        replay(run_dir)


def test_a_replay_that_differs_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plays.txt").write_text("to be or not to be")
    run_dir = make_run(tmp_path, "")
    (run_dir / "summary.json").write_text('{"status": "done", "parameters_sha256": "p", "state_sha256": "s"}')

    class Undisturbed:
        def __init__(self, recipe: Recipe, run_dir: Path, address: str, data: str):
            assert data == "" and recipe.elastic.min_workers == recipe.elastic.max_workers == 1 and recipe.run.steps == 1 and address == "auto"

        def fit(self) -> Result:
            return Result("done", {"parameters_sha256": "p", "state_sha256": "other"}, tmp_path)

    monkeypatch.setattr("elastic.driver.trainer.Trainer", Undisturbed)
    verdict = replay(run_dir, "auto")
    assert verdict.facts == ["replayed undisturbed on one worker: the same parameters_sha256, p..."]
    assert verdict.problems == ["replayed undisturbed on one worker: state_sha256 is other, the run has s"]
