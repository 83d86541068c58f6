"""A group loads what another has saved: the same bits, each rank reading its part; and ranges that read no more than they need."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from elastic.checkpoint.manager import read_init, read_manifest, read_weights, split, verify
from elastic.checkpoint.reader import Reader, read_arrays, windows
from elastic.errors import BadCheckpoint, RecipeError
from elastic.storage import store as stores
from elastic.storage.remote import join
from elastic.storage.store import Store
from tests.support.checkpoints import CHUNK, Arrays, assert_same, load, restore, save, saver, values, write_part

SIZES = (1, 2, 3, 4)


@pytest.mark.parametrize("savers", SIZES)
def test_reshard_matrix(savers: int, tmp_path: Path) -> None:
    """Saved by 1 to 4, loaded by 1 to 4: the same arrays, bit for bit; every rank reads its share of the chunks and
    nobody more."""
    save(str(tmp_path), 50, savers)
    path = str(tmp_path / "step-00000050")
    assert_same(load(*split(path))[0], values(50))
    for loaders in SIZES:
        found = restore(path, loaders)
        for state, (manifest, _) in found:
            assert_same(state.arrays, values(50))
            assert state.committed == manifest.step == 50
        read = [bytes_read for _, (_, bytes_read) in found]
        manifest = found[0][1][0]
        assert sum(read) == manifest.bytes, "the group reads every byte once"
        chunks = sum(len(entry.chunks) for entry in manifest.files)
        assert max(read) <= math.ceil(chunks / loaders) * CHUNK and chunks >= 12
        print(f"saved by {savers}, loaded by {loaders}: bytes per rank {read}")


def test_many_windows_need_no_more_memory_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.checkpoint.reader.WINDOW", 2 * CHUNK)
    save(str(tmp_path), 50, 3)
    path = str(tmp_path / "step-00000050")
    manifest = read_manifest(*split(path))
    cut = list(windows(manifest, 4))
    assert len(cut) >= 2 and all(sum(b.bytes for b in blocks) <= 2 * CHUNK for window in cut for blocks in window)
    assert [b for window in cut for blocks in window for b in blocks] == sorted(
        (b for window in cut for blocks in window for b in blocks), key=lambda b: (b.file, b.number))
    for state, _ in restore(path, 4):
        assert_same(state.arrays, values(50))


def test_a_checkpoint_on_s3_is_loaded_by_another_number(s3, tmp_path: Path) -> None:
    location = s3.bucket()
    assert save(location, 50, 3).error == ""
    for state, _ in restore(join(location, "step-00000050"), 2):
        assert_same(state.arrays, values(50))


def test_only_the_ranges_that_are_wanted_are_read(tmp_path: Path) -> None:
    save(str(tmp_path), 50, 3)
    store, name = split(tmp_path / "step-00000050")
    reader = Reader(store, name, read_manifest(store, name))
    expected = values(50)
    found = read_arrays(reader, ["buffer/count", "buffer/none"])
    assert found["buffer/count"] == 50 and found["buffer/none"].shape == (0, 3)
    assert reader.bytes <= CHUNK, "a number lies in one chunk"
    assert read_arrays(reader, ["parameter/w"])["parameter/w"].tobytes() == expected["parameter/w"].tobytes()
    with pytest.raises(BadCheckpoint, match="holds no array parameter/x"):
        read_arrays(reader, ["parameter/x"])


def test_a_flip_outside_of_what_is_wanted_does_not_matter_and_inside_it_does(tmp_path: Path) -> None:
    save(str(tmp_path), 50, 1)
    store, name = split(tmp_path / "step-00000050")
    manifest = read_manifest(store, name)
    (entry,) = manifest.files
    place = {piece.name: piece for piece in entry.pieces}
    file = tmp_path / name / entry.name
    content = bytearray(file.read_bytes())
    content[place["optimizer/exp_avg/w"].offset + 2500] ^= 1
    file.write_bytes(bytes(content))
    assert_same(read_weights(store, name, manifest),
                {n: v for n, v in values(50).items() if not n.startswith("optimizer/")})
    assert_same(read_init(tmp_path / name), {n.removeprefix("parameter/"): v for n, v in values(50).items()
                                             if n.startswith("parameter/")})
    with pytest.raises(BadCheckpoint, match="does not have the hash"):
        read_arrays(Reader(store, name, manifest), ["optimizer/exp_avg/w"])
    with pytest.raises(BadCheckpoint):
        verify(store, name)


def test_boxes_that_are_no_runs_are_loaded_too(tmp_path: Path) -> None:
    """Columns, as a tensor-parallel writer would cut them."""
    from elastic.checkpoint.manager import commit
    from elastic.checkpoint.manifest import Manifest
    from elastic.storage.store import Store

    store, arrays = Store.open(tmp_path), values(0)
    w = arrays.pop("parameter/w")
    halves = [write_part(store, 50, 1, f"half-{n}", {"parameter/w": w[:, low:high], **more},
                         {"parameter/w": (w.shape, (0, low))}, CHUNK)
              for n, (low, high, more) in enumerate(((0, 11, {}), (11, 30, arrays)))]
    commit(store, Manifest(50, 1, 0, 0, "", tuple(halves), CHUNK))
    assert_same(load(store, "step-00000050")[0], values(0))
    for state, _ in restore(str(tmp_path / "step-00000050"), 2):
        assert_same(state.arrays, values(0))


@pytest.mark.parametrize("change", ["missing", "more", "shape", "dtype", "many"])
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_read(change: str, tmp_path: Path) -> None:
    save(str(tmp_path), 50, 2)
    arrays = values(50)
    if change == "missing":
        del arrays["parameter/b"]
    elif change == "more":
        arrays["parameter/new"] = np.zeros(3)
    elif change == "shape":
        arrays["parameter/b"] = np.zeros(8, np.float32)
    elif change == "dtype":
        arrays["buffer/count"] = np.array(1, np.int32)
    else:
        arrays = {f"parameter/other{n}": np.zeros(n) for n in range(9)}
    state = Arrays(arrays, 7)
    from elastic.collective.solo import SoloGroup

    with pytest.raises(RecipeError) as error:
        saver(str(tmp_path)).restore(str(tmp_path / "step-00000050"), state, SoloGroup(), None)
    text = str(error.value)
    assert ("another model: put [model] back" if change == "dtype"
            else "another model or optimizer: put [model] and optimizer.name back") in text
    assert "\n" not in text and len(text) < 700
    named = {"dtype": "int64, the recipe's model has int32", "missing": "parameter/b", "more": "parameter/new",
             "shape": "shape (8,)",
             "many": "more arrays"}
    assert named[change] in text
    assert state.committed == 7, "the state was touched"


def test_absurd_sizes_allocate_nothing(tmp_path: Path) -> None:
    """A manifest, rightly hashed, that states a file of 2^50 bytes which is not there; and one with a file shorter than
    it says."""
    import tracemalloc

    from elastic.checkpoint.manager import commit
    from elastic.checkpoint.manifest import MAX_CHUNK
    from elastic.storage.store import Store

    save(str(tmp_path), 50, 1)
    store = Store.open(tmp_path)
    manifest = read_manifest(store, "step-00000050")
    (entry,) = manifest.files
    size = 1 << 40
    rows = size // 4
    piece = replace(entry.pieces[0], name="parameter/w", dtype="float32", shape=(rows,), start=(0,), count=(rows,),
                    offset=0)
    huge = replace(entry, bytes=size, chunks=("00" * 16,) * (size // MAX_CHUNK), pieces=(piece,))
    commit(store, replace(manifest, files=(huge,), chunk_bytes=MAX_CHUNK))
    tracemalloc.start()
    for look in (lambda: load(store, "step-00000050"), lambda: verify(store, "step-00000050"),
                 lambda: read_init(tmp_path / "step-00000050"),
                 lambda: saver("").restore(str(tmp_path / "step-00000050"), Arrays({}), None, None)):
        with pytest.raises((BadCheckpoint, RecipeError), match="bytes instead of"):
            look()
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


class Away:
    """A storage that fails the first `times` reads of each file, and how often it was asked for which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, error: type[OSError] = OSError):
        self.asked, read = Counter[str](), Store.read_range

        def fail(store: Store, name: str, low: int, high: int) -> bytes:
            self.asked[name] += 1
            if self.asked[name] <= times:
                raise error(5, "Input/output error")
            return read(store, name, low, high)

        monkeypatch.setattr(Store, "read_range", fail)
        monkeypatch.setattr(stores, "AGAIN_S", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("loaders", [1, 2])
def test_a_storage_that_is_away_for_a_moment_costs_no_checkpoint(loaders: int, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    save(str(tmp_path), 50, 2)
    Away(monkeypatch, 3)
    for state, _ in restore(str(tmp_path / "step-00000050"), loaders):
        assert_same(state.arrays, values(50))


@pytest.mark.parametrize(("error", "times"), [(OSError, 4), (FileNotFoundError, 1)])
def test_one_that_stays_away_does_and_what_is_not_there_is_not_waited_for(error: type[OSError], times: int, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    save(str(tmp_path), 50, 1)
    away = Away(monkeypatch, 99, error)
    ((_, raised),) = restore(str(tmp_path / "step-00000050"), 1)
    assert isinstance(raised, BadCheckpoint) and "cannot be read" in str(raised) and list(away.asked.values()) == [times]
