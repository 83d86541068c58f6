"""Rows of tables in a checkpoint's files: every bit comes back, for any number of owners, from whole ones and increments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc

from elastic.checkpoint.manager import clean, newest_good, open_tables, prune, read_manifest, read_sound, verify
from elastic.checkpoint.manifest import Manifest, parse, without
from elastic.checkpoint.table_file import Bucket, table_name, write_table
from elastic.checkpoint.table_reader import check_tables
from elastic.errors import BadCheckpoint, NonFiniteLoss, RecipeError
from elastic.messages import Save
from elastic.storage.store import Store
from elastic.tables.row_store import kernels
from elastic.tables.spec import SLOTS, TableSpec
from tests.support.checkpoints import Arrays, values
from tests.support.held_tables import Crew, Saving, assert_same_rows, written
from tests.support.table_files import (
    Table,
    assert_holds,
    assert_rows,
    by_bucket,
    changed,
    filled,
    owned,
    random_table,
    rows_of,
    write_checkpoint,
)

KINDS = ("reference", "numba")


def spec(**changes: Any) -> TableSpec:
    return TableSpec(**{"name": "ads", "width": 5, "num_buckets": 16, "admit": 2, "seed": 3, **changes})


def load(place: Store, manifest: Manifest, kind: str, spec: TableSpec, buckets: list[int]) -> Any:
    store = kernels(kind).create(spec, 0)
    store.hold(buckets)
    open_tables(place, f"step-{manifest.step:08d}", manifest).fill(store, buckets)
    return store


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", SLOTS)
@pytest.mark.parametrize("vocabulary", [0, 300])
def test_what_three_owners_wrote_any_number_reads(kind: str, optimizer: str, vocabulary: int, tmp_path: Path) -> None:
    one, place = spec(optimizer=optimizer, vocabulary=vocabulary), Store.open(tmp_path)
    table = random_table(one, np.random.default_rng(1), 200, 50)
    manifest = write_checkpoint(place, 50, {one: table}, 3)
    assert read_sound(place, "step-00000050") == manifest
    for size in (1, 2, 5):
        for buckets in owned(one, size):
            assert_holds(load(place, manifest, kind, one, buckets), one, table, buckets)


def history(place: Store, one: TableSpec, luck: np.random.Generator, length: int = 4) -> tuple[Table, Manifest]:
    """A whole checkpoint and increments on it, each by another number of owners, some buckets whole in between."""
    table = random_table(one, luck, 150, 10)
    manifest = write_checkpoint(place, 10, {one: table}, 2)
    for number in range(1, length):
        base, step = 10 * number, 10 * number + 10
        table, gone = changed(one, luck, table, base, step)
        manifest = write_checkpoint(place, step, {one: table}, number, base, {one.name: gone},
                                    is_whole=lambda bucket, number=number: bucket % 5 == number)
    return table, manifest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_increments_give_what_a_whole_one_gives(kind: str, seed: int, tmp_path: Path) -> None:
    one, place = spec(optimizer="adam"), Store.open(tmp_path)
    table, manifest = history(place, one, np.random.default_rng(seed))
    for buckets in owned(one, 3):
        assert_holds(load(place, manifest, kind, one, buckets), one, table, buckets)
    reader, parts = open_tables(place, "step-00000040", manifest), by_bucket(one, table)
    found = list(reader.rows("ads"))
    assert [bucket for bucket, _ in found] == list(range(one.num_buckets))
    for bucket, rows in found:
        assert_rows(rows, rows_of(one, parts[bucket]))
    assert {tuple(reader.chain("ads", bucket)) for bucket in range(16)} == {
        (10, 20, 30, 40), (20, 30, 40), (30, 40), (40,)}


def test_an_increment_is_as_large_as_what_was_touched(tmp_path: Path) -> None:
    one, place, luck = spec(width=32), Store.open(tmp_path), np.random.default_rng(0)
    table = random_table(one, luck, 4000, 10)
    whole = write_checkpoint(place, 10, {one: table}, 1)
    frame = write_checkpoint(place, 20, {one: table}, 1, 10).bytes  # of buckets without rows
    sizes = []
    for every in (100, 10):
        after = table | {id: (*table[id][:3], 30) for id in sorted(table)[::every]}
        sizes.append((write_checkpoint(place, 30, {one: after}, 1, 10).bytes - frame) / (whole.bytes - frame) * every)
    assert all(0.7 < size < 1.5 for size in sizes), sizes


def test_only_the_buckets_that_are_asked_for_are_read(tmp_path: Path) -> None:
    one, place = spec(width=64, num_buckets=64), Store.open(tmp_path)
    table = random_table(one, np.random.default_rng(0), 3000, 10)
    manifest = write_checkpoint(place, 10, {one: table}, 1)
    reader = open_tables(place, "step-00000010", manifest)
    for number in (3, 40):
        list(reader.rows("ads", [number]))
    entry = manifest.tables[0]
    assert reader.bytes == sum(entry.sizes[n] for n in (3, 40)) < entry.bytes / 20


def test_arrow_reads_the_file_by_itself(tmp_path: Path) -> None:
    one = spec(optimizer="sgd")
    table = random_table(one, np.random.default_rng(0), 100, 10)
    write_checkpoint(Store.open(tmp_path), 10, {one: table}, 1)
    (path,) = (tmp_path / "step-00000010").glob("*.arrow")
    file = ipc.open_file(pa.memory_map(str(path)))
    assert file.num_record_batches == 16 and file.schema.metadata[b"table"] == b"ads"
    found = {id: values for batch in (file.get_batch(n) for n in range(16))
             for id, values in zip(batch["ids"].to_pylist()[0], batch["values"].to_pylist()[0])}
    assert found == {id: row[0].tolist() for id, row in table.items() if row[0] is not None}


def test_any_flipped_byte_of_a_bucket_is_found(tmp_path: Path) -> None:
    one, place = spec(num_buckets=4), Store.open(tmp_path)
    table, manifest = history(place, one, np.random.default_rng(0), 2)
    for file in sorted(tmp_path.rglob("*.arrow")):
        whole, entry = file.read_bytes(), next(e for m in (10, 20) for e in read_manifest(
            place, f"step-{m:08d}").tables if e.name == file.name and f"step-{m:08d}" == file.parent.name)
        chains = {step for bucket in entry.buckets
                  for step in open_tables(place, "step-00000020", manifest).chain("ads", bucket)}
        for at in range(entry.offsets[0], entry.offsets[-1] + entry.sizes[-1], 17):
            broken = bytearray(whole)
            broken[at] ^= 1 << at % 8
            file.write_bytes(bytes(broken))
            bucket = entry.buckets[np.searchsorted(entry.offsets, at, "right") - 1]
            reader = open_tables(place, "step-00000020", manifest)
            if int(file.parent.name[5:]) in reader.chain("ads", bucket):
                with pytest.raises(BadCheckpoint, match="hash"):
                    list(reader.rows("ads", [bucket]))
        file.write_bytes(whole)
        assert chains


def test_a_base_that_is_missing_or_short_makes_an_older_one_count(tmp_path: Path) -> None:
    one, place = spec(), Store.open(tmp_path)
    table = random_table(one, np.random.default_rng(0), 50, 10)
    for step, base in ((10, -1), (20, -1), (30, 20)):
        write_checkpoint(place, step, {one: table}, 1, base)
    assert newest_good(place) == ("step-00000030", [])
    (file,) = (tmp_path / "step-00000020").glob("*.arrow")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    name, rejected = newest_good(place)
    assert name == "step-00000010" and [n for n, _ in rejected] == ["step-00000030", "step-00000020"]
    assert rejected[0][1].startswith("step-00000030 builds on step-00000020, which is not whole: ")
    file.write_bytes(content)
    (tmp_path / "step-00000020" / "manifest.json").unlink()
    assert newest_good(place)[0] == "step-00000010"


def test_files_of_tables_are_no_leftovers(tmp_path: Path) -> None:
    one, place = spec(), Store.open(tmp_path)
    table = random_table(one, np.random.default_rng(0), 50, 10)
    write_checkpoint(place, 10, {one: table}, 1)
    left = table_name(0, "ads", 1, 2, 1)
    write_table(place, "step-00000010", left, one, 10, [])
    assert clean(place, 2) == [f"step-00000010/{left}"]
    read_sound(place, "step-00000010")


@pytest.mark.parametrize("name", ["a/b", "..", "x-g000009.y", "ü" * 200, "\0"])
def test_any_name_of_a_table_makes_a_file(name: str, tmp_path: Path) -> None:
    one, place = spec(name=name), Store.open(tmp_path)
    table = random_table(one, np.random.default_rng(0), 50, 10)
    manifest = write_checkpoint(place, 10, {one: table}, 1)
    assert parse(manifest.dumps()) == manifest
    assert_holds(load(place, manifest, "reference", one, [1, 2]), one, table, [1, 2])


@pytest.mark.parametrize(("changes", "words"), [
    ({"width": 6}, r"tables\.ads\.width = 6 does not fit .* step 10, which has 5"),
    ({"optimizer": "adam"}, r'tables\.ads\.optimizer = "adam" does not fit .* "rowwise_adagrad"'),
    ({"num_buckets": 8}, r"embedding\.buckets = 8 does not fit .* 16"),
    ({"vocabulary": 99}, "tables.ads has a vocabulary of 99 ids, and in the checkpoint of step 10 any ids, growing"),
    ({"name": "other"}, "tables.other: the checkpoint of step 10 has no rows of this table, but of ads")])
def test_rows_of_another_table_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    one, place = spec(), Store.open(tmp_path)
    manifest = write_checkpoint(place, 10, {one: {}}, 1)
    other = replace(one, **changes)
    with pytest.raises(RecipeError, match=words):
        check_tables(manifest, {other.name: other})
    with pytest.raises(RecipeError, match=r"tables\.ads is missing"):
        check_tables(manifest, {})


def test_a_row_that_is_no_number_is_no_checkpoint(tmp_path: Path) -> None:
    one, place = spec(), Store.open(tmp_path)
    store = filled("reference", one, {4: (np.array([1, 2, np.nan, 4, 5], np.float32), np.ones(1, np.float32), 1, 1)})
    with pytest.raises(NonFiniteLoss, match="table ads: the row of id 4 is not finite after step 10"):
        write_table(place, "step-00000010", "x.arrow", one, 10, [Bucket(n, store.export(n)) for n in range(16)])
    assert not list(tmp_path.rglob("*.arrow*"))


@pytest.mark.parametrize("change", [
    lambda e: replace(e, buckets=e.buckets[:-1] + (99,)), lambda e: replace(e, buckets=e.buckets[::-1]),
    lambda e: replace(e, offsets=e.offsets[:-1]), lambda e: replace(e, offsets=(*e.offsets[:-1], e.bytes + 1)),
    lambda e: replace(e, sizes=(e.sizes[0] + 1, *e.sizes[1:])), lambda e: replace(e, sizes=(0, *e.sizes[1:])),
    lambda e: replace(e, hashes=("x" * 32, *e.hashes[1:])), lambda e: replace(e, bases=(10, *e.bases[1:])),
    lambda e: replace(e, bases=(-2, *e.bases[1:])), lambda e: replace(e, name="a/b"),
    lambda e: replace(e, num_buckets=17), lambda e: replace(e, table=""),
    lambda e: without(e, {3})])
def test_a_manifest_that_cannot_be_true_is_not_believed(change: Any, tmp_path: Path) -> None:
    one = spec()
    manifest = write_checkpoint(Store.open(tmp_path), 10, {one: {}}, 1)
    broken = replace(manifest, tables=(change(manifest.tables[0]),))
    with pytest.raises(BadCheckpoint):
        parse(broken.dumps())


def test_a_bucket_in_two_files_is_not_believed(tmp_path: Path) -> None:
    manifest = write_checkpoint(Store.open(tmp_path), 10, {spec(): {}}, 2)
    first, second = manifest.tables
    with pytest.raises(BadCheckpoint, match="in no file"):
        parse(replace(manifest, tables=(first,)).dumps())
    with pytest.raises(BadCheckpoint, match="two tables"):
        parse(replace(manifest, tables=(first, replace(second, width=6))).dumps())
    with pytest.raises(BadCheckpoint, match="in two files"):
        parse(replace(manifest, tables=(first, second, replace(first, name="again"))).dumps())


def test_a_manifest_without_tables_is_as_it_was() -> None:
    text = Manifest(1, 1, 0, 0, "").dumps()
    assert '"format": 2' in text and "tables" not in text


def test_pruning_keeps_what_is_built_on(tmp_path: Path) -> None:
    one, place = spec(num_buckets=2), Store.open(tmp_path)

    def left() -> list[int]:
        return [int(name[5:]) for name in place.names()]

    for step, base in ((10, -1), (20, 10), (30, 20), (40, -1), (50, 40)):
        write_checkpoint(place, step, {one: {}}, 1, base)
    assert prune(place, 4) == [] and left() == [10, 20, 30, 40, 50]
    assert prune(place, 2) == ["step-00000030", "step-00000020", "step-00000010"]
    write_checkpoint(place, 60, {one: {}}, 1)
    assert prune(place, 1) == [] and left() == [40, 50, 60], "what is being written may build on step 50"
    write_checkpoint(place, 70, {one: {}}, 1, 50)
    write_checkpoint(place, 80, {one: {}}, 1, 70)
    assert prune(place, 1) == ["step-00000060"] and left() == [40, 50, 70, 80]
    read_sound(place, "step-00000080")


def test_who_is_left_under_another_rank_leaves_a_checkpoint_of_the_same_step_as_it_is(tmp_path: Path) -> None:
    crew = Crew("reference", 2, twin=True)
    saving = Saving(str(tmp_path), crew)
    crew.train(5)
    first = saving.save(wait=True)
    assert first is not None and not first.error
    for rank, one in enumerate(reversed(saving.savers)):
        one.save(Arrays(values(5), 5), Save(1, 5, rank, 2, True), {}, is_alone=True)  # type: ignore[arg-type]
    verify(saving.checkpoints.store, "step-00000005")
    assert_same_rows(written(str(tmp_path / "step-00000005")), crew.rows())
