"""The machine goes down between any two calls while tables are saved; and whatever happens to their files afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.checkpoint.manager import committed, newest_good, read_manifest, verify
from elastic.controller.checkpoints import Checkpoints
from elastic.storage.faulty import Crashed, FaultyFiles
from elastic.storage.remote import join
from elastic.storage.store import Store
from tests.support.crashes import Torn, crashing
from tests.support.held_tables import Crew, Saving, assert_no_error, assert_same_rows, restore, written
from tests.support.sampling import sample

# a saver's thread dies with its process
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def begun(location: str) -> tuple[Saving, dict[int, Any]]:
    """Three members with a whole checkpoint, an increment on it and one on that, and by step what these hold."""
    crew = Crew("reference", 3)
    saving, rows = Saving(location, crew, full_every=3, keep=1), {}
    for _ in range(3):
        crew.train(4)
        rows[crew.step] = crew.rows()
        found = saving.save()
        assert found is not None and not found.error
        saving.checkpoints.settle()
    return saving, rows


def attempt(saving: Saving, rows: dict[int, Any]) -> None:
    """A whole one and an increment are saved and committed; then the older ones have to go."""
    try:
        for _ in range(2):
            saving.crew.train(4)
            rows[saving.crew.step] = saving.crew.rows()
            saving.save()
            saving.checkpoints.settle()
    except Crashed:
        return


def assert_whole(location: str, rows: dict[int, Any], why: str) -> int:
    """All that is seen is whole, and the newest holds what its step had; the step."""
    store = Store.open(location)
    name, rejected = newest_good(store)
    assert name is not None and not rejected, (why, rejected)
    assert [n for _, n in committed(store)][-1] == name, why
    for step, other in committed(store):
        verify(store, other)
        assert_same_rows(written(join(location, other)), rows[step])
    crew, ends = restore(join(location, name), "reference", 2)
    assert_no_error(ends)
    assert_same_rows(crew.rows(), rows[crew.step])
    return crew.step


@pytest.mark.parametrize(("kind", "place"), sample([(kind, place) for kind in (FaultyFiles, Torn)
                                                    for place in ("local", "s3")], 2))
def test_a_crash_between_any_two_calls_leaves_the_newest_complete_one(kind: Callable[..., FaultyFiles], place: str,
                                                                      tmp_path: Path, request: pytest.FixtureRequest,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(10_000))

    def fresh() -> tuple[Saving, dict[int, Any]]:
        return begun(str(tmp_path / str(next(numbers))) if place == "local" else request.getfixturevalue("s3").bucket())

    saving, rows = fresh()
    with monkeypatch.context() as patch:
        counted = crashing(patch, saving.location, FaultyFiles, 0)
        saving.checkpoints.store.files = counted
        attempt(saving, rows)
    calls = list(counted.calls)
    assert "remove" in calls and calls.count("create") >= 14, calls
    assert [step for step, _ in committed(Store.open(saving.location))] == [16, 20]
    quiet = ("info", "names", "read")  # nothing has changed when they come
    chosen = [n for n, call in enumerate(calls, 1) if (call == "write" if kind is Torn else call not in quiet)]
    ends = []
    for at in sample(chosen, 4 if place == "local" else 2, always=[chosen[-1]]):
        saving, rows = fresh()
        with monkeypatch.context() as patch:
            faulty = crashing(patch, saving.location, kind, at)
            saving.checkpoints.store.files = faulty
            attempt(saving, rows)
            assert faulty.fired.is_set(), f"call {at} of {len(calls)} never came"
        ends.append(assert_whole(saving.location, rows, f"crash before call {at}, {calls[at - 1]}"))
    assert set(ends) <= {12, 16, 20} and ends == sorted(ends)
    print(len(calls), "calls, ends at", ends)


def test_any_file_that_is_cut_missing_or_another_one_s_is_found(tmp_path: Path) -> None:
    saving, rows = begun(str(tmp_path))
    files = sorted(tmp_path.rglob("*.arrow"))
    assert len(files) == 3 * 3 * 2
    for number, file in enumerate(files):
        whole = file.read_bytes()
        for content in (whole[:-1], whole[:len(whole) // 2], b"", whole + b"\0", bytes(len(whole)), None,
                        files[number - 1].read_bytes()):
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
            with pytest.raises(Exception, match=file.name):
                verify(saving.checkpoints.store, file.parent.name)
            name, _ = newest_good(saving.checkpoints.store, look=verify)
            step = int(file.parent.name[5:])  # all three lie on the first
            assert name == (None if step == 4 else f"step-{step - 4:08d}")
        file.write_bytes(whole)
    assert assert_whole(str(tmp_path), rows, "put back") == 12


def test_a_controller_takes_an_older_one_for_one_whose_base_is_damaged(tmp_path: Path) -> None:
    saving, _ = begun(str(tmp_path))
    draw = np.random.default_rng(0)
    for folder, wanted in (("step-00000012", 8), ("step-00000008", 4), ("step-00000004", 0)):
        file = sorted((tmp_path / folder).glob("*.arrow"))[int(draw.integers(6))]
        entry = next(e for e in read_manifest(saving.checkpoints.store, folder).tables if e.name == file.name)
        content = bytearray(file.read_bytes())
        content[entry.offsets[0] + entry.sizes[0] - 1] ^= 1
        file.write_bytes(bytes(content))
        checkpoints, step = Checkpoints(str(tmp_path), 9, ""), -1
        while step:
            path, step, _ = checkpoints.newest_good()
            if not path or not any(isinstance(end, Exception) for end in restore(path, "reference", 2)[1]):
                break
            assert checkpoints.refuse(path)
        assert step == wanted
