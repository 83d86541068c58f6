"""What embedding tables are looked up by, as both doors give it, against pyarrow's own lists: all formats, kinds of column, ways of shuffling."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from elastic.data import table
from elastic.data.collate import num_rows, sliced
from elastic.data.ids import column_of_ids, ids_of
from elastic.data.jagged import Jagged
from elastic.data.loader import eval_batches, load_batch, rows_of
from elastic.data.sampler import Sampler
from elastic.data.table import Store
from elastic.errors import RecipeError, UserError
from elastic.recipe import Recipe, parse
from elastic.tables.bags import Bags
from elastic.tables.of_recipe import tables_of
from elastic.workload import Workload, open_data, prepare
from tests.support.inprocess import merged
from tests.support.tables import table_recipe, write

SIZE = 230
SCALARS = {"int64": pa.int64(), "int16": pa.int16(), "uint64": pa.uint64(), "text": pa.string(), "wide": pa.large_string(),
           "view": pa.string_view(), "coded": pa.dictionary(pa.int32(), pa.string()), "bool": pa.bool_()}
LISTS = {"lists": pa.list_(pa.int64()), "wide_lists": pa.large_list(pa.int32()), "fixed": pa.list_(pa.int16(), 3),
         "texts": pa.list_(pa.string()), "fixed_texts": pa.list_(pa.large_string(), 2)}
VIEWS = ("view",)  # that Parquet does not keep


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drawn(kind: pa.DataType, luck: np.random.Generator) -> Any:
    if pa.types.is_fixed_size_list(kind):
        return [drawn(kind.value_type, luck) for _ in range(kind.list_size)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [drawn(kind.value_type, luck) for _ in range(luck.integers(0, 5))]
    if pa.types.is_boolean(kind):
        return bool(luck.integers(2))
    if not pa.types.is_integer(kind):
        return str(luck.choice(["", "red", "grün", "a b", "x" * 300]))
    low, high = {8: (-(1 << 63), (1 << 63) - 1), 4: (-(1 << 31), (1 << 31) - 1), 2: (-(1 << 15), (1 << 15) - 1)}[kind.bit_width // 8]
    return int(luck.integers(low, high)) + ((1 << 63) if kind == pa.uint64() else 0)


def source(size: int = SIZE, seed: int = 0) -> pa.Table:
    luck = np.random.default_rng(seed)
    columns = {name: pa.array([drawn(kind, luck) for _ in range(size)], kind) for name, kind in {**SCALARS, **LISTS}.items()}
    return pa.table({"number": np.arange(size) + 1000 * seed, "click": np.arange(size) % 2, **columns})


def id_of(value: Any) -> int:
    """An int64, written out anew."""
    if isinstance(value, str):
        return struct.unpack("<q", struct.pack("<Q", xxhash.xxh3_64_intdigest(value.encode())))[0]
    return struct.unpack("<q", struct.pack("<Q", value))[0] if value >= 1 << 63 else int(value)


def wanted(rows: pa.Table, name: str) -> list[list[int]]:
    return [[id_of(one) for one in (row if isinstance(row, list) else [row])] for row in rows[name].to_pylist()]


def listed(bags: Bags) -> list[list[int]]:
    assert bags.ids.dtype == bags.offsets.dtype == np.int64 and bags.offsets[0] == 0 and bags.weights is None
    return [bags.ids[low:high].tolist() for low, high in pairwise(bags.offsets)]


def names_in(format: str) -> list[str]:
    if format == "csv":
        return ["int64", "text"]
    return [name for name in (*SCALARS, *LISTS) if format == "arrow" or name not in VIEWS]


def fitting(rows: pa.Table, format: str) -> pa.Table:
    return rows.select(["number", "click", *names_in(format)])


def own(paths: list[Path], names: list[str], **changes: Any) -> Recipe:
    """The first column has a table to itself."""
    tables = {"one": {"columns": names[:1]}, **({"some": {"columns": names[1:], "pooling": "mean"}} if names[1:] else {})}
    return table_recipe(paths, **merged({"run": {"epochs": 1, "steps": None}, "data": {"batch_size": 64}, "tables": tables},
                                        changes))


def fed(recipe: Recipe) -> tuple[list[int], dict[str, list[list[int]]]]:
    """One epoch: the rows by their number, and what each looked up."""
    info = prepare(recipe)
    training, _, _ = open_data(recipe, info)
    tables = tables_of(recipe, info)
    assert tables is not None
    numbers, found = list[int](), {one.name: list[list[int]]() for one in tables.features}
    for step in range(1, -(-SIZE * len(recipe.data.path) // 64) + 1):
        for shard in range(8):
            batch = load_batch(training, sampler(recipe, training), step, shard)
            numbers += batch["number"].tolist()
            assert set(batch["bags"]) == set(found) and not set(batch) & set(found)
            for name, bags in batch["bags"].items():
                found[name] += listed(bags)
    return numbers, found


def sampler(recipe: Recipe, training: Any) -> Sampler:
    return Sampler(training.num_samples, 64, 8, 3, recipe.data.shuffle, 1, None, training.order)


@pytest.mark.parametrize(("format", "changes"), [
    *[(format, {"shuffle_by": way}) for format in ("parquet", "arrow") for way in ("rows", "blocks")],
    ("parquet", {"shuffle": False}), ("arrow", {"shuffle": False}), ("csv", {}), ("csv", {"shuffle": False})])
def test_every_kind_of_column_becomes_ids(format: str, changes: dict[str, Any], tmp_path: Path) -> None:
    parts = [fitting(source(seed=seed), format) for seed in range(2)]
    paths = [write(tmp_path / f"{seed}.{format}", part, 57) for seed, part in enumerate(parts)]
    numbers, found = fed(own(paths, names_in(format), data=changes))
    whole = pa.concat_tables(parts)
    assert sorted(numbers) == whole["number"].to_pylist()
    places = [whole["number"].to_pylist().index(number) for number in numbers]
    for name, lists in found.items():
        expected = wanted(whole, name)
        assert lists == [expected[place] for place in places], name


def test_lists_of_an_arrow_file_are_used_where_they_lie(tmp_path: Path) -> None:
    """Nothing is converted, and what is mapped is the file's own memory."""
    path = write(tmp_path / "t.arrow", source().select(["number", "lists", "wide_lists", "fixed", "int64"]), 57)
    recipe = own([path], ["lists", "wide_lists", "fixed", "int64"], data={"columns": ["number"]})
    info = prepare(recipe)
    assert sorted(file.name for file in Path(info["folder"]).iterdir()) == [".lock", "facts.json"]
    training, _, _ = open_data(recipe, info)
    assert isinstance(training, table.Table)
    store: Store = training.store
    mapped = store.map(1)
    for name in ("lists", "wide_lists"):
        assert isinstance(mapped[name], Jagged)
        assert not mapped[name].values.flags.owndata and not mapped[name].values.flags.writeable
    assert mapped["lists"].values.dtype == np.int64 and mapped["wide_lists"].values.dtype == np.int32
    assert mapped["lists"].offsets.dtype == np.int32 and mapped["wide_lists"].offsets.dtype == np.int64


@pytest.mark.parametrize("names", [["text"], ["texts", "int64"], ["coded"]])
def test_texts_of_an_arrow_file_are_hashed(names: list[str], tmp_path: Path) -> None:
    """They lie there as they are, and are no ids as they lie."""
    rows = source().select(["number", *names])
    numbers, found = fed(own([write(tmp_path / "t.arrow", rows, 57)], names))
    for name in names:
        assert [found[name][numbers.index(number)] for number in range(SIZE)] == wanted(rows, name)


@pytest.mark.parametrize("kind", LISTS)
def test_slices_of_lists_are_theirs_alone(kind: str) -> None:
    rows = source()
    array = rows[kind].combine_chunks()
    known = column_of_ids("tables", "here", rows.schema.field(kind))
    for low, count in ((0, 0), (0, 5), (7, 20), (SIZE - 3, 3)):
        found = ids_of(array.slice(low, count), known, "here", 0)
        bags = [part.tolist() for part in found] if isinstance(found, np.ndarray) else [
            found.values[a:b].tolist() for a, b in pairwise(found.offsets)]
        assert bags == wanted(rows.slice(low, count), kind)


def clicking(path: Path, **changes: Any) -> Recipe:
    base = {"run": {"epochs": 1, "eval_every": 0}, "model": {"kind": "recommender.dlrm"},
            "data": {"format": path.suffix[1:], "path": str(path), "label": "click", "numeric": ["number"], "batch_size": 64}}
    return parse(merged(base, changes))


@pytest.mark.parametrize("format", ["parquet", "arrow", "csv"])
def test_recommenders_read_growing_columns(format: str, tmp_path: Path) -> None:
    """Each row's, over both splits; a CSV's texts are trimmed, and none may be empty."""
    rows = fitting(source(), format)
    if format == "csv":
        rows = rows.set_column(rows.schema.get_field_index("text"), "text",
                               pa.array([f" t{text}" for text in rows["text"].to_pylist()]))
    recipe = clicking(write(tmp_path / f"t.{format}", rows, 57), tables={"all": {"columns": names_in(format)}})
    opened = Workload.open(recipe, prepare(recipe))
    assert opened.tables is not None and [one.name for one in opened.tables.features] == sorted(names_in(format))
    assert opened.evaluation is not None
    for data, low, count in ((opened.training, 0, 207), (opened.evaluation, 207, 23)):
        assert data.num_samples == count
        batch = data.batch(np.arange(count), np.zeros(count, np.int64))
        assert set(batch) == {"label", "numeric", "bags"}
        for name in names_in(format):
            expected = wanted(rows.slice(low, count), name)
            if format == "csv" and name == "text":
                expected = [[id_of(f"t{text}".strip())] for text in source()["text"].slice(low, count).to_pylist()]
            assert listed(batch["bags"][name]) == expected, name


def test_lists_to_evaluate_on_may_be_told_apart_by_a_growing_column(tmp_path: Path) -> None:
    rows = source()
    recipe = clicking(write(tmp_path / "t.parquet", rows), data={"group": "int16"}, tables={"one": {"columns": ["int16", "text"]}})
    evaluation = open_data(recipe, prepare(recipe))[1]
    assert evaluation is not None
    batch = evaluation.batch(np.arange(23), np.zeros(23, np.int64))
    assert listed(batch["bags"]["int16"]) == wanted(rows.slice(207), "int16")
    assert len(set(zip(batch["group"].tolist(), batch["bags"]["int16"].ids.tolist()))) == len(set(batch["group"].tolist()))


def test_filler_rows_are_marked(tmp_path: Path) -> None:
    recipe = clicking(write(tmp_path / "t.parquet", source()), tables={"all": {"columns": ["lists"]}})
    opened = Workload.open(recipe, prepare(recipe))
    last = load_batch(opened.training, opened.sampler, opened.sampler.num_steps, 3)
    real = last["row_weight"] > 0
    assert 0 < real.sum() < real.size or not real.any()
    assert last["bags"]["lists"].is_filler.tolist() == (~real).tolist() and last["bags"]["lists"].size == real.size
    assert load_batch(opened.training, opened.sampler, 1, 0)["bags"]["lists"].is_filler is None
    assert opened.evaluation is not None
    final = eval_batches(opened.evaluation, 16)[-1]()
    assert final["bags"]["lists"].is_filler.tolist() == [False] * 7 + [True] * 9


def test_a_users_rows_are_real_ones_only(tmp_path: Path) -> None:
    recipe = own([write(tmp_path / "t.parquet", source())], ["lists", "int64"])
    training, _, _ = open_data(recipe, prepare(recipe))
    batch = rows_of(training, np.array([3, -1, 5, -1]), np.zeros(4, np.int64))
    assert listed(batch["bags"]["lists"]) == [wanted(source(), "lists")[row] for row in (3, 5)]
    assert batch["bags"]["int64"].is_filler is None and batch["bags"]["int64"].pooling == "mean"
    none = rows_of(training, np.array([-1, -1]), np.zeros(2, np.int64))
    assert none["bags"]["lists"].size == 0 and none["bags"]["lists"].ids.size == 0


@pytest.mark.parametrize(("name", "length", "says"), [("lists", 3, "has a list of 4 in row"), ("fixed", 2, "has a list of 3 in row 0"),
                                                      ("lists", 4, ""), ("fixed", 3, ""), ("int64", 1, "")])
def test_lists_that_are_not_pooled_have_a_length(name: str, length: int, says: str, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{seed}.parquet", source(seed=seed).select(["number", name]), 57) for seed in range(2)]
    recipe = own(paths, [name], tables={"one": {"columns": [name], "pooling": "none", "length": length}})
    if not says:
        bags = open_data(recipe, prepare(recipe))[0].batch(np.arange(9), np.zeros(9, np.int64))["bags"][name]
        assert bags.shape(5) == (9, length, 5)
        return
    with pytest.raises(UserError) as caught:
        prepare(recipe)
    said = str(caught.value)
    assert said.startswith(f'tables.one.length = {length}: the column "{name}" {says}') and "\n" not in said
    first = next(row for row, ids in enumerate(wanted(pa.concat_tables([source(), source(seed=1)]), name)) if len(ids) > length)
    assert f"in row {first} (counted" in said


def test_a_model_may_read_nothing_but_tables(tmp_path: Path) -> None:
    rows = source().select(["int64", "lists"])
    recipe = own([write(tmp_path / "t.parquet", rows)], ["int64", "lists"])
    training, _, _ = open_data(recipe, prepare(recipe))
    batch = training.batch(np.arange(5), np.zeros(5, np.int64))
    assert set(batch) == {"bags"} and num_rows(batch) == 5 and num_rows(sliced(batch, 1, 3)) == 2
    assert listed(sliced(batch, 1, 3)["bags"]["lists"]) == wanted(rows, "lists")[1:3]


def test_a_run_of_bags_is_theirs_alone() -> None:
    bags = Bags(np.arange(6), np.array([0, 2, 2, 5, 6]), np.arange(6, dtype=np.float32), "none", 3, np.array([False, True, False, True]))
    part = bags[1:3]
    assert (part.ids.tolist(), part.offsets.tolist(), part.pooling, part.length) == ([2, 3, 4], [0, 0, 3], "none", 3)
    assert part.weights is not None and part.weights.tolist() == [2, 3, 4]
    assert part.is_filler is not None and part.is_filler.tolist() == [True, False]
    assert bags[0:4].ids.tolist() == bags.ids.tolist() and bags[2:2].size == 0


def nulled(kind: pa.DataType, row: int, value: Any) -> pa.Table:
    values = [[1, 2], [], [3], [4, 5, 6], [7]] if pa.types.is_list(kind) else [[1, 2]] * 5 if pa.types.is_nested(kind) else [1, 2, 3, 4, 5]
    values[row] = value
    return pa.table({"number": np.arange(5), "click": [0, 1, 0, 1, 0], "x": pa.array(values, kind)})


@pytest.mark.parametrize(("kind", "row", "value", "says"), [
    (pa.int64(), 3, None, "has no value in row 3"), (pa.list_(pa.int64()), 2, None, "has no value in row 2"),
    (pa.list_(pa.int64()), 3, [4, None, 6], "has a list that lacks a value in row 3"),
    (pa.list_(pa.int64()), 0, [None], "has a list that lacks a value in row 0"),
    (pa.list_(pa.int64(), 2), 4, [1, None], "has no value in row 4")])
@pytest.mark.parametrize("format", ["parquet", "arrow"])
@pytest.mark.parametrize("way", ["own", "recommender"])
def test_a_missing_id_is_refused_with_file_column_and_row(way: str, format: str, kind: pa.DataType, row: int, value: Any,
                                                          says: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"t.{format}", nulled(kind, row, value), 2)
    recipe = own([path], ["x"]) if way == "own" else clicking(path, tables={"one": {"columns": ["x"]}})
    with pytest.raises(UserError) as caught:
        prepare(recipe)
    assert f'the column "x" of {path} {says} (counted from 0)' in str(caught.value) and "\n" not in str(caught.value)


def test_missing_ids_are_filled_where_the_recipe_says_so(tmp_path: Path) -> None:
    """A missing value is one of its own, a missing list has none; within a list one is refused all the same."""
    lists = pa.array([[1], None, [2, 3], []], pa.list_(pa.int64()))
    rows = pa.table({"click": [0, 1, 0, 1], "number": [1, 2, 3, 4], "list": lists, "one": pa.array([5, None, 6, None], pa.int32()),
                     "word": ["a", None, "b", "a"]})
    recipe = clicking(write(tmp_path / "t.parquet", rows), data={"nulls": "fill", "eval_fraction": 0.0},
                      tables={"all": {"columns": ["list", "one", "word"]}})
    bags = open_data(recipe, prepare(recipe))[0].batch(np.arange(4), np.zeros(4, np.int64))["bags"]
    missing = id_of("\0missing")
    assert listed(bags["list"]) == [[1], [], [2, 3], []] and listed(bags["one"]) == [[5], [missing], [6], [missing]]
    assert listed(bags["word"]) == [[id_of("a")], [missing], [id_of("b")], [id_of("a")]]
    lacking = rows.set_column(2, "list", pa.array([[1], [None], [2], []], pa.list_(pa.int64())))
    write(tmp_path / "t.parquet", lacking)
    with pytest.raises(UserError, match="has a list that lacks a value in row 1"):
        prepare(recipe)


@pytest.mark.parametrize("way", ["own", "recommender"])
@pytest.mark.parametrize(("column", "says"), [
    (pa.array([1.5, 2.0]), 'the column "x" of {} is double, and an embedding table is looked up by whole numbers'),
    (pa.array([[1.5], []]), 'the column "x" of {} is list<'), (pa.array([[[1]], []]), 'the column "x" of {} is list<'),
    (pa.array([0, 1], pa.timestamp("us")), 'the column "x" of {} is timestamp'), (None, '{} has no column "x"')])
def test_a_column_that_cannot_be_looked_up_is_refused(way: str, column: pa.Array | None, says: str, tmp_path: Path) -> None:
    rows = pa.table({"number": [1, 2], "click": [0, 1], **({} if column is None else {"x": column})})
    path = write(tmp_path / "t.parquet", rows)
    recipe = own([path], ["x"]) if way == "own" else clicking(path, tables={"one": {"columns": ["x"]}})
    with pytest.raises(UserError) as caught:
        prepare(recipe)
    assert f"tables.one.columns: {says.format(path)}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["own", "recommender"])
def test_a_text_among_a_csvs_whole_numbers_is_refused(way: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    lines = [f"{n},{n % 2},{n}" for n in range(200_000)]
    path.write_text("\n".join(["number,click,x", *lines, "1,1,red"]) + "\n")
    recipe = own([path], ["x"]) if way == "own" else clicking(path, tables={"one": {"columns": ["x"]}})
    with pytest.raises(UserError) as caught:
        prepare(recipe)
    said = str(caught.value)
    assert f'tables.one.columns: the column "x" of {path}, after row ' in said and "than the whole numbers" in said and "\n" not in said


def test_files_hold_a_column_alike(tmp_path: Path) -> None:
    for name, column in (("a", pa.array([1, 2])), ("b", pa.array(["x", "y"]))):
        write(tmp_path / f"{name}.parquet", pa.table({"number": [1, 2], "click": [0, 1], "x": column}))
    recipe = clicking(tmp_path / "a.parquet", data={"path": str(tmp_path / "*.parquet")}, tables={"one": {"columns": ["x"]}})
    with pytest.raises(UserError, match='tables.one.columns: the column "x" holds texts in .*b.parquet and whole numbers in'):
        prepare(recipe)
    recipe = own([tmp_path / "a.parquet", tmp_path / "b.parquet"], ["x"])
    with pytest.raises(UserError, match='the column "x" is string in .*b.parquet and int64 in'):
        prepare(recipe)


def test_large_lists_are_cut_into_batches_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.data.convert.BATCH_BYTES", 2000)
    numbers, found = fed(own([write(tmp_path / "t.parquet", source().select(["number", "lists"]), 57)], ["lists"]))
    assert [found["lists"][numbers.index(number)] for number in range(SIZE)] == wanted(source(), "lists")
    stored = pa.ipc.open_file(next((tmp_path / "cache").rglob("part-0.arrow")))
    sizes = [len(batch["number"]) * 8 + batch["lists"].flatten().nbytes for batch in map(stored.get_batch, range(stored.num_record_batches))]
    assert len(sizes) > 2 and max(sizes) < 2000 + 8 * 6 and min(sizes[:-1]) >= 2000


def test_the_same_content_has_the_same_key_wherever_it_lies(tmp_path: Path) -> None:
    keys = []
    for folder, group in (("a", 57), ("b", 57), ("c", 57)):
        (tmp_path / folder).mkdir()
        rows = source(seed=1 if folder == "c" else 0)
        path = write(tmp_path / folder / "t.parquet", rows, group)
        keys.append([prepare(own([path], ["lists", "text"]))["key"], prepare(clicking(path, tables={"one": {"columns": ["lists"]}}))["key"]])
    assert keys[0] == keys[1] and not set(keys[0]) & set(keys[2])


def test_other_columns_are_looked_at_anew(tmp_path: Path) -> None:
    """What the cache knows of a file is of the columns that were asked for."""
    path = write(tmp_path / "t.parquet", source())
    for names in (["lists"], ["int64", "lists"], ["text"]):
        both = own([path], names), clicking(path, tables={"one": {"columns": names}})
        for recipe in both:
            training = open_data(recipe, prepare(recipe))[0]
            batch = training.batch(np.arange(9), np.zeros(9, np.int64))
            assert set(batch["bags"]) == set(names) and not set(names) & set(batch)
            assert listed(batch["bags"][names[0]]) == wanted(source(), names[0])[:9]


def test_a_vocabulary_and_a_growing_column_do_not_share_a_table(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", source())
    recipe = clicking(path, data={"categorical": ["text"]}, tables={"one": {"columns": ["text", "int64"]}})
    with pytest.raises(RecipeError, match='names "text", which is among data.categorical and has a vocabulary, and "int64"'):
        prepare(recipe)
