"""A part file: its hashes are those of the bytes on the disk, and nothing is left of one that is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from elastic.checkpoint import part, reader
from elastic.checkpoint.manager import committed
from elastic.checkpoint.manifest import Manifest, Piece
from elastic.checkpoint.part import Image
from elastic.collective.solo import SoloGroup
from elastic.errors import GroupBroken, NonFiniteLoss, UserError
from elastic.messages import Part, Save
from elastic.storage.store import Store
from elastic.worker import saver as module
from tests.support.checkpoints import Arrays, restore, saver, values

VALUES = np.arange(5000, dtype=np.float32)


def image() -> Image:
    made = Image((Piece("parameter/w", "float32", VALUES.shape, (0,), VALUES.shape),))
    made.fill(lambda name, low, high: VALUES[low:high])
    return made


@pytest.mark.parametrize("chunk_bytes", [64, 4096, 1 << 22])
def test_hashes_are_those_of_the_file(tmp_path: Path, chunk_bytes: int) -> None:
    told: list[int] = []
    entry = image().write(Store.open(tmp_path), "step", "part", chunk_bytes, told.append)
    content = (tmp_path / "step" / "part").read_bytes()
    assert entry.bytes == len(content) == told[-1] and told == sorted(told)
    assert entry.hash == xxhash.xxh3_128_hexdigest(content)
    assert list(entry.chunks) == [xxhash.xxh3_128_hexdigest(content[low:low + chunk_bytes])
                                  for low in range(0, len(content), chunk_bytes)]
    assert content[entry.pieces[0].offset:] == VALUES.tobytes()


def refuse() -> None:
    raise NonFiniteLoss("not a number")


def late(store: Store) -> Callable[[], None]:
    """Refuses when the file already has its name."""
    named = threading.Event()
    sync = store.files.sync

    def noticing(folder: str) -> None:
        named.set()
        sync(folder)

    store.files.sync = noticing  # type: ignore[method-assign]
    return lambda: refuse() if named.wait(10) else None


@pytest.mark.parametrize("early", [True, False])
def test_what_is_refused_leaves_nothing(tmp_path: Path, early: bool) -> None:
    store = Store.open(tmp_path)
    with pytest.raises(NonFiniteLoss):
        image().write(store, "step", "part", 64, check=refuse if early else late(store))
    assert store.names("step") == []


def test_two_threads_copy_what_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "MUCH", 1)
    monkeypatch.setattr(part, "RUN", 7)
    shapes = {"a": (13, 5), "b": (), "c": (0, 4), "d": (3, 2, 11)}
    arrays = {name: np.random.default_rng(n).standard_normal(shape) for n, (name, shape) in enumerate(shapes.items())}
    made = Image(tuple(Piece(name, "float64", shape, (0,) * len(shape), shape) for name, shape in shapes.items()))
    threads = set()

    def take(name: str, low: int, high: int) -> np.ndarray:
        threads.add(threading.current_thread().name)
        return np.asarray(arrays[name]).reshape(-1)[low:high]

    made.fill(take)
    for piece in made.pieces:
        assert piece.offset % 8 == 0
        assert made.bytes[piece.offset:piece.offset + piece.bytes].tobytes() == arrays[piece.name].tobytes()
    assert threads <= {"MainThread", "copy_0"}


def test_what_goes_wrong_in_either_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "MUCH", 1)
    monkeypatch.setattr(part, "RUN", 7)

    def take(name: str, low: int, high: int) -> np.ndarray:
        if threading.current_thread() is not threading.main_thread():
            raise IndexError("beside")
        beside.wait(10)
        return VALUES[low:high]

    beside = threading.Event()
    threading.Timer(0.2, beside.set).start()
    with pytest.raises(IndexError, match="beside"):
        Image((Piece("w", "float32", VALUES.shape, (0,), VALUES.shape),)).fill(take)


def test_an_orphan_s_last_words_are_numbers(tmp_path: Path) -> None:
    arrays = values(5)
    arrays["parameter/b"][3] = np.inf
    with pytest.raises(NonFiniteLoss, match="not finite after step 5"):
        saver(str(tmp_path)).leave(Arrays(arrays, 5), 1, {}, ())
    assert committed(Store.open(tmp_path)) == []
    assert saver(str(tmp_path)).leave(Arrays(values(5), 5), 1, {}, ())
    assert committed(Store.open(tmp_path)) == [(5, "step-00000005")]


def test_a_lone_loader_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "WINDOW", 2048)
    saver(str(tmp_path)).leave(Arrays(values(5), 5), 1, {}, ())
    seen: list[int] = []

    def at(window: int) -> nullcontext[None]:
        seen.append(window)
        return nullcontext()

    saver(str(tmp_path)).restore(str(tmp_path / "step-00000005"), Arrays(values(6)), SoloGroup(), at)
    assert seen == list(range(len(seen))) and len(seen) > 3


def test_keys_in_a_uri_are_in_no_message() -> None:
    with pytest.raises(UserError) as error:
        Store.open("s3://KEY:SECRET@bucket/run?regoin=SECRET")
    assert "'s3://bucket/run' cannot be opened (regoin" in str(error.value) and "SECRET" not in str(error.value)
    told: list[Part] = []
    one = saver("s3://KEY:SECRET@bucket/run?regoin=SECRET", post=told.append)
    one.save(Arrays(values(5), 5), Save(1, 5), {})
    one.join()
    assert "could not be written to s3://bucket/run (" in told[0].error and "SECRET" not in told[0].error


def test_a_checkpoint_written_anew_while_a_group_loads_it_is_not_mixed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two orphans commit the same step; the second comes between what two members read."""
    saver(str(tmp_path)).leave(Arrays(values(5), 5), 1, {}, ())
    real, seen = module.read_sound, []

    def late(store: Store, name: str) -> Manifest:
        found = real(store, name)
        seen.append(found)
        return replace(found, generation=1 + len(seen))

    monkeypatch.setattr(module, "read_sound", late)
    found = restore(str(tmp_path / "step-00000005"), 2)
    assert all(isinstance(error, GroupBroken) and state.committed == -1 for state, error in found)
    monkeypatch.undo()
    assert all(state.committed == 5 for state, _ in restore(str(tmp_path / "step-00000005"), 2))
