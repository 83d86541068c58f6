"""Two runs and one place for checkpoints: the second is refused, the first does not notice. On threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic.checkpoint import claim as claims
from elastic.checkpoint.claim import NAME
from elastic.checkpoint.manager import committed, read_manifest
from elastic.driver.trainer import Trainer
from elastic.errors import UserError
from elastic.storage.store import Store
from tests.support.inprocess import Result, Run, fit, module_recipe

STEPS = 24


def recipe(path: str) -> Any:
    return module_recipe("Net", STEPS, elastic={"max_workers": 2}, checkpoint={"every_steps": 8, "path": path})


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(claims, "SETTLE_S", 0.3)
    return str(tmp_path / "shared") if request.param == "disk" else request.getfixturevalue("s3").bucket()


def test_the_second_run_on_one_path_is_refused_while_the_first_lives(place: str, tmp_path: Path) -> None:
    second: list[Result] = []
    run = Run(tmp_path / "first", recipe(place),
              hooks={9: lambda run: second.append(fit(tmp_path / "second", recipe(place)))})
    first = run.fit()
    assert first.outcome.status == "done" and first.steps == list(range(1, STEPS + 1))
    refused = second[0].outcome
    assert refused.status == "failed" and refused.error.startswith("checkpoint.path = ")
    assert run.job.run_id in refused.error and str(tmp_path / "first") in refused.error and "\n" not in refused.error
    assert second[0].named("checkpoint_committed") == []
    store = Store.open(place)
    names = [name for _, name in committed(store)]
    assert names and {read_manifest(store, name).extra["run"]
                      for name in names} == {run.job.run_id}, "a manifest names its run"
    assert store.size(NAME) is None, "the place is free again"


def test_a_second_run_is_refused_before_any_worker_starts(place: str, tmp_path: Path) -> None:
    claims.Claim(place, "first-1", "host:/runs/first").take()
    with pytest.raises(UserError, match=r"checkpoint\.path = .* is in use by the live run first-1 of host:/runs/first"):
        Trainer(recipe(place), tmp_path / "second").fit()
    assert not (tmp_path / "second").exists()


def test_a_run_whose_place_was_taken_commits_nothing_more_there(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away for so long that its claim had run out."""
    place, others = str(tmp_path / "shared"), claims.Claim(str(tmp_path / "shared"), "other-1", "host:/runs/other")

    def away(run: Run) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(claims, "LAPSE_S", 0.0)
            others.take()
        run.controller.claim.renewed -= claims.LAPSE_S

    result = fit(tmp_path / "run", recipe(place), hooks={9: away})
    (rejected, *_) = result.named("checkpoint_rejected")
    assert "in use by the live run other-1" in rejected["reason"]
    assert all(e["step"] == 8 for e in result.named("checkpoint_committed")), "a part of step 8 may have been under way"
    assert result.outcome.status == "failed" and "live run other-1" in result.outcome.error
    assert claims.read(others.store).run == "other-1"  # type: ignore[union-attr]
