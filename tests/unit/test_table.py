"""Tables against the Arrow tables they were written from: every format, every way of shuffling, local and remote; and bad ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic.data import index, table
from elastic.data.files import open_system
from elastic.data.loader import eval_batches, load_batch
from elastic.data.sampler import Sampler
from elastic.errors import UserError
from tests.support.s3 import Server, serving
from tests.support.tables import rows, write

SIZE = 1000
FORMATS = ("parquet", "arrow", "csv")


def section(path: Any, **keys: Any) -> SimpleNamespace:
    paths = tuple(str(one) for one in (path if isinstance(path, list) else [path]))
    given = {"format": Path(paths[0]).suffix[1:], "path": paths, "eval_path": (), "eval_fraction": 0.0, "shuffle": True, "shuffle_by": "auto",
             "columns": (), "weights": ()} | keys
    return SimpleNamespace(**given)


def opened(data: SimpleNamespace, cache: Path, seed: int = 3) -> tuple[dict[str, Any], table.Table, table.Table | None]:
    info = table.prepare(data, cache)
    assert json.loads(json.dumps(info)) == info
    return info, *table.open_tables(info, data, cache, seed)


def epoch_of(data: table.Table) -> dict[str, np.ndarray]:
    """One epoch's rows in the order in which they are fed."""
    sampler = Sampler(data.num_samples, 60, 4, 0, True, epochs=1, order=data.order)
    parts = [load_batch(data, sampler, step, shard) for step in range(1, sampler.num_steps + 1) for shard in range(4)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def plain(source: pa.Table, format: str = "parquet") -> pa.Table:
    """What a CSV can hold."""
    return source.drop_columns(["x", "y"]).append_column("half", pa.array(np.arange(source.num_rows) / 2)) if format == "csv" else source


@pytest.mark.parametrize(("format", "way"), [(f, w) for f in FORMATS for w in ("auto", "rows", "blocks") if (f, w) != ("csv", "blocks")])
@pytest.mark.parametrize("files", [1, 3])
def test_each_row_comes_once_with_all_its_columns(format: str, way: str, files: int, tmp_path: Path) -> None:
    parts = [plain(rows(SIZE + n, first=n * 5000), format) for n in range(files)]
    for n, part in enumerate(parts):
        (tmp_path / "t").mkdir(exist_ok=True)
        write(tmp_path / "t" / f"{n}.{format}", part, 130)
    whole = pa.concat_tables(parts)
    info, training, evaluation = opened(section(tmp_path / "t", format=format, shuffle_by=way), tmp_path / "cache")
    assert evaluation is None and info["num_rows"] == whole.num_rows
    fed = epoch_of(training)
    assert set(fed) == set(whole.column_names) - {"word"}
    back = np.argsort(fed["id"])
    for name, array in fed.items():
        expected = whole[name].to_pylist()
        assert array[back].tolist() == expected, name
        assert array.dtype == (np.bool_ if name == "up" else np.float32 if name in "xy" else np.int64 if name == "id" else np.float64)
    assert fed["id"].tolist() != sorted(fed["id"].tolist())


@pytest.mark.parametrize("format", FORMATS)
def test_the_last_rows_are_set_aside(format: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"t.{format}", plain(rows(SIZE), format), 130)
    _, training, evaluation = opened(section(file, eval_fraction=0.15, columns=("id",)), tmp_path)
    assert sorted(epoch_of(training)["id"].tolist()) == list(range(850))
    assert evaluation is not None and [i for load in eval_batches(evaluation, 32) for i in load()["id"].tolist()] == list(range(850, 1000))


def test_rows_to_evaluate_on_may_come_from_elsewhere(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.parquet", rows(100)), write(tmp_path / "test.parquet", rows(30, first=500))
    info, training, evaluation = opened(section(train, eval_path=(str(test),), eval_fraction=0.5), tmp_path)
    assert evaluation is not None and (info["num_rows"], info["num_eval_rows"]) == (training.num_samples, evaluation.num_samples) == (100, 30)
    assert evaluation.batch(np.arange(30), np.zeros(30))["id"].tolist() == list(range(500, 530))


def test_without_shuffling_rows_keep_their_order_and_nothing_is_converted(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", rows(SIZE), 130)
    info, training, _ = opened(section(file, shuffle=False), tmp_path / "cache")
    assert epoch_of(training)["id"].tolist() == list(range(SIZE))
    assert sorted(os.listdir(info["folder"])) == [".lock", "facts.json"]


def test_an_arrow_file_is_used_where_it_lies(tmp_path: Path) -> None:
    file = write(tmp_path / "t.arrow", rows(SIZE), 130)
    data = section(file, columns=("id", "x"))
    info, training, _ = opened(data, tmp_path / "cache")
    assert info["shuffle_by"] == "rows" and sorted(os.listdir(info["folder"])) == [".lock", "facts.json"]
    assert epoch_of(training)["id"].tolist() == Sampler(SIZE, 60, 4, 3, True, epochs=1).locate(np.arange(SIZE))[1].tolist()
    for options in ({"compression": "zstd"}, {"compression": "lz4"}):  # not as it lies then
        write(file, rows(SIZE), 130, **options)
        info, training, _ = opened(data, tmp_path / "cache")
        assert "part-0.arrow" in os.listdir(info["folder"]) and sorted(epoch_of(training)["id"].tolist()) == list(range(SIZE))


def test_blocks_are_read_one_at_a_time_and_only_their_columns(tmp_path: Path) -> None:
    """An epoch in order decodes every row group once, however many batches share it."""
    file = write(tmp_path / "t.parquet", rows(SIZE), 130)
    _, training, _ = opened(section(file, shuffle_by="blocks", columns=("id", "y")), tmp_path)
    fed = epoch_of(training)
    assert list(fed) == ["id", "y"] and sorted(fed["id"].tolist()) == list(range(SIZE))
    assert training.store.decoded.cache_info().misses == -(-SIZE // 130)


def test_a_batch_without_rows_has_its_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", rows(10))
    batch = opened(section(file), tmp_path)[1].batch(np.array([], np.int64), np.array([], np.int64))
    assert {name: array.shape for name, array in batch.items()} == {"id": (0,), "x": (0, 6), "y": (0, 1), "up": (0,)}


def test_files_are_looked_at_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "t.parquet", rows(100))
    data, cache = section(file), tmp_path / "cache"
    first = table.prepare(data, cache)
    looked: list[Any] = []
    look = index.look
    monkeypatch.setattr(index, "look", lambda *arguments: looked.append(arguments) or look(*arguments))
    assert table.prepare(data, cache) == first and not looked
    os.utime(file, ns=(1, 1))  # touched: another folder, the same content
    second = table.prepare(data, cache)
    assert looked and second["key"] == first["key"] and second["folder"] != first["folder"]
    shutil.move(file, tmp_path / "moved.parquet")
    assert table.prepare(section(tmp_path / "moved.parquet"), cache)["key"] == first["key"]
    write(file, rows(100, first=1))
    assert table.prepare(data, cache)["key"] != first["key"]
    assert table.prepare(section(tmp_path / "moved.parquet", columns=("id",)), cache)["key"] != first["key"]


@pytest.mark.parametrize("harm", ["gone", "short", "facts"])
def test_a_damaged_cache_is_made_again(harm: str, tmp_path: Path) -> None:
    data = section(write(tmp_path / "t.parquet", rows(100)), columns=("id",))
    info = table.prepare(data, tmp_path / "cache")
    part, facts = (Path(info["folder"]) / name for name in ("part-0.arrow", "facts.json"))
    if harm == "gone":
        part.unlink()
    else:
        file = part if harm == "short" else facts
        file.write_bytes(file.read_bytes()[:-20])
    training, _ = table.open_tables(info, data, tmp_path / "cache", 3)
    assert sorted(epoch_of(training)["id"].tolist()) == list(range(100))


def test_another_machine_makes_its_own_cache_and_must_hold_the_same_data(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", rows(100))
    info = table.prepare(section(file), tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    training, _ = table.open_tables(info, section(file), tmp_path / "there", 3)
    assert training.num_samples == 100
    write(file, rows(100, first=7))
    with pytest.raises(UserError, match="holds other data on this machine"):
        table.open_tables(info, section(file), tmp_path / "there", 3)


@pytest.mark.parametrize("format", ["parquet", "arrow", "csv"])
@pytest.mark.parametrize("what", ["one", "folder", "glob"])
def test_a_uri_means_the_same_files(format: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for n in range(2):
        write(tmp_path / "t" / f"{n}.{format}", plain(rows(50, first=n * 50), format), 20)
    (tmp_path / "t" / "_SUCCESS").write_text("")
    uri = (tmp_path / "t").as_uri() + {"one": f"/1.{format}", "folder": "", "glob": f"/*.{format}"}[what]
    way = "rows" if format == "csv" else "blocks"
    info, training, _ = opened(section(uri, format=format, columns=("id",), shuffle_by=way), tmp_path / "cache")
    assert sorted(epoch_of(training)["id"].tolist()) == list(range(50 if what == "one" else 0, 100))


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.mark.parametrize("format", FORMATS)
def test_tables_in_a_bucket(format: str, s3: Server, tmp_path: Path) -> None:
    base, _, options = s3.bucket("/deep/a folder").partition("?")
    (tmp_path / "t").mkdir()
    for n, name in enumerate(("0.x", "1.x", "other.y")):
        file = write(tmp_path / "t" / f"{n}.{format}", plain(rows(50, first=n * 50), format), 20)
        system, inner = open_system(f"{base}?{options}")
        with system.open_output_stream(f"{inner}/{name}") as out:
            out.write(file.read_bytes())
    way = "rows" if format == "csv" else "blocks"
    for path, size in ((f"{base}?{options}", 150), (f"{base}/*.x?{options}", 100), (f"{base}/1.x?{options}", 50)):
        _, training, _ = opened(section(path, format=format, columns=("id",), shuffle_by=way), tmp_path / "cache")
        found = epoch_of(training)["id"].tolist()
        assert len(found) == size and len(set(found)) == size
    local = table.prepare(section(tmp_path / "t", format=format, columns=("id",), shuffle_by=way), tmp_path / "cache")
    assert table.prepare(section(f"{base}?{options}", format=format, columns=("id",), shuffle_by=way), tmp_path / "cache")["key"] == local["key"]
    message = refused(section(f"{base}?{options}", format=format, columns=("no",), shuffle_by=way), tmp_path / "cache")
    assert "/deep/a%20folder/0.x has no column" in message and "test:test" not in message


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.parquet", rows(200, first=1000 * n)) for n in range(3)]
    _, training, evaluation = opened(section(files, weights=(0.5, 0.25, 0.25), eval_fraction=0.1), tmp_path)
    assert evaluation is not None and (training.num_samples, evaluation.num_samples) == (540, 60)
    sampler = Sampler(540, 64, 4, 0, True, steps=64, order=training.order)
    ids = np.concatenate([load_batch(training, sampler, step, shard)["id"] for step in range(1, 65) for shard in range(4)])
    assert np.bincount(ids // 1000).tolist() == [2048, 1024, 1024]
    assert (np.bincount(ids[ids < 1000]) // 2048 <= 12).all() and ids.max() < 2180
    assert sorted(evaluation.batch(np.arange(60), np.zeros(60))["id"].tolist()) == [1000 * n + i for n in range(3) for i in range(180, 200)]


def test_whole_numbers_in_a_csv_may_turn_into_fractions(tmp_path: Path) -> None:
    """Arrow guesses from the first megabyte."""
    values = ["1"] * 300_000 + ["2.5"]
    (tmp_path / "t.csv").write_text("id,v\n" + "".join(f"{n},{value}\n" for n, value in enumerate(values)))
    (tmp_path / "u.csv").write_text("v,id\n0.25,300001\n")
    _, training, _ = opened(section([tmp_path / "t.csv", tmp_path / "u.csv"]), tmp_path)
    found = training.batch(np.arange(299_999, 300_002), np.zeros(3))
    assert found["v"].tolist() == [1.0, 2.5, 0.25] and found["id"].tolist() == [299_999, 300_000, 300_001]


# What cannot serve.


def cast(source: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    return source.set_column(source.column_names.index(name), name, source[name].cast(kind))


def with_null(source: pa.Table, row: int) -> pa.Table:
    return source.set_column(0, "id", pa.array([None if n == row else n for n in range(source.num_rows)], pa.int64()))


def refused(data: SimpleNamespace, cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        _, training, _ = opened(data, cache)
        epoch_of(training)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and message.startswith("data.")
    return message


@pytest.mark.parametrize("way", ["rows", "blocks"])
@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_a_changed_schema_in_the_middle_names_file_and_column(format: str, way: str, tmp_path: Path) -> None:
    sources = [rows(50), rows(50), cast(rows(50), "id", pa.int32()), rows(50)]
    files = [write(tmp_path / f"{n}.{format}", source) for n, source in enumerate(sources)]
    data = section(files, shuffle_by=way)
    assert f'"id" is int32 in {files[2]} and int64 in {files[0]}' in refused(data, tmp_path)
    write(files[2], rows(50).drop_columns(["x"]))
    assert f'{files[2]} has no column "x", which {files[0]} has' in refused(data, tmp_path)
    write(files[2], rows(50).append_column("z", pa.array(np.zeros(50))))
    assert f'{files[2]} has a column "z", which {files[0]} lacks' in refused(data, tmp_path)
    assert table.prepare(section(files, shuffle_by=way, columns=("id", "x")), tmp_path)["num_rows"] == 200
    write(files[2], rows(50).select(["up", "word", "y", "x", "id"]))  # another order of columns is the same table
    assert table.prepare(data, tmp_path)["num_rows"] == 200


@pytest.mark.parametrize("way", ["rows", "blocks"])
@pytest.mark.parametrize("options", [{}, {"write_statistics": False}])
def test_a_missing_value_names_file_column_and_row(options: dict[str, Any], way: str, tmp_path: Path) -> None:
    files = [write(tmp_path / "0.parquet", rows(50)), write(tmp_path / "1.parquet", with_null(rows(50), 37), 20, **options)]
    assert f'the column "id" of {files[1]} has no value in row 37' in refused(section(files, shuffle_by=way), tmp_path)
    assert table.prepare(section(files, columns=("x",), shuffle_by=way), tmp_path)["num_rows"] == 100
    arrow = write(tmp_path / "0.arrow", with_null(rows(50), 37), 20)
    assert f'the column "id" of {arrow} has no value in row 37' in refused(section(arrow, shuffle_by=way), tmp_path)


def test_a_missing_value_of_a_csv_and_one_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,v\n" + "".join(f"{n},{'' if n == 4 else n}\n" for n in range(9)))
    assert f'the column "v" of {tmp_path / "t.csv"} has no value in row 4' in refused(section(tmp_path / "t.csv"), tmp_path)
    lists = pa.table({"x": pa.array([[1.0, 2.0], [3.0, None], [5.0, 6.0]], pa.list_(pa.float32(), 2))})
    file = write(tmp_path / "t.arrow", lists)
    assert f'the column "x" of {file} has no value in row 1' in refused(section(file), tmp_path)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("way", ["rows", "blocks"])
def test_a_corrupt_page_is_found_by_its_checksum(way: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", rows(SIZE), 130, use_dictionary=False, compression="none")
    about = pq.ParquetFile(file).metadata.row_group(4).column(0)
    flip(file, about.data_page_offset + about.total_compressed_size // 2)
    message = refused(section(file, shuffle_by=way), tmp_path)
    assert str(file) in message and "cannot be read" in message
    assert "row group 4" in message or way == "rows"


@pytest.mark.parametrize("format", FORMATS)
def test_files_that_are_none(format: str, tmp_path: Path) -> None:
    file = tmp_path / f"t.{format}"
    file.write_bytes(b"")
    assert f"the file {file} is empty" in refused(section(file), tmp_path)
    file.write_bytes(os.urandom(5000))
    assert str(file) in refused(section(file), tmp_path)
    assert "does not exist" in refused(section(tmp_path / f"gone.{format}"), tmp_path)
    assert "does not exist" in refused(section((tmp_path / f"gone.{format}").as_uri(), format=format), tmp_path)
    whole = write(file, plain(rows(SIZE), format)).read_bytes()
    if format != "csv":
        file.write_bytes(whole[:len(whole) // 2])
        assert f"{file} cannot be read" in refused(section(file), tmp_path)


@pytest.mark.parametrize("way", ["auto", "blocks"])
def test_a_file_that_vanishes_during_the_run(way: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", rows(SIZE), 130)
    data = section(file, shuffle_by=way)
    info = table.prepare(data, tmp_path)
    training, _ = table.open_tables(info, data, tmp_path, 0)
    file.unlink()
    if way == "auto":
        assert len(epoch_of(training)["id"]) == SIZE  # converted: not needed any more
        return
    with pytest.raises(UserError, match=f"the file {file} is missing; put it back"):
        epoch_of(training)
    write(file, rows(SIZE - 1), 130)
    with pytest.raises(UserError, match="row group 7 of .* cannot be read .89 rows where 90 were"):
        epoch_of(training)


@pytest.mark.parametrize("format", FORMATS)
def test_a_table_without_rows(format: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"t.{format}", plain(rows(10), format).slice(0, 0))
    message = refused(section(file), tmp_path)
    assert f"{file} has no rows" in message or f"{file} has no column of numbers" in message


def test_columns_that_are_left_out_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,name,v,when\n1,a,2.5,x\n2,b,3.5,y\n")
    notes = table.prepare(section(tmp_path / "t.csv"), tmp_path)["notes"]
    assert notes == ["data.path: left out, as columns that are no numbers: name (string), when (string)"]
    assert table.prepare(section(tmp_path / "t.csv"), tmp_path)["notes"] == notes  # from the cache
    assert table.prepare(section(tmp_path / "t.csv", columns=("v",)), tmp_path)["notes"] == [
        "data.path: left out, as not among data.columns: id (int64), name (string), when (string)"]


@pytest.mark.parametrize("format", FORMATS)
def test_columns_that_are_no_numbers(format: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"t.{format}", plain(rows(10), format))
    assert f'the column "word" of {file} is string, which is no number' in refused(section(file, columns=("id", "word")), tmp_path)
    assert f'{file} has no column "ix"; it has id: int64' in refused(section(file, columns=("ix",)), tmp_path)
    write(file, rows(10).select(["word"]))
    assert f"{file} has no column of numbers (word: string)" in refused(section(file), tmp_path)
    twice = tmp_path / "twice.csv"
    twice.write_text("a,b,,,a\n1,2,,,3\n")
    assert f'{twice} has two columns named "a"' in refused(section(twice), tmp_path)
    assert opened(section(twice, columns=("b",)), tmp_path)[1].num_samples == 1
    twice.with_name("zwice.csv").write_text("b,b\n1,2\n")
    assert 'zwice.csv has two columns named "b"' in refused(section(tmp_path / "*wice.csv", columns=("b",)), tmp_path)


def test_a_list_without_a_fixed_length_is_no_column(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", pa.table({"x": [[1.0], [2.0, 3.0]], "id": [1, 2]}))
    assert 'the column "x" of' in refused(section(file, columns=("x",)), tmp_path)
    assert opened(section(file), tmp_path)[1].batch(np.array([1]), np.array([0])).keys() == {"id"}


def test_a_text_in_a_column_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,v\n" + "".join(f"{n},{n}\n" for n in range(300_000)) + "1,one\n")
    message = refused(section(tmp_path / "t.csv"), tmp_path)
    assert f'the column "v" of {tmp_path / "t.csv"}' in message and "'one'" in message


def test_a_storage_that_cannot_be_reached(tmp_path: Path) -> None:
    closed = "s3://key:secret@bucket/x?region=us-east-1&endpoint_override=http://127.0.0.1:1"
    message = refused(section(closed, format="parquet"), tmp_path)
    assert 'data.path = "s3://bucket/x" cannot be reached' in message and "secret" not in message
    assert 'data.path = "nowhere://x/y.parquet" cannot be reached' in refused(section("nowhere://x/y.parquet"), tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="The cache .* cannot be written"):
        table.prepare(section(write(tmp_path / "t.parquet", rows(10))), tmp_path / "cache")


def test_the_first_batch_of_a_hundred_gigabytes_reads_footers_and_one_block(tmp_path: Path) -> None:
    """One file of 100 MB under a thousand names, in a cold process; the limit on time is generous, the figure is in benchmarks."""
    benchmark = pytest.importorskip("benchmarks.data")
    benchmark.write_file(tmp_path / "one.parquet")
    files = benchmark.many_names(tmp_path / "many", tmp_path / "one.parquet", 1000)
    found = benchmark.cold(files, "parquet", again=False)
    assert found["rows"] > 1_000_000_000 and found["blocks"] == 1
    assert found["bytes"] < 200e6, "more than footers (64 KiB at a time) and a row group of 12 MB"
    assert found["look"] + found["open"] + found["batch"] < 15
