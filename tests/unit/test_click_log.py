"""The log of clicks that recipes make: the same wherever it is made, by its law, with something to learn; and recipes that ask for one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic.data.files import find
from elastic.errors import RecipeError
from elastic.recipe import load_recipe
from elastic.workload import Workload, prepare
from recommender import click_log
from recommender.click_log import OPTIONS, chances, drawn, rows, zipf

SIZE = 20_000
SMALL = {**OPTIONS, "rows": SIZE}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """By ranks (Mann and Whitney)."""
    ranks = np.empty(len(score))
    ranks[np.argsort(score)] = np.arange(1, len(score) + 1)
    positives = label.sum()
    return float((ranks[label > 0].sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives)))


def test_a_row_follows_from_its_number_alone() -> None:
    whole = rows(np.arange(500), SMALL)
    assert whole.schema == click_log.SCHEMA
    parts = [rows(np.arange(first, first + 100), SMALL) for first in (300, 0)]
    assert parts[0].equals(whole.slice(300, 100)) and parts[1].equals(whole.slice(0, 100))
    assert not rows(np.arange(500), {**SMALL, "seed": 1}).equals(whole)
    lists = whole["history"].to_pylist()
    assert {len(history) for history in lists} == set(range(7))


def test_ids_follow_the_law_and_go_on_appearing() -> None:
    """The share of the k-th most frequent id is that of the continuous law between k and k + 1."""
    columns = drawn(np.arange(200_000), SMALL)
    counts = np.sort(np.unique(columns["item"], return_counts=True)[1])[::-1]
    def below(rank: float) -> float:
        return float((rank ** -0.05 - 1) / ((OPTIONS["items"] + 1) ** -0.05 - 1))
    for rank in (1, 2, 3, 10):
        share = below(rank + 1) - below(rank)
        assert counts[rank - 1] == pytest.approx(200_000 * share, abs=5 * np.sqrt(200_000 * share))
    seen = [len(np.unique(columns["user"][:size])) for size in (50_000, 100_000, 200_000)]
    assert seen[1] - seen[0] > 15_000 and seen[2] - seen[1] > 25_000
    assert zipf(np.array([0.0, 1 - 2.0 ** -53]), 7).tolist() == [1, 7]


def test_there_is_something_to_learn() -> None:
    log, columns = rows(np.arange(SIZE), SMALL), drawn(np.arange(SIZE), SMALL)
    label, chance = np.array(log["click"]), chances(columns)
    assert 0.2 < label.mean() < 0.5 and label.mean() == pytest.approx(chance.mean(), abs=0.02)
    assert 0.85 < auc(chance, label) < 0.95
    alone = {**columns, "history": columns["history"][:0], "offsets": np.zeros(SIZE + 1, np.int64)}
    assert auc(chances(alone), label) < auc(chance, label) - 0.02, "the histories tell something"


def test_a_recipe_makes_its_log_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"made:recommender.click_log?rows={SIZE}&seed=3"
    (one,) = find("data.path", path)
    assert Path(one.where).is_relative_to(tmp_path / "cache")
    made = pq.read_table(one.where)
    assert made.equals(rows(np.arange(SIZE), {**SMALL, "seed": 3}))
    monkeypatch.setattr(click_log, "make", lambda *_: pytest.fail("it is there"))
    assert find("data.path", path) == [one]


@pytest.mark.parametrize(("path", "says"), [
    ("made:recommender.click_log?rows=many", "is nothing that can be made"), ("made:os.path", "is nothing that can be made"),
    ("made:recommender.no_log", "is nothing that can be made"), ("made:click_log", "is nothing that can be made"),
    ("made:recommender.click_log?colour=3", "colour is nothing that recommender.click_log is asked for; it takes rows, users,")])
def test_what_cannot_be_made_is_refused(path: str, says: str) -> None:
    with pytest.raises(RecipeError, match=r"data.path = .*") as caught:
        find("data.path", load_recipe("recommender/growing_tables", [f"data.path={path}"]).data.path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_shipped_recipe_trains_with_growing_tables(tmp_path: Path) -> None:
    recipe = load_recipe("recommender/growing_tables", [f"data.path=made:recommender.click_log?rows={SIZE}"])
    opened = Workload.open(recipe, prepare(recipe))
    assert opened.tables is not None and [spec.name for spec in opened.tables.specs] == ["items", "users"]
    batch = opened.training.batch(np.arange(100), np.zeros(100, np.int64))
    log = rows(np.arange(100), SMALL)
    assert batch["bags"]["user"].ids.tolist() == log["user"].to_pylist()
    assert pa.ListArray.from_arrays(batch["bags"]["history"].offsets.astype(np.int32), batch["bags"]["history"].ids).to_pylist() \
        == log["history"].to_pylist()
    assert set(opened.model.parameters) >= {"embedding", "out.weight"} and os.listdir(tmp_path / "cache")
