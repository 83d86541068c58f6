"""A user's own model trains from tables, whatever their format, the way of shuffling and what happens to the workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.numerics.inprocess import fit
from tests.numerics.tables import rows, table_recipe, write

pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("way", ["rows", "blocks"])
def test_a_users_model_trains_from_a_table(suffix: str, way: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"table.{suffix}", rows(1000), 150)
    bits = set()
    for workers, chaos in ((1, []), (3, ["kill:1@7/vote"])):
        result = fit(tmp_path / f"run{workers}", table_recipe(file, data={"shuffle_by": way, "columns": ["x", "y"], "eval_fraction": 0.1},
                                                              elastic={"max_workers": workers}, run={"epochs": 2}), chaos)
        result.assert_sound(29)
        assert result.summary["eval"]["loss"] > 0
        bits.add(result.sha)
    assert len(bits) == 1
