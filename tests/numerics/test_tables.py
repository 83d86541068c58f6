"""A user's own model trains from tables, whatever their format, the way of shuffling and what happens to the workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from elastic.driver.inference import check_checkpoint, evaluate
from elastic.observe.verify import verify
from tests.support.inprocess import fit, gpt_recipe
from tests.support.tables import counting, rows, table_recipe, write

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
        result = fit(tmp_path / f"run{workers}",
                     table_recipe(file, data={"shuffle_by": way, "columns": ["x", "y"], "eval_fraction": 0.1},
                                                              elastic={"max_workers": workers}, run={"epochs": 2}),
                     chaos)
        result.assert_sound(29)
        assert result.summary["eval"]["loss"] > 0
        bits.add(result.sha)
    assert len(bits) == 1


def test_every_format_and_way_trains_to_the_same_bits(tmp_path: Path) -> None:
    """The same rows in the same order are the same run, wherever they lie; a CSV has no lists of numbers."""
    source = rows(500).select(["id", "y", "up"]).set_column(1, "y", pa.array(np.arange(500, dtype=np.float64) / 8))
    bits = {suffix: fit(tmp_path / suffix, table_recipe(write(tmp_path / f"t.{suffix}", source, 60), "Line",
                                                        data={"columns": ["y"], "shuffle_by": "rows"})).sha
            for suffix in ("parquet", "arrow", "csv")}
    assert len(set(bits.values())) == 1, bits
    by_blocks = fit(tmp_path / "blocks", table_recipe(tmp_path / "t.parquet", "Line",
                                                      data={"columns": ["y"], "shuffle_by": "blocks"}))
    assert by_blocks.sha != bits["parquet"], "another order is another run: the comparison above can fail"


def test_sources_by_weight_through_a_kill(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.parquet", rows(size, first=first), 90)
             for n, (size, first) in enumerate(((700, 0), (40, 700)))]
    options = {"run": {"steps": 96, "epochs": None}, "data": {"weights": [3.0, 1.0], "columns": ["id"], "ledger": True}}
    one, two = (fit(tmp_path / f"run{n}", counting(files, 740, 64, elastic={"max_workers": n}, **options), chaos)
                for n, chaos in ((1, []), (2, ["kill:1@40/vote"])))
    for result in (one, two):
        result.assert_sound(96)
    assert one.sha == two.sha
    fed = one.arrays()["parameter/fed"]  # 96 * 64 = one and a half periods of 4096
    assert fed[:700].sum() + fed[700:].sum() == 6144 and abs(fed[700:].sum() - 1536) < 120
    assert fed[:700].max() - fed[:700].min() == fed[700:].max() - fed[700:].min() == 1, "each source epoch by epoch"


def test_a_language_model_reads_a_column_and_keeps_a_ledger(tmp_path: Path) -> None:
    words = pa.table({"n": range(300), "body": [f"{n} times {n} is {n * n}; " for n in range(300)]})
    recipe = gpt_recipe(write(tmp_path / "t.parquet", words), 12,
                        data={"format": "parquet", "text": "body", "ledger": True})
    result = fit(tmp_path / "run", recipe, ["kill:2@5/backward"])
    result.assert_sound(12)
    assert any("ledger: 192 positions" in fact for fact in verify(tmp_path / "run", check_checkpoint).facts)


def test_a_checkpoint_of_a_table_is_evaluated_as_in_the_run(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", rows(300), 70)
    result = fit(tmp_path / "run", table_recipe(file, data={"eval_fraction": 0.2, "columns": ["x", "y"]}))
    assert evaluate(tmp_path / "run") == pytest.approx(result.summary["eval"], rel=1e-6)
