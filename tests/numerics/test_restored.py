"""A run whose directory is lost goes on from its checkpoints, and falls again before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic.driver.inference import check_checkpoint
from elastic.driver.place import Place
from elastic.driver.run import trainer_of
from elastic.errors import UserError
from elastic.messages import Begin
from elastic.observe.verify import verify
from elastic.recipe import Recipe, dumps
from tests.support.inprocess import Run, fit, module_recipe

pytest.importorskip("torch", reason="torch is not installed")


def recipe(checkpoints: Path, steps: int) -> Recipe:
    return module_recipe("Net", steps, checkpoint={"every_steps": 5, "path": str(checkpoints)}, elastic={"max_workers": 1})


class Begun(Run):
    """Begins as `elastic run` does."""

    def open(self) -> Begin:
        trainer, place = trainer_of(self.recipe, self.run_dir, "local"), Place(self.run_dir)
        place.hold()
        try:
            return place.open(dumps(self.recipe), trainer.began, trainer.begin or Begin())
        finally:
            place.let_go()


@pytest.mark.parametrize("says_something", [True, False])
def test_a_restored_run_that_falls_before_its_first_step_is_restored_again(says_something: bool, tmp_path: Path) -> None:
    saved, again = tmp_path / "saved", tmp_path / "again"
    fit(tmp_path / "first", recipe(saved, 10))
    oracle = fit(tmp_path / "whole", recipe(tmp_path / "others", 20))
    fallen = Begun(again, recipe(saved, 20))
    fallen.run_log.close()
    fallen.controller.journal.lines.close()
    if not says_something:
        for name in ("events.jsonl", "journal.jsonl"):
            (again / name).unlink()
    result = Begun(again, recipe(saved, 20)).fit()
    assert result.outcome.status == "done" and result.steps == list(range(11, 21)) and result.sha == oracle.sha
    assert [event["step"] for event in result.named("checkpoint_committed")] == [15, 20]
    assert not verify(again, check_checkpoint).problems


def test_a_run_that_has_checkpoints_does_not_begin_anew_for_want_of_their_place(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(run_dir, recipe(tmp_path / "saved", 10))
    with pytest.raises(UserError, match=r"has no checkpoint of this run, whose newest, of step 10, lies in .*saved; write that again"):
        trainer_of(recipe(tmp_path / "elsewhere", 20), run_dir, "local")
