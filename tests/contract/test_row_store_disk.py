"""The tier on disk of the compiled row store: what of it shows, to whoever counts bytes, pages or folders, and where the disk has no room."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.errors import UserError
from elastic.tables.bags import Bags, Summed
from elastic.tables.features import Tables
from elastic.tables.held import HeldTables
from elastic.tables.row_store import NoRoom, RowStore, kernels
from elastic.tables.spec import RowUpdate, TableSpec
from recommender.row_store import CompiledRows
from tests.support import rows
from tests.support.rows import assert_same, ids, random_sums, summed, whole

UPDATE = RowUpdate(0.1)
LIMIT = 400_000
WIDTH = 60
ROW = 4 * (WIDTH + 1)  # bytes


def spec(**changes: Any) -> TableSpec:
    return rows.spec(**{"width": WIDTH, **changes})


def opened(path: Path | str, of: TableSpec, limit: int = LIMIT) -> CompiledRows:
    store = kernels("numba").create(of, limit, str(path))
    store.hold(range(of.num_buckets))
    assert isinstance(store, CompiledRows) and store.cold
    return store


def fill(stores: Sequence[RowStore], steps: range, num: int = 300) -> None:
    """Each step touches so many new ids, and some that are long unused."""
    for step in steps:
        some = np.unique(np.append(np.arange(step * num, step * num + num), np.arange(step % 7, step * num, 3 * step)))
        sums = Summed(some, np.full((some.size, WIDTH), 1 / step, np.float32), np.ones(some.size, np.int32))
        for store in stores:
            store.prepare(step, sums)
            store.commit(UPDATE)


@pytest.fixture
def oracle() -> RowStore:
    store = kernels("numba").create(spec(), 0)
    store.hold(range(4))
    return store


def test_rows_beyond_the_limit_lie_on_disk_and_memory_stays_below_it(tmp_path: Path, oracle: RowStore) -> None:
    store = opened(tmp_path, spec())
    for step in range(1, 13):
        fill([store, oracle], range(step, step + 1))
        assert store.nbytes <= LIMIT
    assert store.disk_bytes > ROW * 2000 and whole(store) == whole(oracle)
    assert oracle.disk_bytes == 0 < oracle.nbytes
    chosen = np.arange(0, 5000, 7)
    assert_same(store.lookup(Bags(chosen, np.arange(chosen.size + 1))), oracle.read(chosen))
    assert_same(store.slots(chosen), oracle.slots(chosen))


def test_a_commit_touches_no_disk(tmp_path: Path, oracle: RowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = opened(tmp_path, spec(ttl_steps=4)), kernels("numba").create(spec(ttl_steps=4), 0)
    other.hold(range(4))
    num_evicted = 0
    for step in range(1, 12):
        sums = Summed(np.arange(step * 300, step * 300 + 400), np.ones((400, WIDTH), np.float32), np.ones(400, np.int32))
        num_evicted += store.prepare(step, sums).evicted.size
        other.prepare(step, sums)
        with monkeypatch.context() as patch:
            for name in ("put", "get"):
                patch.setattr(store.cold.pages, name, None)  # type: ignore[union-attr]
            store.commit(UPDATE)
        other.commit(UPDATE)
    assert num_evicted > 1000 and whole(store) == whole(other)


def test_gaps_are_closed(tmp_path: Path, oracle: RowStore) -> None:
    """Whatever comes and goes, disk is taken for little more than twice the rows."""
    store, luck = opened(tmp_path, spec()), np.random.default_rng(0)
    for step in range(1, 150):
        some = np.unique(luck.integers(0, 5000, 400))
        sums = Summed(some, luck.standard_normal((some.size, WIDTH)).astype(np.float32), np.ones(some.size, np.int32))
        for one in (store, oracle):
            one.prepare(step, sums)
            one.commit(UPDATE)
    assert store.disk_bytes < 2.5 * 5000 * ROW and whole(store) == whole(oracle)
    room = store.disk_bytes
    store.drop(range(4))
    store.hold(range(4))
    fill([store], range(1, 12))
    assert store.disk_bytes <= room


def test_what_is_loaded_may_be_larger_than_memory(tmp_path: Path, oracle: RowStore) -> None:
    fill([oracle], range(1, 13))
    store = opened(tmp_path, spec())
    for bucket in range(4):
        store.load(oracle.export(bucket))
        assert store.nbytes <= LIMIT
    assert whole(store) == whole(oracle)
    store.remove(np.arange(0, 4000, 2))
    oracle.remove(np.arange(0, 4000, 2))
    assert whole(store) == whole(oracle)


def test_a_step_whose_rows_memory_cannot_hold_is_refused_and_nothing_is_lost(tmp_path: Path, oracle: RowStore) -> None:
    store = opened(tmp_path, spec())
    fill([store, oracle], range(1, 9))
    with pytest.raises(NoRoom, match="embedding.memory_gb leaves it"):
        store.prepare(9, random_sums(np.random.default_rng(0), np.arange(40_000), WIDTH))
    assert whole(store) == whole(oracle)
    fill([store, oracle], range(9, 11))
    assert whole(store) == whole(oracle) and store.nbytes <= LIMIT


def test_tables_give_each_other_memory(tmp_path: Path) -> None:
    """The one that comes later finds all of it taken; and then the first one has a step that is larger than what it has
    kept."""
    specs = tuple(spec(name=name) for name in ("ads", "users"))
    held = HeldTables(Tables(specs, (), {}, memory_bytes=2 * LIMIT, disk_path=str(tmp_path)))
    free = HeldTables(Tables(specs, (), {}))
    nothing = summed({}, WIDTH)
    for tables in (held, free):
        tables.begin(range(4), (), 0)
    for step in range(1, 30):
        some = np.arange(step * 90, step * 90 + 600)
        sums = Summed(some, np.full((600, WIDTH), 1 / step, np.float32), np.ones(600, np.int32))
        turn = specs[step > 12].name if step < 20 else "both"
        for tables in (held, free):
            tables.prepare(step, {one.name: sums if turn in (one.name, "both") else nothing for one in specs})
            tables.commit(step, dict.fromkeys(("ads", "users"), UPDATE))
        assert held.nbytes <= 2 * LIMIT
    for name in held.stores:
        assert whole(held.stores[name]) == whole(free.stores[name])
        assert held.stores[name].disk_bytes
    held.close()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 20 megabytes."""
    where = tmp_path / "small"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "rows", where], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(small_disk: Path) -> None:
    of = spec(width=64)
    store, oracle = opened(small_disk, of, 8 << 20), kernels("numba").create(of, 0)
    oracle.hold(range(4))
    sums = {step: Summed(np.arange(step * 4000, step * 4000 + 4000), np.full((4000, 64), 1 / step, np.float32),
                         np.ones(4000, np.int32)) for step in range(1, 200)}
    with pytest.raises(UserError) as error:
        for step, one in sums.items():
            store.prepare(step, one)
            oracle.prepare(step, one)
            store.commit(UPDATE)
            oracle.commit(UPDATE)
    assert f'table ads: embedding.disk_path = "{small_disk}" has no room for ' in str(error.value)
    assert "B more (" in str(error.value) and "free some space there, name another folder, or raise" in str(error.value)
    assert 5 < step < 100
    for call in (lambda: store.prepare(step, sums[step]), lambda: store.load(oracle.export(0)),
                 lambda: store.prepare(step, sums[step])):
        with pytest.raises(UserError, match="embedding.disk_path"):
            call()
        assert whole(store) == whole(oracle)
    store.forget()
    small = Summed(*(array[:50] for array in (sums[1].ids, sums[1].sums, sums[1].counts)))
    read = store.read(small.ids)
    assert_same(read, oracle.read(small.ids))


def test_a_folder_is_one_process_s_and_goes_with_it(tmp_path: Path) -> None:
    """A killed one's goes when somebody else comes."""
    code = ("from recommender.rocks_pages import RocksPages; import sys, time\n"
            f"pages = RocksPages({str(tmp_path)!r}, 'a/ds')\nprint('there', flush=True)\nsys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert process.stdout and process.stdout.readline() == b"there\n"
    (theirs,) = tmp_path.iterdir()
    assert theirs.name.startswith(f"elastic-rows-{process.pid}-ads-")
    stores = [opened(tmp_path, spec()) for _ in range(2)]
    assert len([*tmp_path.iterdir()]) == 3 and theirs.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    stores[0].close()
    assert theirs.exists()
    stores.append(opened(tmp_path, spec()))
    assert not theirs.exists() and len([*tmp_path.iterdir()]) == 2
    fill(stores[1:], range(1, 4))
    assert whole(stores[1]) == whole(stores[2])
    stores[1].close()
    stores[2].close()
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r'embedding.disk_path = ".*/file" cannot be written on this node \(.*\); name a'):
        kernels("numba").create(spec(), LIMIT, str(tmp_path / "file"))


def test_a_vocabulary_stays_in_memory(tmp_path: Path) -> None:
    store = kernels("numba").create(spec(vocabulary=40), 1 << 25, str(tmp_path))
    assert not [*tmp_path.iterdir()] and store.release() == 0
    store.hold([0])
    assert store.read(ids(0)).shape == (1, WIDTH)
