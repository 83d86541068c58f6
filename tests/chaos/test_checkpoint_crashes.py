"""The machine goes down between any two calls of its file system; and whatever happens to the bytes afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from elastic.checkpoint.manager import committed, newest_good, verify
from elastic.controller.checkpoints import Checkpoints
from elastic.storage import store as stores
from elastic.storage.faulty import Crashed, FaultyFiles
from elastic.storage.remote import join, open_files
from elastic.storage.store import Store
from tests.support.checkpoints import assert_refused, assert_same, load, restore, save, values
from tests.support.crashes import Torn, crashing
from tests.support.sampling import sample

OLD, NEW = "step-00000050", "step-00000100"
RANKS = 2
# a saver's thread dies with its process
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(params=["local", "s3"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """A new place for checkpoints with one in it, step 50; the same for every call."""
    numbers = iter(range(10_000))

    def make() -> str:
        location = str(tmp_path / str(next(numbers))) if request.param == "local" else request.getfixturevalue("s3").bucket()
        save(location, 50, RANKS)
        return location

    yield make


def attempt(location: str) -> None:
    """Step 100 is saved and committed; two older ones are there, of which one has to go and leftovers with it."""
    checkpoints = Checkpoints(location, 1, "", 50)
    try:
        save(location, 100, RANKS, generation=2, checkpoints=checkpoints)
    except Crashed:
        return
    checkpoints.settle()


@pytest.mark.parametrize("kind", [FaultyFiles, Torn])
def test_a_crash_between_any_two_calls_leaves_the_newest_complete_one(kind: Callable[..., FaultyFiles],
                                                                      fresh: Callable[[], str],
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    location = fresh()
    with monkeypatch.context() as patch:
        counted = crashing(patch, location, FaultyFiles, 0)
        attempt(location)
    calls = list(counted.calls)
    assert len(calls) >= 15 and "remove" in calls, calls
    print(f"{len(calls)} calls")
    ends = []
    last = max(n for n, call in enumerate(calls, 1) if call not in ("info", "names", "read"))
    for at in sample(range(1, len(calls) + 1), 12,
                     always=[last, *(n for n, call in enumerate(calls, 1) if call == "rename" and n != last)]):
        if kind is Torn and calls[at - 1] != "write":
            continue
        if location.startswith("s3://") and calls[at - 1] in ("info", "names", "read"):
            continue  # nothing has changed when it comes: the storage is as before the next call that changes it
        location = fresh()
        with monkeypatch.context() as patch:
            faulty = crashing(patch, location, kind, at)
            attempt(location)
            assert faulty.fired.is_set(), f"call {at} of {len(calls)} never came"
        ends.append(assert_whole(location, f"crash before call {at}, {calls[at - 1]}"))
        if at % 6 == 1 or calls[at - 1] in ("rename", "remove"):
            assert_goes_on(location)
    if kind is FaultyFiles:
        assert ends == sorted(ends) and set(ends) == {50, 100}, "once the new one is there, it stays"


def assert_whole(location: str, why: str) -> int:
    """The newest checkpoint that is seen at all is whole, by every way of looking; its step."""
    store = Store.open(location)
    name, rejected = newest_good(store)
    assert name is not None and not rejected, (why, rejected)
    assert newest_good(store, look=verify) == (name, []), why
    assert [n for _, n in committed(store)][-1] == name
    for _, other in committed(store):
        verify(store, other)  # an older one that is being removed is not seen either
    arrays, manifest = load(store, name)
    assert_same(arrays, values(manifest.step))
    for state, _ in restore(join(location, name), 2):
        assert_same(state.arrays, values(manifest.step))
    return manifest.step


def assert_goes_on(location: str) -> None:
    """The next process saves the same step and a later one, and nothing of the crash is left."""
    for step in (100, 150):
        checkpoints = Checkpoints(location, 1, "", step - 1)
        found = save(location, step, 3, generation=3, checkpoints=checkpoints)
        checkpoints.settle()
        assert found is not None and not found.error
    store = Store.open(location)
    assert store.names() == ["step-00000150"]
    assert len(store.names("step-00000150")) == 4
    assert_whole(location, "afterwards")


# Whatever happens to the bytes.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints of three ranks, their files of the same names."""
    for step in (50, 100):
        save(str(tmp_path), step, 3)
    return tmp_path


def assert_falls_back(root: Path, why: str) -> None:
    """Step 100 is used by nobody, and step 50 is taken in its place."""
    assert_refused(restore(str(root / NEW), 2), why)
    checkpoints = Checkpoints(str(root), 9, "")
    path, step, _ = checkpoints.newest_good()
    if step == 100:  # its files' sizes are right: the group finds out while it loads
        checkpoints.refuse(path)
        path, step, _ = checkpoints.newest_good()
    assert (Path(path).name, step) == (OLD, 50), why


def test_any_flipped_byte_is_found(root: Path) -> None:
    """Sampled over every file and every region: the manifest, the headers, each array, the first and last bytes, around
    chunk borders."""
    draw, tried = np.random.default_rng(0), 0
    for file in sorted((root / NEW).iterdir()):
        whole = file.read_bytes()
        size = len(whole)
        places = {0, 1, 7, 8, 9, size // 2, size - 2, size - 1, *range(1023, size, 1024), *range(1024, size, 1024)}
        for place in sorted({*places, *draw.integers(0, size, 40).tolist()}):
            broken = bytearray(whole)
            broken[place] ^= 1 << int(draw.integers(8))
            file.write_bytes(bytes(broken))
            assert_falls_back(root, f"{file.name}, byte {place} of {size}")
            tried += 1
        file.write_bytes(whole)
    assert tried > 200
    assert_whole(str(root), "put back")


def test_any_truncation_missing_swapped_or_stale_file_is_found(root: Path) -> None:
    new, old = sorted((root / NEW).iterdir()), sorted((root / OLD).iterdir())
    assert [f.name for f in new] == [f.name for f in old] and len(new) == 4
    for number, file in enumerate(new):
        whole = file.read_bytes()
        for size in (0, 1, 8, len(whole) // 2, len(whole) - 1025, len(whole) - 1):
            file.write_bytes(whole[:size])
            assert_falls_back(root, f"{file.name} cut to {size}")
        for content in (whole + b"\0", whole[1:] + b"\0", bytes(len(whole))):
            file.write_bytes(content)
            assert_falls_back(root, f"{file.name} altered")
        file.write_bytes(old[number].read_bytes())
        assert_falls_back(root, f"{file.name} of another step")
        file.unlink()
        assert_falls_back(root, f"{file.name} missing")
        for other in new[:number]:
            theirs = other.read_bytes()
            file.write_bytes(theirs)
            other.write_bytes(whole)
            assert_falls_back(root, f"{file.name} and {other.name} swapped")
            other.write_bytes(theirs)
        file.write_bytes(whole)
    assert_whole(str(root), "put back")


def test_a_short_write_is_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk loses bytes and says nothing: the controller sees it by the size."""
    save(str(tmp_path), 50, RANKS)
    files, root = open_files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stores, "open_files", lambda asked: (FaultyFiles(files, "short", 1, "write"), root))
        found = save(str(tmp_path), 100, RANKS, generation=2)
    assert found is not None and "bytes instead of" in found.error
    assert assert_whole(str(tmp_path), "short") == 50
