"""Recipes with embedding tables: what is written down and read again, and one clear sentence for every mistake."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.errors import RecipeError
from elastic.recipe import Recipe, check_resumed, dumps, loads, parse
from elastic.tables.features import Feature
from elastic.tables.of_recipe import tables_of
from elastic.tables.placing import Look, Place, Placed, own_places
from elastic.tables.spec import RowUpdate, TableSpec
from tests.support.inprocess import merged


@pytest.fixture
def clicks(tmp_path: Path) -> dict[str, Any]:
    """A recommender's recipe with one table."""
    (tmp_path / "log.parquet").write_bytes(b"not looked at")
    return {"model": {"kind": "recommender.dlrm"},
            "data": {"format": "parquet", "path": str(tmp_path / "log.parquet"), "label": "click", "numeric": ["age"],
                     "categorical": ["shop"]},
            "tables": {"items": {"columns": ["item", "history"], "pooling": "mean"}}}


def refused(tree: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(tree, overrides)
    message = str(caught.value)
    assert "\n" not in message and message.rstrip()[-1] in ".?" and message.count(". ") == 0
    return message


def test_a_table_is_what_its_section_says(clicks: dict[str, Any]) -> None:
    recipe = parse(clicks, ["tables.items.width=32", "tables.users.columns=user", "tables.users.lr=0.5",
                            "embedding.twin=false"])
    items, users = recipe.tables["items"], recipe.tables["users"]
    assert (items.columns, items.width, items.optimizer, items.lr, items.pooling) == (("item", "history"), 32,
                                                                                      "rowwise_adagrad", None, "mean")
    assert (users.columns, users.width, users.lr) == (("user",), None, 0.5)
    assert (recipe.embedding.twin, recipe.embedding.buckets, recipe.embedding.look_ahead) == (False, 1024, 2)


def test_a_recipe_with_tables_loads_to_itself(clicks: dict[str, Any]) -> None:
    recipe = parse(clicks, ["embedding.buckets=64", "data.tables=rows", "checkpoint.full_every=3"])
    assert loads(dumps(recipe)) == recipe
    said = tomllib.loads(dumps(recipe))
    assert (said["embedding"]["buckets"], said["data"]["tables"], said["checkpoint"]["full_every"]) == (64, "rows", 3)
    assert said["tables"]["items"]["columns"] == ["item", "history"]


def test_a_recipe_without_tables_says_nothing_of_them(clicks: dict[str, Any]) -> None:
    """What it resolves to is what it was before there were any."""
    del clicks["tables"]
    recipe = parse(clicks)
    said = tomllib.loads(dumps(recipe))
    assert set(said) == {"run", "model", "backend", "data", "mesh", "elastic", "optimizer", "checkpoint"}
    assert "tables" not in said["data"] and "full_every" not in said["checkpoint"] and loads(dumps(recipe)) == recipe
    assert parse(clicks, ["data.tables=auto", "checkpoint.full_every=10"]) == recipe


@pytest.mark.parametrize(("overrides", "says"), [
    (["tables.items.columns=[]"], "tables.items.columns is missing; name the columns"),
    (["tables.users.width=8"], "tables.users.columns is missing; name the columns"),
    (["tables.users.columns=item"], 'the column "item" stands twice among tables.items.columns and '
                                    'tables.users.columns; leave it in one of them.'),
    (['tables.users.columns=["user", "user"]'], 'names the column "user" twice'),
    (["tables.users.columns=age"], 'the column "age" stands in tables.users.columns and in data.numeric; leave it in '
                                   "one of them."),
    (["tables.users.columns=click"], 'the column "click" stands in tables.users.columns and in data.label'),
    (["tables.items.width=0"], "tables.items.width = 0 cannot work; it must be a whole number of at least 1."),
    (["tables.items.width=2.5"], "tables.items.width = 2.5 cannot work"),
    (["tables.items.widht=8"], "tables.items.widht = 8 is not a key of the recipe; did you mean tables.items.width?"),
    (["tables.items.size=8"], "the keys of [tables.items] are columns, width, optimizer, lr,"),
    (["tables.items.optimizer=lamb"], 'must be one of "sgd", "adagrad", "rowwise_adagrad", "adam".'),
    (["tables.items.lr=-1"], "tables.items.lr = -1 cannot work; it must be a number of at least 0"),
    (["tables.items.weight_decay=-1"], "tables.items.weight_decay = -1 cannot work; it must be a number of at least 0"),
    (["tables.items.admit=-1"], "tables.items.admit = -1 cannot work; it must be a whole number of at least 0"),
    (["tables.items.ttl_steps=-1"], "tables.items.ttl_steps = -1 cannot work; it must be a whole number of at least 0"),
    (["tables.items.max_rows=-1"], "tables.items.max_rows = -1 cannot work; it must be a whole number of at least 0"),
    (["tables.items.max_rows=100"], "tables.items.max_rows = 100 must be at least embedding.buckets = 1024"),
    (["tables.items.pooling=max"], 'must be one of "sum", "mean", "none".'),
    (["tables.items.pooling=none"], 'tables.items.pooling = "none" is for models of your own'),
    (["tables.items.length=3"], 'tables.items.length = 3 has a meaning only under tables.items.pooling = "none"'),
    (["tables.items=3"], "tables.items = 3 cannot work; it must be a section with a name, [tables.NAME]"),
    (["tables.columns=item"], 'tables.columns = "item" cannot work; it must be a section with a name, [tables.NAME]'),
    (["tables.2.columns=user"], '"2" cannot be a table\'s name; write [tables.NAME] with letters'),
    (["tables.a.b.columns=user"], "is not a key of the recipe; the keys of [tables.a] are"),
    (["embedding.look_ahead=1"], "embedding.look_ahead = 1 cannot work; it must be 0 or 2: how many steps before its own "
                                 "a lookup is asked for."),
    (["embedding.disk_path=cold"], 'embedding.disk_path = "cold" cannot work; it must be a folder on every worker\'s own disk, as "/'),
    (["embedding.disk_path=/cold"], 'embedding.disk_path = "/cold" is for rows that embedding.memory_gb has no room for, and that is 0'),
    (["embedding.placement=servers"], 'it must be "workers": parameter servers are not built yet.'),
    (["embedding.buckets=1000"], "embedding.buckets = 1000 cannot work; it must be a power of two"),
    (["embedding.move_mb=0"], "embedding.move_mb = 0 cannot work; it must be a number above 0"),
    (["embedding.memory_gb=-1"], "embedding.memory_gb = -1 cannot work; it must be a number above 0"),
    (["checkpoint.full_every=0"], "checkpoint.full_every = 0 cannot work; it must be a whole number of at least 1"),
    (["data.tables=some"], 'data.tables = "some" cannot work; it must be one of "auto", "dense", "rows".'),
    (["data.tables=rows", "data.categorical=[]"], 'data.tables = "rows" places the columns of data.categorical'),
    (["mesh.tensor=2"], "mesh.tensor = 2 is not for embedding tables on workers ([tables.items]); write 1."),
    (["mesh.micro_batches=3"], "mesh.micro_batches = 3 is not for embedding tables on workers"),
    (["mesh=auto"], 'mesh = "auto" is not for embedding tables on workers ([tables.items]); leave it out.'),
    (["optimizer.ema=0.9"], "optimizer.ema = 0.9 is not for embedding tables on workers ([tables.items]); leave it"),
    (["elastic.reduction=fast"], 'elastic.reduction = "fast" is not for embedding tables on workers'),
    (["data.split=column", "data.split_column=item", "data.eval_values=a"],
     'the column "item" stands in tables.items.columns and in data.split_column'),
    (["data.format=csv", 'data.names=["click", "age", "shop", "item"]'], 'tables.items.columns names the column '
                                                                       '"history", which is not among data.names'),
])
def test_a_mistake_is_told_in_one_sentence(clicks: dict[str, Any], overrides: list[str], says: str) -> None:
    assert says in refused(clicks, *overrides)


def test_tables_are_for_tables_of_columns(clicks: dict[str, Any]) -> None:
    path, section = clicks["data"]["path"], {"tables": {"items": {"columns": ["item"]}}}
    own = {"model": {"kind": "mine:Net"}, "data": {"format": "parquet", "path": path}, **section}
    assert parse(own).tables and parse(own, ["tables.items.pooling=none", "tables.items.length=7"])
    assert "stands in tables.items.columns and in data.columns" in refused(own, "data.columns=item")
    text = {"model": {"kind": "nlp.gpt"}, "data": {"format": "text", "path": path}, **section}
    items = {"model": {"kind": "mine:Net"}, "data": {"kind": "mine:Items"}, **section}
    for tree in (text, items):
        assert 'tables.items.columns = ["item"] has a meaning only for recommenders and for models of' in refused(tree)
    del own["tables"], text["tables"]
    assert "embedding.twin = false has a meaning only for embedding tables" in refused(own, "embedding.twin=false")
    assert "checkpoint.full_every = 2 has a meaning only for" in refused(text, "checkpoint.full_every=2")
    assert 'data.tables = "rows" has a meaning only for the recommenders' in refused(text, "data.tables=rows")


@pytest.mark.parametrize(("override", "is_other"), [
    ("tables.items.width=8", True), ("tables.items.optimizer=sgd", True), ("tables.items.columns=item", True),
    ("tables.items.init=zeros", True), ("tables.users.columns=user", True), ("embedding.buckets=64", True),
    ("data.tables=rows", False), ("tables.items.lr=0.5", False), ("tables.items.ttl_steps=9", False),
    ("tables.items.max_rows=9999", False), ("tables.items.admit=2", False), ("embedding.twin=false", False),
    ("checkpoint.full_every=3", False), ("tables.items.weight_decay=0.5", False)])
def test_what_may_change_when_a_run_is_resumed(clicks: dict[str, Any], override: str, is_other: bool) -> None:
    before, after = parse(clicks), parse(clicks, [override])
    if is_other:
        with pytest.raises(RecipeError, match="is not what this run began with"):
            check_resumed(before, after)
        with pytest.raises(RecipeError, match="is not what this run began with"):
            check_resumed(after, before)
    else:
        check_resumed(before, after)


def test_where_columns_lie_stays_as_a_run_said_it(clicks: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match='data.tables = "rows" is not what this run began with, "dense"'):
        check_resumed(parse(clicks, ["data.tables=dense"]), parse(clicks, ["data.tables=rows"]))


def own(tree: dict[str, Any], **changes: Any) -> Recipe:
    return parse(merged({"model": {"kind": "mine:Net"}, "run": {"seed": 5},
                         "data": {"format": "parquet", "path": tree["data"]["path"]}}, changes))


def test_the_tables_of_a_run_follow_from_recipe_and_facts(clicks: dict[str, Any]) -> None:
    recipe = own(clicks, tables={"b": {"columns": ["y", "x"], "width": 4, "optimizer": "adam", "admit": 2},
                                 "a": {"columns": ["z"], "pooling": "none", "length": 3, "lr": 0.5, "init": "zeros"}},
                 embedding={"buckets": 8, "twin": False, "memory_gb": 0.5}, optimizer={"lr": 0.1, "base_batch": 6})
    tables = tables_of(recipe, {"placed": own_places(recipe).facts})
    assert tables is not None
    assert tables.specs == (TableSpec("a", 16, init="zeros", seed=5, num_buckets=8),
                            TableSpec("b", 4, "adam", "normal:0.5", 5, 8, admit=2))
    assert tables.features == (Feature("x", "b"), Feature("y", "b"), Feature("z", "a", "none", 3))
    assert tables.updates == {"a": RowUpdate(1.0), "b": RowUpdate(0.2)}
    assert (tables.twin, tables.memory_bytes, tables.num_buckets, tables.kernels) == (False, 500_000_000, 8, "numba")
    assert tables.disk_path == "" and tables_of(own(clicks), {}) is None


def test_a_disk_is_for_tables_that_grow_on_compiled_kernels(clicks: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"tables": {"a": {"columns": ["z"]}}, "embedding": {"memory_gb": 0.5, "disk_path": "/cold"}}
    recipe = own(clicks, **changes)
    places = own_places(recipe)
    tables = tables_of(recipe, {"placed": places.facts})
    assert tables and tables.disk_path == "/cold"
    static = Placed((replace(places.places[0], vocabulary=40),), places.looks)
    with pytest.raises(RecipeError, match='embedding.disk_path = "/cold" is for tables that grow, and a has a vocabulary'):
        tables_of(recipe, {"placed": static.facts})
    with pytest.raises(RecipeError, match='embedding.disk_path = "/cold" is not for backend.name = "reference"'):
        tables_of(parse(merged(clicks, {**changes, "backend": {"name": "reference"}})), {"placed": places.facts})


def test_a_bad_start_is_told_before_workers_start(clicks: dict[str, Any]) -> None:
    recipe = own(clicks, tables={"a": {"columns": ["z"], "init": "normal"}})
    with pytest.raises(RecipeError, match='tables.a.init = \'normal\' must be "zeros", "normal:S" or "uniform:S"'):
        tables_of(recipe, {"placed": own_places(recipe).facts})


def test_a_look_makes_bags() -> None:
    look = Look("x", "a", "x", "mean", 1, -2)
    bags = look.bags(np.array([5, 7], np.uint8))
    assert (bags.ids.tolist(), bags.offsets.tolist(), bags.pooling) == ([3, 5], [0, 1, 2], "mean")
    bags = look.bags(np.array([[5, 7], [9, 2]], np.int32))
    assert (bags.ids.tolist(), bags.offsets.tolist()) == ([3, 5, 7, 0], [0, 2, 4])
    assert look.bags(np.empty(0, np.int64)).offsets.tolist() == [0]


def test_two_features_have_two_names() -> None:
    with pytest.raises(RecipeError, match='two features are called "x.linear"'):
        Placed((Place("a", "a", 1),), (Look("x.linear", "a", "x"), Look("x.linear", "a", "x.linear")))
