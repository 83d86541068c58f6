"""A recommender that reads its vectors from embedding tables is the one with a dense embedding: the same rows, the same loss, the same slopes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backends.reference.ops import ReferenceOps
from backends.reference.tape import Variable, backward, value_of
from elastic.data.loader import Batch, load_batch
from elastic.errors import RecipeError
from elastic.model.initial import initial_values
from elastic.recipe import Recipe, parse
from elastic.tables.bags import Bags
from elastic.workload import Workload, prepare
from recommender import placing
from recommender.data import vocabularies_of
from recommender.placing import MOST_DENSE
from tests.support.inprocess import merged
from tests.support.tables import write

SIZE, SHOPS, USERS, COLOURS = 120, 9, 30, 4
ARCHS = ("dlrm", "dcn", "mf", "lr")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    luck = np.random.default_rng(0)
    path = folder / "t.parquet"
    if not path.exists():
        write(path, pa.table({"click": luck.integers(0, 2, SIZE), "age": luck.normal(size=SIZE),
                              "colour": [f"c{n}" for n in luck.integers(0, COLOURS, SIZE)],
                              "shop": [f"s{n}" for n in luck.integers(0, SHOPS, SIZE)],
                              "user": luck.integers(0, USERS, SIZE)}))
    base = {"run": {"epochs": 1}, "model": {"kind": "recommender.dlrm", "bottom": [8], "top": [8]}, "backend": {"name": "reference"},
            "data": {"format": "parquet", "path": str(path), "label": "click", "numeric": ["age"], "embedding_dim": 4,
                     "categorical": ["colour", "shop", "user"], "batch_size": 64, "oov": "row", "eval_fraction": 0.0}}
    return parse(merged(base, changes))


def opened(recipe: Recipe) -> tuple[Workload, Batch]:
    """A batch in which nothing is hidden."""
    found = Workload.open(recipe, prepare(recipe))
    data: Any = found.training
    data.hiding = np.zeros_like(data.hiding)
    return found, load_batch(data, found.sampler, 1, 0)


def looked_up(table: np.ndarray, bags: Bags) -> np.ndarray:
    """Of lists of one."""
    assert np.array_equal(bags.offsets, np.arange(bags.size + 1))
    return table[bags.ids]


def passed(work: Workload, params: dict[str, np.ndarray], batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """The loss in float64, and its slopes."""
    leaves = {name: Variable(value.astype(np.float64)) for name, value in params.items()}
    given = {name: column.astype(np.float64) if column.dtype == np.float32 else column
             for name, column in batch.items() if name != "bags"}
    loss, weight, _ = work.model.loss(ReferenceOps(np.float64), leaves, {}, given, 0)
    backward(loss)
    assert value_of(weight) == batch["row_weight"].sum()
    return float(value_of(loss)), {name: leaf.gradient for name, leaf in leaves.items()}


def added_up(bags: dict[str, Bags], slopes: dict[str, np.ndarray], rows: int, names: list[str]) -> np.ndarray:
    total = np.zeros((rows, slopes[f"rows/{names[0]}"].shape[1]))
    for name in names:
        np.add.at(total, bags[name].ids, slopes[f"rows/{name}"])
    return total


DENSE = {"dlrm": "embedding", "dcn": "embedding", "mf": "embedding", "lr": "linear.categorical"}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("has_numbers", [True, False])
def test_all_columns_on_rows_are_the_dense_twin(arch: str, has_numbers: bool, tmp_path: Path) -> None:
    data = {} if has_numbers else {"numeric": []}
    dense, batch = opened(recipe_of(tmp_path, model={"arch": arch}, data=data))
    rows, same = opened(recipe_of(tmp_path, model={"arch": arch}, data={"tables": "rows", **data}))
    assert "categorical" in batch and "categorical" not in same and set(same["bags"]) >= {"colour", "shop", "user"}
    whole = initial_values(dense.model.parameters, 3, {})
    whole = {name: value + 0.1 for name, value in whole.items()}  # single weights start from zeros
    tables = {"": whole.pop(DENSE[arch]), ".linear": whole.pop("linear.categorical", None)}
    assert set(rows.model.parameters) == set(whole)
    assert rows.tables is not None
    assert {spec.name: (spec.width, spec.vocabulary) for spec in rows.tables.specs} == {
        f"embedding{end}": table.shape[::-1] for end, table in tables.items() if table is not None}
    assert {spec.name: spec.init for spec in rows.tables.specs} == {
        "lr": {"embedding": "zeros"}, "mf": {"embedding": "normal:0.5", "embedding.linear": "zeros"}}.get(
            arch, {"embedding": "normal:0.5"}), "as the dense ones start"
    found = {f"rows/{name}": looked_up(tables[".linear" if name.endswith(".linear") else ""], bags)
             for name, bags in same["bags"].items()}
    wanted, slopes = passed(dense, {**whole, DENSE[arch]: tables[""],
                                    **({"linear.categorical": tables[".linear"]} if arch == "mf" else {})}, batch)
    loss, own = passed(rows, {**whole, **found}, same)
    assert loss == pytest.approx(wanted, rel=1e-12)
    for end, name in (("", DENSE[arch]), *([(".linear", "linear.categorical")] if arch == "mf" else [])):
        names = [f"{column}{end}" for column in ("colour", "shop", "user")]
        assert np.abs(slopes[name]).max() > 1e-3
        np.testing.assert_allclose(added_up(same["bags"], own, len(slopes[name]), names), slopes[name], atol=1e-12)
    for name in whole:
        np.testing.assert_allclose(own[name], slopes[name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_growing_column_beside_dense_ones_is_a_column_as_they_are(arch: str, tmp_path: Path) -> None:
    """Its ids are the numbers themselves; the dense twin's are a vocabulary in the order of their first rows."""
    dense, batch = opened(recipe_of(tmp_path, model={"arch": arch}))
    mixed, same = opened(recipe_of(tmp_path, model={"arch": arch}, data={"categorical": ["colour", "shop"]},
                                   tables={"users": {"columns": ["user"]}}))
    first = batch["categorical"][:, 2].min() // 1
    whole = {name: value + 0.1 for name, value in initial_values(dense.model.parameters, 3, {}).items()}
    sizes = mixed.model.columns.sizes
    assert np.array_equal(same["categorical"], batch["categorical"][:, :2]) and first >= sum(sizes)
    params = {name: value[:sum(sizes)] if name in ("embedding", "linear.categorical") else value for name, value in whole.items()}
    for name in ("embedding", "linear.categorical"):
        if name in whole:
            end = ".linear" if name.startswith("linear") and arch == "mf" else ""
            params[f"rows/user{end}"] = whole[name][batch["categorical"][:, 2]]
    assert {name.partition(".")[0] for name in same["bags"]} == {"user"}
    places = {int(row): int(id) for row, id in zip(batch["categorical"][:, 2], same["bags"]["user"].ids)}
    assert len(set(places.values())) == len(places), "one row, one id"
    assert passed(mixed, params, same)[0] == pytest.approx(passed(dense, whole, batch)[0], rel=1e-12)


def test_a_column_with_a_vocabulary_lies_in_a_table_of_its_own(tmp_path: Path) -> None:
    """The others stay dense, their rows moved together; its unknown values are rows of its table."""
    _, batch = opened(recipe_of(tmp_path))
    work, same = opened(recipe_of(tmp_path, tables={"shops": {"columns": ["shop", "colour"]}}))
    sizes = [n + 1 for n in (COLOURS, SHOPS, len(np.unique(batch["categorical"][:, 2])))]
    starts = np.cumsum([0, *sizes])
    assert work.model.columns.sizes == (work.model.columns.sizes[0],) and work.model.columns.vectors == {"colour": 4, "shop": 4}
    assert np.array_equal(same["categorical"][:, 0], batch["categorical"][:, 2] - starts[2])
    assert np.array_equal(same["bags"]["shop"].ids, batch["categorical"][:, 1] - starts[1])
    assert np.array_equal(same["bags"]["colour"].ids, batch["categorical"][:, 0] + sizes[1])
    assert work.tables is not None and work.tables.specs[0].vocabulary == sizes[0] + sizes[1]
    for bags in same["bags"].values():
        bags.check(work.tables.specs[0])


def test_a_vocabulary_says_which_row_a_value_has(tmp_path: Path) -> None:
    """Of the dense table, or of the table that the column lies in: what `elastic export` writes down."""
    for tables in ({"shops": {"columns": ["shop"]}}, {"both": {"columns": ["user", "colour"]}}, {}):
        recipe = recipe_of(tmp_path, data={"tables": "dense"}, tables=tables)
        work, batch = opened(recipe)
        known = vocabularies_of(prepare(recipe), recipe.data, recipe.model.config, recipe.tables)
        read = pq.read_table(tmp_path / "t.parquet")
        epochs, rows = work.sampler.locate(work.sampler.positions(1, 0))
        columns = iter(batch["categorical"].T)
        for name in ("colour", "shop", "user"):
            found = batch["bags"][name].ids if name in batch.get("bags", {}) else next(columns)
            assert [known[name][str(read[name][row])] for row in rows.tolist()] == found.tolist(), name


def test_where_columns_lie_is_decided_by_sizes_alone_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path)
    assert "placed" not in prepare(recipe) and not prepare(recipe)["notes"]
    total = sum(prepare(recipe)["sizes"])
    monkeypatch.setattr(placing, "MOST_DENSE", total)
    assert "placed" not in prepare(recipe)
    monkeypatch.setattr(placing, "MOST_DENSE", total - 1)
    info = prepare(recipe)
    assert [place["name"] for place in info["placed"]["places"]] == ["embedding"] and info["placed"]["dense"] == []
    assert info["notes"] == [f'data.tables = "auto" is "rows": the columns of data.categorical have {total} rows together, and up to '
                             f"{total - 1} stay a dense embedding on every worker."]
    assert "placed" not in prepare(recipe_of(tmp_path, data={"tables": "dense"}))
    for changes in ({"mesh": {"tensor": 2}}, {"optimizer": {"ema": 0.9}}, {"elastic": {"reduction": "fast"}}):
        assert "placed" not in prepare(recipe_of(tmp_path, **changes)), "the recipe asks for what tables cannot"
    rest = prepare(recipe_of(tmp_path, tables={"users": {"columns": ["user"]}}))
    assert rest["placed"]["dense"] == [0, 1], "the other columns are small"
    assert prepare(recipe)["key"] == info["key"] and MOST_DENSE == 1 << 20


@pytest.mark.parametrize(("arch", "changes", "says"), [
    ("dlrm", {"tables": {"users": {"columns": ["id"], "width": 8}}}, "tables.users.width = 8 differs from data.embedding_dim = 4"),
    ("mf", {"tables": {"users": {"columns": ["id"], "width": 8}}}, "tables.users.width = 8 differs from data.embedding_dim = 4"),
    ("lr", {"tables": {"users": {"columns": ["id"], "width": 8}}}, 'tables.users.width = 8 has no meaning under model.arch = "lr"'),
    ("dlrm", {"tables": {"embedding": {"columns": ["id"]}}, "data": {"tables": "rows"}}, "[tables.embedding] has the name of the table"),
])
def test_tables_that_a_model_cannot_read_are_refused(arch: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    recipe_of(tmp_path)
    source = pa.table({"click": [0, 1], "age": [0.5, 1.5], "id": [5, 6], "colour": ["a", "b"], "shop": ["a", "b"], "user": [1, 2]})
    write(tmp_path / "t.parquet", source)
    with pytest.raises(RecipeError) as caught:
        prepare(recipe_of(tmp_path, model={"arch": arch}, **changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_cross_layers_take_tables_of_any_width(tmp_path: Path) -> None:
    work, batch = opened(recipe_of(tmp_path, model={"arch": "dcn", "embedding_init": "uniform:0.5"}, data={"categorical": ["colour"]},
                                   tables={"users": {"columns": ["user"], "width": 7}, "shops": {"columns": ["shop"]}}))
    assert work.tables is not None
    assert [(spec.name, spec.width, spec.init) for spec in work.tables.specs] == [("shops", 4, "uniform:0.5"), ("users", 7, "uniform:0.5")]
    assert work.model.parameters["cross0.weight"].shape == (16, 16)
    still = opened(recipe_of(tmp_path, model={"embedding_init": "normal:0"}, tables={"users": {"columns": ["user"]}},
                             data={"categorical": ["colour"]}))[0]
    assert still.tables is not None and still.tables.specs[0].init == "zeros"
    rows = {"rows/shop": np.ones((16, 4)), "rows/user": np.full((16, 7), 2.0)}
    loss, slopes = passed(work, {**initial_values(work.model.parameters, 3, {}), **rows}, batch)
    assert np.isfinite(loss) and slopes["rows/user"].shape == (16, 7) and np.abs(slopes["rows/user"]).max() > 0
