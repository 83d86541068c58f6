"""The examples of one's own models over embedding tables, run as files but on threads: they learn, and the rows are of the ids that were fed."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import elastic
from elastic.driver.follow import Result as Ended
from elastic.driver.follow import result_of
from elastic.recipe import Recipe
from tests.support.frameworks import load
from tests.support.inprocess import Result, fit
from tests.support.table_runs import by_id, stored

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = {"torch": "own_tables_torch", "tensorflow": "own_tables_keras", "mxnet": "own_tables_gluon"}
EVAL_FRACTION = 0.1  # the end of the file, as all three say
EPOCHS, LEARNED = 1, 0.75  # half of the labels are 1


class Trained:
    """A trainer whose workers are threads, for a quarter of the epochs, in two shards."""

    results: list[Result] = []

    def __init__(self, recipe: Recipe, run_dir: Path):
        shorter = {"run": {"epochs": EPOCHS}, "elastic": {"max_workers": 2, "logical_shards": 2}}
        self.run_dir, self.recipe = run_dir, recipe.model_copy(update={
            section: getattr(recipe, section).model_copy(update=keys) for section, keys in shorter.items()})

    def fit(self, on_eval: Callable[[dict[str, Any]], None]) -> Ended:
        result = fit(self.run_dir, self.recipe)
        self.results.append(result)
        for line in result.metrics:
            if "eval" in line:
                on_eval(line)
        return result_of(self.run_dir)


@pytest.mark.parametrize("name", FILES)
def test_an_example_over_tables_learns_what_was_planted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    load(name, "backend")
    pytest.importorskip("numba", reason="numba, which computes rows, is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(elastic, "Trainer", Trained)
    monkeypatch.setattr(sys, "argv", ["example", str(tmp_path)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(EXAMPLES / f"{FILES[name]}.py"), run_name="__main__")
    result, columns = Trained.results.pop(), pq.read_table(tmp_path / "ratings.parquet").to_pydict()
    result.assert_sound(result.summary["steps"])
    assert capsys.readouterr().out.splitlines()[-1] == f"done {result.summary['eval']}"
    assert result.summary["eval"]["accuracy"] > LEARNED
    tables, fed = stored(tmp_path / "run", result.summary["steps"]), int(len(columns["likes"]) * (1 - EVAL_FRACTION))
    for table, column in (("users", "user"), ("items", "item")):
        wanted = {id: EPOCHS * times for id, times in Counter(columns[column][:fed]).items()}
        assert {id: count for id, (_, count, _) in by_id(tables[table]).items()} == wanted
