"""Embedding tables on real Ray: workers are killed in the phases that only tables have, owners come and go, and one state comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic.driver.replay import replay
from elastic.driver.trainer import Trainer
from tests.support.oracle import undisturbed
from tests.support.runs import assert_fired, assert_sound, assert_survivors_kept, events
from tests.support.table_runs import click_log, clicks_recipe

pytestmark = pytest.mark.usefixtures("cluster")


def test_kills_resizes_and_a_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="numba, which computes rows, is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = clicks_recipe(click_log(tmp_path / "log.parquet"), "torch",
                           elastic={"min_workers": 2, "spares": 1, "hang_timeout_s": 20.0},
                           embedding={"memory_gb": 24e-6, "disk_path": str(tmp_path / "cold")})  # some rows lie on disk
    faults = ["kill:1@6/push", "kill:0@12/rows", "scale:2@18"]
    result = Trainer(recipe, tmp_path / "run", "local", faults).fit()
    assert_sound(result, undisturbed(recipe).sha, 24)
    assert_survivors_kept(result)
    assert_fired(result, faults)
    assert len(events(result, "tables_resharded")) >= 2
    assert not replay(tmp_path / "run").problems
    assert not [*(tmp_path / "cold").iterdir()]  # those of the killed too
