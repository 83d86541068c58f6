"""Tables of labels, categories and numbers: what comes out of a file, by an oracle that reads it with the csv module."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic.errors import RecipeError, UserError
from elastic.model.initial import initial_values
from elastic.recipe import parse
from recommender.data import HASHED_ROWS, open_dataset, prepare
from recommender.dlrm import build

HEADER = ["label", "colour", "shop", "price", "weight", "time"]


def rows(size: int, seed: int = 0) -> list[list[Any]]:
    random = np.random.default_rng(seed)
    return [[int(random.random() < 0.3), str(random.choice(["red", "green", "blue"])), int(random.integers(0, 40)),
             round(float(random.normal()), 3),
             round(float(random.exponential(1000)), 1), n] for n in range(size)]


def write(file: Path, table: list[list[Any]], header: bool = True, delimiter: str = ",") -> Path:
    with open(file, "w", newline="") as out:
        writer = csv.writer(out, delimiter=delimiter)
        writer.writerows([HEADER, *table] if header else table)
    return file


def section(path: Path, evaluation: Path | None = None, **changes: Any) -> Any:
    """`[data]` of a recipe."""
    data = {"format": path.suffix[1:].replace("tsv", "csv"), "path": str(path), "label": "label",
            "categorical": ["colour", "shop"],
            "numeric": ["price", "weight"], "eval_fraction": 0.2,
            **({"eval_path": str(evaluation)} if evaluation else {}), **changes}
    return parse({"model": {"kind": "recommender.dlrm"}, "data": data}).data


def opened(data: Any, cache: Path, loss: str = "binary") -> tuple[dict[str, Any], dict[str, np.ndarray],
                                                                  dict[str, np.ndarray]]:
    """Facts, and all rows of both splits."""
    info = prepare(data, {"loss": loss}, cache)
    out = []
    for split in ("train", "eval"):
        dataset = open_dataset(info, split)
        dataset.hiding = np.zeros_like(dataset.hiding)  # has tests of its own
        every = np.arange(dataset.num_samples)
        out.append(dataset.batch(every, np.zeros_like(every)))
    return info, out[0], out[1]


def expected(training: list[list[Any]], table: list[list[Any]]) -> dict[str, np.ndarray]:
    """What the rows become under a vocabulary, with values all known."""
    out, start = [], 0
    for column in (1, 2):
        known = list(dict.fromkeys(row[column] for row in training))
        out.append([start + known.index(row[column]) for row in table])
        start += len(known) + HASHED_ROWS
    numbers = np.array([row[3:5] for row in training])
    found = (np.array([row[3:5] for row in table]).reshape(-1, 2) - numbers.mean(0)) / numbers.std(0)
    return {"label": np.array([row[0] for row in table], np.float32), "categorical": np.array(out).T, "numeric": found}


def assert_rows(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    assert np.array_equal(found["label"], wanted["label"]) and np.array_equal(found["categorical"], wanted["categorical"])
    assert found["label"].dtype == found["numeric"].dtype == np.float32
    np.testing.assert_allclose(found["numeric"], wanted["numeric"], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "arrow"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    table = rows(500)
    file, changes = tmp_path / f"t.{suffix}", {}
    if suffix in ("csv", "tsv"):
        write(file, table, delimiter="\t" if suffix == "tsv" else ",")
        changes = {"delimiter": "\t"} if suffix == "tsv" else {}
    else:
        whole = pa.table({name: [row[n] for row in table] for n, name in enumerate(HEADER)})
        if suffix == "parquet":
            pq.write_table(whole, file, row_group_size=77)
        else:
            with pa.ipc.new_file(file, whole.schema) as out:
                out.write_table(whole, 77)
    info, training, evaluation = opened(section(file, **changes), tmp_path / "cache")
    assert (info["num_rows"], info["num_eval_rows"]) == (400, 100)
    assert_rows(training, expected(table[:400], table[:400]))
    assert_rows(evaluation, expected(table[:400], table[400:]))
    again = prepare(section(file, **changes), {}, tmp_path / "cache")
    assert again == info
    other = prepare(section(file, **changes), {}, tmp_path / "another")
    assert other["key"] == info["key"] and other["folder"] != info["folder"]


def test_a_file_without_names_with_spaces_and_comments(tmp_path: Path) -> None:
    table = rows(60)
    file = tmp_path / "t.csv"
    lines = [", ".join("yes." if n == 0 and value else "no." if n == 0 else str(value) for n, value in enumerate(row))
             for row in table]
    file.write_text("| a word before\n" + "\n".join(lines) + "\n\n")
    data = section(file, names=HEADER, comment="|", positive=["yes", "yes."], negative=["no", "no."])
    _, training, _ = opened(data, tmp_path / "cache")
    assert_rows(training, expected(table[:48], table[:48]))


def test_splits(tmp_path: Path) -> None:
    table = rows(300)
    np.random.default_rng(1).shuffle(table)
    file = write(tmp_path / "t.csv", table)
    labels = np.array([row[0] for row in table])
    _, training, evaluation = opened(section(file, split="random"), tmp_path / "cache")
    assert (len(training["label"]), len(evaluation["label"])) == (240, 60)
    both = np.sort(np.concatenate([training["numeric"][:, 1], evaluation["numeric"][:, 1]]))
    assert len(np.unique(both)) > 250 and not np.array_equal(evaluation["label"], labels[240:])
    _, training, evaluation = opened(section(file, split="time", split_column="time"), tmp_path / "cache")
    late = np.array([row[5] >= 240 for row in table])
    assert np.array_equal(evaluation["label"], labels[late]) and np.array_equal(training["label"], labels[~late])
    data = section(file, split="column", split_column="colour", eval_values=["red"], categorical=["shop"])
    info, training, evaluation = opened(data, tmp_path / "cache")
    red = np.array([row[1] == "red" for row in table])
    assert np.array_equal(evaluation["label"], labels[red]) and np.array_equal(training["label"], labels[~red])
    official = write(tmp_path / "e.csv", rows(50, 9))
    info, training, evaluation = opened(section(file, official), tmp_path / "cache")
    assert (info["num_rows"], info["num_eval_rows"]) == (300, 50)
    assert_rows(evaluation, expected(table, rows(50, 9)))


def test_values_outside_the_vocabulary(tmp_path: Path) -> None:
    table, later = rows(200), rows(40, 5)
    for row in later[::2]:
        row[1] = f"mauve {row[5] % 6}"
    files = write(tmp_path / "t.csv", table), write(tmp_path / "e.csv", later)
    info, _, evaluation = opened(section(*files, oov="row"), tmp_path / "cache")
    assert info["sizes"][0] == 4 and set(evaluation["categorical"][::2, 0]) == {3}
    info, _, evaluation = opened(section(*files, oov="hash"), tmp_path / "cache")
    unknown = evaluation["categorical"][::2, 0]
    assert info["sizes"][0] == 3 + HASHED_ROWS and unknown.min() >= 3 and unknown.max() < 3 + HASHED_ROWS and len(set(unknown)) > 1
    assert evaluation["categorical"][1::2, 0].max() < 3
    with pytest.raises(UserError, match=r"data.oov = \"error\": the column \"colour\" of .*e.csv holds 'mauve 0' in row 0 .*no training row"):
        prepare(section(*files, oov="error"), {}, tmp_path / "cache")
    assert prepare(section(files[0], eval_fraction=0.0, oov="error"), {}, tmp_path / "cache")["sizes"][0] == 3
    rare = [*table, [0, "violet", 1, 0.0, 1.0, 0]]
    info, training, _ = opened(section(write(tmp_path / "r.csv", rare), min_count=2, oov="row", eval_fraction=0.0),
                               tmp_path / "cache")
    assert info["sizes"][0] == 4 and training["categorical"][-1,
                                                             0] == 3 and set(training["categorical"][:-1, 0]) == {0, 1, 2}


def test_times_of_any_unit_are_one(tmp_path: Path) -> None:
    """The same days as dates, in seconds with a zone and in nanoseconds, a file each; then as CSV writes them."""
    days = np.random.default_rng(3).permutation(40)
    since = np.datetime64("1969-12-20") + days
    table, kinds = rows(40), [pa.date32(), pa.timestamp("s", "Europe/Paris"), pa.timestamp("ns"), pa.date64()]
    wanted = np.flatnonzero(days >= 32)
    for n, kind in enumerate(kinds):
        chosen = range(10 * n, 10 * n + 10)
        columns = {name: [table[row][place] for row in chosen] for place, name in enumerate(HEADER[:5])}
        columns["time"] = pa.array(since[chosen].astype("datetime64[us]")).cast(kind)
        pq.write_table(pa.table(columns), tmp_path / f"{n}.parquet")
    lines = [[*row[:5], f"{day} 12:30:00"] for row, day in zip(table, since)]
    for path in (tmp_path / "*.parquet", write(tmp_path / "t.csv", lines)):
        data = section(path, format="csv" if path.suffix == ".csv" else "parquet", split="time", split_column="time")
        _, _, evaluation = opened(data, tmp_path / "cache")
        np.testing.assert_array_equal(evaluation["label"], [table[row][0] for row in wanted])
        assert len(np.unique(evaluation["numeric"][:, 1])) == len(wanted)


def test_hashed_columns(tmp_path: Path) -> None:
    table = rows(400)
    info, training, evaluation = opened(section(write(tmp_path / "t.csv", table), buckets={"shop": 16}),
                                        tmp_path / "cache")
    assert info["sizes"] == [3 + HASHED_ROWS, 16]
    found = np.concatenate([training["categorical"], evaluation["categorical"]])[:, 1] - info["sizes"][0]
    assert found.min() >= 0 and found.max() < 16 and len(set(found)) > 8
    by_shop = {row[2]: number for row, number in zip(table, found.tolist())}
    assert [by_shop[row[2]] for row in table] == found.tolist(), "one value, one row"


def test_logarithms_and_missing_values(tmp_path: Path) -> None:
    table = rows(100)
    table[7][4], table[9][1] = "", ""
    file = write(tmp_path / "t.csv", table)
    with pytest.raises(UserError, match=r'the column "weight" of .*t.csv has no value in row 7 '):
        prepare(section(file), {}, tmp_path / "cache")
    with pytest.raises(UserError, match=r'the column "colour" of .*t.csv has no value in row 9 '):
        prepare(section(file, numeric=["price"]), {}, tmp_path / "cache")
    info, training, _ = opened(section(file, nulls="fill", log=["weight"], eval_fraction=0.0), tmp_path / "cache")
    assert info["sizes"][0] == 4 + HASHED_ROWS and training["categorical"][9, 0] not in training["categorical"][[0, 1, 2, 3, 4, 5], 0]
    assert training["numeric"][7, 1] == 0.0
    numbers = np.log1p([row[4] for row in table if row[4] != ""])
    np.testing.assert_allclose(np.delete(training["numeric"][:, 1], 7), (numbers - numbers.mean()) / numbers.std(),
                               atol=1e-5)


@pytest.mark.parametrize(("column", "value", "words"), [
    (0, 2, r"holds 2.0 in row 7 \(counted from 0\); it must be 0 or 1"),
    (0, "", r'"label" of .*t.csv has no value in row 7 '),
    (3, "inf", r'"price" of .*t.csv holds inf in row 7 '),
    (3, "-4e38", r'"price" of .*t.csv holds -4e\+38 in row 7 .*a finite number below 3.4e38'),
    (0, "yes", r'"label" of .*t.csv holds texts; list'),
    (3, "dear", r'the column "price" of .*t.csv, after row 0, cannot be read')])
def test_bad_rows_are_named(column: int, value: Any, words: str, tmp_path: Path) -> None:
    table = rows(30)
    table[7][column] = value
    with pytest.raises(UserError, match=words) as caught:
        prepare(section(write(tmp_path / "t.csv", table)), {}, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    if value == 2:
        assert opened(section(tmp_path / "t.csv"), tmp_path / "cache", "squared")[1]["label"][7] == 2.0


def test_labels_and_numbers_may_be_true_and_false(tmp_path: Path) -> None:
    table = rows(40)
    words = [["true" if row[0] else "false", *row[1:3], "True" if row[3] > 0 else "False", *row[4:]] for row in table]
    _, training, _ = opened(section(write(tmp_path / "t.csv", words), eval_fraction=0.0), tmp_path / "cache")
    assert np.array_equal(training["label"], [row[0] for row in table])
    assert np.array_equal(training["numeric"][:, 0] > 0, [row[3] > 0 for row in table])


def test_a_label_beyond_float32_is_named(tmp_path: Path) -> None:
    table = rows(30)
    table[7][0] = 1e39
    with pytest.raises(UserError, match=r'"label" of .*t.csv holds 1e\+39 in row 7 .*a finite number below'):
        prepare(section(write(tmp_path / "t.csv", table)), {"loss": "squared"}, tmp_path / "cache")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    colours = pa.array([b"red", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"label": [0, 1], "colour": colours, "shop": [1, 2], "price": [0.5, 1.0],
                             "weight": [1.0, 2.0]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet cannot be read .*Invalid UTF8"):
        prepare(section(tmp_path / "t.parquet"), {}, tmp_path / "cache")


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    """Of those that are read; others may."""
    (tmp_path / "t.csv").write_text("label,colour,shop,price,weight,,\n" + "0,a,1,2,3,,\n1,b,2,3,4,,\n" * 5)
    assert len(opened(section(tmp_path / "t.csv"), tmp_path / "cache")[1]["label"]) == 8
    (tmp_path / "t.csv").write_text("label,colour,shop,price,weight,colour\n" + "0,a,1,2,3,b\n" * 5)
    with pytest.raises(UserError, match='data.categorical: .*t.csv has two columns named "colour"; rename one of them'):
        prepare(section(tmp_path / "t.csv"), {}, tmp_path / "cache")


def test_bad_declarations_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", rows(30))
    with pytest.raises(UserError, match=r'data.numeric: .*t.csv has no column "size"; it has label: '):
        prepare(section(file, numeric=["size"]), {}, tmp_path / "cache")
    with pytest.raises(UserError, match=r"holds '0' in row \d+ .* add it to data.negative"):
        prepare(section(file, negative=["no"], positive=["1"]), {}, tmp_path / "cache")
    table = pa.table({"label": [0, 1], "colour": [[1], [2]], "shop": [1, 2], "price": [0.5, 1.0], "weight": [1.0, 2.0]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r'data.categorical: the column "colour" of .*t.parquet is list<.*no category'):
        prepare(section(tmp_path / "t.parquet"), {}, tmp_path / "cache")
    for changes, words in (
            ({"label": ""}, "data.label is missing"),
            ({"categorical": [], "numeric": []}, "data.categorical and data.numeric are missing"),
            ({"numeric": ["price", "price"]}, '"price" stands twice'),
            ({"buckets": {"size": 3}}, 'data.buckets names the column "size"'),
            ({"log": ["shop"]}, 'data.log names the column "shop"'), ({"positive": ["1"]}, "needs data.negative"),
            ({"split": "column"}, "data.split_column is missing"),
            ({"split_column": "time"}, 'needs data.split = "column"'),
            ({"eval_values": ["x"]}, "data.eval_values"),
            ({"split": "column", "split_column": "price", "eval_values": ["1"]},
             'data.split_column = "price" is a text under data.split'),
            ({"split": "time", "split_column": "shop"}, 'data.split_column = "shop" is a time under data.split'),
            ({"positive": ["yes", "y"], "negative": ["no", "y"]}, '"y" stands in data.negative and in data.positive'),
            ({"buckets": {"shop": 1 << 31}}, "from 1 to 2\\^31 - 1"),
            ({"eval_path": str(file), "split": "random"}, "exclude each other"),
            ({"names": ["label"]}, "is not among data.names"), ({"min_count": 0}, "data.min_count"),
            ({"columns": ["price"]}, "data.columns")):
        with pytest.raises(RecipeError, match=words):
            section(file, **changes)
    with pytest.raises(RecipeError, match="data.delimiter .* only for CSV"):
        section(tmp_path / "t.parquet", delimiter=";")
    with pytest.raises(RecipeError, match="does not feed"):
        section(tmp_path / "t.parquet", format="text")


NUMBERS = {  # columns that float32 cannot hold apart
    "seconds within 20 minutes": lambda draw: 1_700_000_000 + draw.integers(0, 1200, 400).astype(float),
    "microseconds within a second": lambda draw: 1.7e15 + draw.integers(0, 1_000_000, 400).astype(float),
    "a first value far off": lambda draw: np.r_[1e9, 5e7 + draw.normal(size=399)],
    "tiny": lambda draw: 1e-25 * (1 + 1e-6 * draw.normal(size=400)),
    "constant": lambda draw: np.full(400, 0.1)}


@pytest.mark.parametrize("kind", NUMBERS)
def test_moments_are_found_before_numbers_are_rounded(kind: str, tmp_path: Path) -> None:
    numbers = NUMBERS[kind](np.random.default_rng(0))
    (tmp_path / "t.csv").write_text("t,y\n" + "".join(f"{number!r},{n % 2}\n"
                                                      for n, number in enumerate(numbers.tolist())))
    data = section(tmp_path / "t.csv", label="y", categorical=[], numeric=["t"], eval_fraction=0.0)
    found = opened(data, tmp_path / "cache")[1]["numeric"][:, 0]
    off = numbers - numbers.mean()
    wanted = off / (off.std() if kind != "constant" else 1.0)
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=1e-5)
    assert found.dtype == np.float32 and (kind == "a first value far off"
                                          or len(np.unique(found)) == len(np.unique(numbers)))


def test_columns_that_nothing_reads_are_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "t.csv", rows(60))
    (tmp_path / "in" / ".t.csv.swp").write_text("")
    data = section(tmp_path / "in", format="csv", categorical=["shop"], numeric=["price"])
    hidden, columns = prepare(data, {}, tmp_path / "cache")["notes"]
    assert hidden.startswith("data.path: left out, as hidden") and hidden.endswith(".t.csv.swp")
    assert columns == "data.path: left out, as columns that neither data.categorical nor data.numeric names: colour, weight, time"


def drawn(values: list[str], path: Path) -> Path:
    path.write_text("c,y\n" + "".join(f"{value},{n % 2}\n" for n, value in enumerate(values)))
    return path


VALUES = {  # training values -> which oov
    "two values, often": (["a", "b"] * 500, "hash"), "each value once": ([f"v{n}" for n in range(1000)], "hash"),
    "one of many": (["a"] * 990 + [f"v{n}" for n in range(10)], "row")}


@pytest.mark.parametrize("kind", VALUES)
def test_rows_for_unknown_values_are_trained(kind: str, tmp_path: Path) -> None:
    """Values are fed as unknown by their share, 1/(1 + count) and at least 1 %, differently in each epoch, the same
    whoever asks."""
    values, oov = VALUES[kind]
    data = section(drawn([*values, "new", "newer"], tmp_path / "t.csv"), label="y", categorical=["c"], numeric=[],
                   oov=oov, eval_fraction=2.5 / 1002)
    info = prepare(data, {}, tmp_path / "cache")
    known, extra = len(set(values)), HASHED_ROWS if oov == "hash" else 1
    assert info["sizes"] == [known + extra] and info["num_rows"] == 1000
    training, every = open_dataset(info, "train", 7), np.arange(1000)
    epochs = [training.batch(every, np.full(1000, epoch))["categorical"][:, 0] for epoch in range(40)]
    plain = np.array([list(dict.fromkeys(values)).index(value) for value in values])
    hidden = np.array(epochs) != plain
    assert (np.array(epochs)[hidden] >= known).all() and not np.array_equal(epochs[0], epochs[1])
    share = np.maximum(1 / (1 + np.array([values.count(value) for value in values])), 0.01)
    wanted, spread = 40 * share.sum(), np.sqrt(40 * (share * (1 - share)).sum())
    assert abs(hidden.sum() - wanted) < 5 * spread
    assert set(np.array(epochs)[hidden]) == set(range(known, known + extra))
    some = training.batch(np.array([5, 3, 5]), np.array([2, 1, 0]))["categorical"][:, 0]
    assert some.tolist() == [epochs[2][5], epochs[1][3], epochs[0][5]]
    assert (open_dataset(info, "eval").batch(np.arange(2), np.zeros(2, int))["categorical"] >= known).all()


def test_without_rows_for_unknown_values_none_is_hidden(tmp_path: Path) -> None:
    data = section(drawn(["a", "b"] * 100, tmp_path / "t.csv"), label="y", categorical=["c"], numeric=[], oov="error",
                   eval_fraction=0.0)
    dataset = open_dataset(prepare(data, {}, tmp_path / "cache"), "train")
    for epoch in range(20):
        assert dataset.batch(np.arange(200), np.full(200, epoch))["categorical"][:, 0].tolist() == [0, 1] * 100


def start(model: Any, name: str) -> np.ndarray:
    return initial_values(model.parameters, 3, {})[name]


@pytest.mark.parametrize(("arch", "bias"), [("dlrm", "out.bias"), ("dcn", "out.bias"), ("mf", "bias"), ("lr", "bias")])
@pytest.mark.parametrize("loss", ["binary", "squared"])
def test_the_last_bias_may_start_at_the_labels_mean(arch: str, bias: str, loss: str, tmp_path: Path) -> None:
    labels = [int(n % 7 == 0) if loss == "binary" else 3.5 + n / 9 for n in range(200)]
    (tmp_path / "t.csv").write_text("c,y\n" + "".join(f"v{n % 5},{label}\n" for n, label in enumerate(labels)))
    info = prepare(section(tmp_path / "t.csv", label="y", categorical=["c"], numeric=[]), {"loss": loss},
                   tmp_path / "cache")
    mean = np.mean(labels[:160])
    wanted = np.log(mean / (1 - mean)) if loss == "binary" else mean
    assert start(build({"arch": arch, "loss": loss, "bias_init": "mean"}, info),
                 bias) == pytest.approx(wanted, rel=1e-6)
    assert start(build({"arch": arch, "loss": loss}, info), bias) == 0.0


FACTS = {"sizes": [300, 200], "num_numeric": 0, "embedding_dim": 16}


@pytest.mark.parametrize(("init", "deviation", "limit"),
                         [("normal:0.05", 0.05, np.inf), ("uniform:0.05", 0.05 / np.sqrt(3), 0.05),
                                                          ("", 0.25, np.inf),
                                                          ("normal:0", 0.0, 0.0)])
def test_embeddings_start_as_the_recipe_says(init: str, deviation: float, limit: float) -> None:
    found = start(build({"arch": "mf", "embedding_init": init}, FACTS), "embedding")
    assert found.std() == pytest.approx(deviation,
                                        rel=0.05) and np.abs(found).max() <= limit and abs(found.mean()) <= deviation / 20


@pytest.mark.parametrize(("key", "value"),
                         [("embedding_init", value) for value in ("normal", "uniform:-1", "zipf:1", "normal:x",
                                                                  "normal:nan", 0.05)]
                         + [("bias_init", "median")])
def test_starts_that_cannot_be_meant_are_refused(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"model.{key} = "):
        build({key: value}, FACTS)
