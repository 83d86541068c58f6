"""Checkpoints of tables that train: whole and since a base, on any number of owners, whoever comes and goes."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.checkpoint.hashing import hashes
from elastic.checkpoint.manager import committed, newest_good, read_manifest, verify
from elastic.checkpoint.state_hash import TableDigests, hashes_of, in_order
from elastic.errors import BadCheckpoint, NonFiniteLoss, RecipeError, RunFailed
from elastic.messages import Save
from elastic.storage.remote import join
from elastic.storage.store import Store
from elastic.tables.rows import Rows, digests
from tests.support.checkpoints import Arrays, values
from tests.support.held_tables import (
    SPECS,
    Crew,
    Saving,
    assert_no_error,
    assert_same_rows,
    restore,
    saver,
    written,
)
from tests.support.sampling import sample

KINDS = ("reference", "numba")


@pytest.fixture(params=["local", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints") if request.param == "local" else request.getfixturevalue("s3").bucket()


def path(location: str, step: int) -> str:
    return join(location, f"step-{step:08d}")


@pytest.mark.parametrize("kind", KINDS)
def test_increments_of_a_run_give_its_state_on_any_number_of_owners(kind: str, location: str) -> None:
    crew = Crew(kind, 3)
    saving, evicted = Saving(location, crew), 0
    for _ in range(6):
        crew.train(7)
        found = saving.save()
        assert found is not None and not found.error
        evicted += sum(len(ids) for held in crew.members for _, _, ids in held.removed._noted)
    assert evicted > 20, "nothing went away, and nothing is shown"
    bases = {step: read_manifest(saving.checkpoints.store, name).bases for step, name in committed(saving.checkpoints.store)}
    assert bases == {7: set(), 14: {7}, 21: {14}, 28: {21}, 35: set(), 42: {35}}, "each fourth is whole"
    for step in (28, 42):
        assert verify(saving.checkpoints.store, f"step-{step:08d}").step == step
    for size in (1, 2, 5):
        other, ends = restore(path(location, 42), kind, size)
        assert_no_error(ends)
        assert other.step == 42
        assert_same_rows(other.rows(), crew.rows())
    assert_same_rows(written(path(location, 42)), crew.rows())


@pytest.mark.parametrize(("seed", "twin", "kind"), sample([*itertools.product(range(2), [False, True], KINDS)], 4))
def test_an_increment_is_a_whole_one_whoever_comes_and_goes(seed: int, twin: bool, kind: str, tmp_path: Path) -> None:
    """Owners change between saves, saves fail, and all go back to a checkpoint, again and again."""
    luck, crew = np.random.default_rng(seed), Crew(kind, 3, twin)
    saving, num_increments = Saving(str(tmp_path / "run"), crew, 5), 0
    store = saving.checkpoints.store
    for number in range(16 if kind == "numba" else 8):
        crew.train(int(luck.integers(1, 9)))
        what = luck.choice(["none", "form", "there and back", "full", "back"], p=[0.2, 0.2, 0.2, 0.2, 0.2])
        for size in {"form": [int(luck.integers(1, 6))], "there and back": [1, 4]}.get(what, []):
            crew.form(size)
            saving.form()
            crew.train(2)
        if what == "back" and saving.checkpoints.newest:
            saving.restore(saving.checkpoints.newest)
            crew.train(int(luck.integers(1, 4)))
        found = saving.save(number + 1, faults=["full"] + [""] * len(crew.members) if what == "full" else ())
        assert found is not None and bool(found.error) == (what == "full")
        if not found.error:
            assert_is_whole_one(saving, tmp_path / f"whole-{number}")
            num_increments += len(read_manifest(store, f"step-{crew.step:08d}").bases)
    assert num_increments > 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("twin", [False, True])
def test_a_bucket_that_was_away_is_whole_the_next_time(twin: bool, kind: str, tmp_path: Path) -> None:
    """What went away meanwhile, whoever had it does not know."""
    crew = Crew(kind, 1, twin)
    saving = Saving(str(tmp_path / "run"), crew)
    crew.train(20)
    saving.save()
    crew.form(4)
    saving.form()
    crew.train(8)
    crew.form(1)
    saving.form()
    saving.save()
    bases = [base for entry in read_manifest(saving.checkpoints.store, "step-00000028").tables for base in entry.bases]
    assert {*bases} == {-1, 20} and bases.count(-1) >= 16
    assert_is_whole_one(saving, tmp_path / "whole")


def assert_is_whole_one(saving: Saving, place: Path) -> None:
    """The newest checkpoint holds what one of all rows would, and what the members hold."""
    crew, name = saving.crew, f"step-{saving.crew.step:08d}"
    assert_same_rows(written(path(saving.location, crew.step)), crew.rows())
    whole = Saving(str(place), crew, 1)
    whole.save()
    stores = saving.checkpoints.store, whole.checkpoints.store
    assert not read_manifest(stores[1], name).bases
    arrays = ((n, values(crew.step)[n]) for n in in_order(values(0)))
    wanted = hashes_of(arrays, crew.step * 12, crew.digests())
    assert [hashes(store, name, read_manifest(store, name)) for store in stores] == [wanted] * 2


def _solo() -> Any:
    from elastic.collective.solo import SoloGroup

    return SoloGroup()


def _nothing(window: int) -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_both_hashes_are_as_documented() -> None:
    """Every byte written out by hand."""
    crew = Crew("reference", 2)
    crew.train(5)
    rows = crew.rows()
    arrays = (b'["w", "float32", [1]]\n' + np.float32(2).tobytes())
    lines = [b'["table/ads", 5, 16]\n', b'["table/users", 3, 16]\n']
    both = [arrays, arrays + b'["buffer/n", "float32", [1]]\n' + np.float32(3).tobytes()]
    for table, line in zip(("ads", "users"), lines):
        for which in (0, 1):
            both[which] += line + b"".join(bytes.fromhex(digests(rows[table, bucket])[which]) for bucket in range(16))
    both[1] += b'["cursor", 60]\n'
    given = [("parameter/w", np.array([2], np.float32)), ("buffer/n", np.array([3], np.float32))]
    assert hashes_of(given, 60, crew.digests()) == tuple(hashlib.sha256(text).hexdigest() for text in both)
    assert hashes_of(given[:1], 60, crew.digests())[0] == hashlib.sha256(both[0]).hexdigest()
    changed = [TableDigests(t.name, t.width, t.parameters, t.state ^ 1) for t in crew.digests()]
    assert hashes_of(given, 60, changed)[0] == hashlib.sha256(both[0]).hexdigest()
    assert hashes_of(given, 60, changed)[1] != hashlib.sha256(both[1]).hexdigest()


def test_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    crew = Crew("numba", 1)
    saving = Saving(str(tmp_path), crew)
    crew.train(5)
    wanted = crew.rows()
    one = saving.savers[0]
    one.mb_s = 1e-6  # it would take hours
    one.save(Arrays(values(5), 5), Save(1, 5), {})  # type: ignore[arg-type]
    crew.train(5)
    one.join()
    found = saving.checkpoints.take(saving.parts.pop(), 5)
    assert found is not None and not found.error
    assert_same_rows(written(path(str(tmp_path), 5)), wanted)


def test_a_save_that_is_waited_for_copies_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew("reference", 2)
    saving = Saving(str(tmp_path), crew)
    crew.train(5)
    found = saving.save(wait=True)
    assert found is not None and not found.error
    assert_same_rows(written(path(str(tmp_path), 5)), crew.rows())


def test_a_whole_one_copies_no_more_than_an_increment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows were copied once; then what has changed alone, the rest of a whole one comes from the files."""
    crew = Crew("reference", 1)
    saving, asked = Saving(str(tmp_path), crew, 2), list[int]()
    store = crew.members[0].stores["ads"]
    export = store.export

    def noted(bucket: int, after: int = -1) -> Rows:
        asked.append(after)
        return export(bucket, after)

    for step in range(1, 5):
        crew.train(1)
        monkeypatch.setattr(store, "export", noted)
        saving.save()
        monkeypatch.undo()
        assert set(asked) == {step - 1 if step > 1 else -1}
        asked.clear()
        assert read_manifest(saving.checkpoints.store, f"step-{step:08d}").bases == ({step - 1} if step % 2 == 0 else set())
        assert_same_rows(written(path(str(tmp_path), step)), crew.rows())


def test_a_whole_one_on_a_damaged_base_fails_and_the_next_is_of_all_rows_here(tmp_path: Path) -> None:
    crew = Crew("reference", 1)
    saving = Saving(str(tmp_path), crew, 1)
    crew.train(5)
    saving.save()
    (file, _) = sorted((tmp_path / "step-00000005").glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(bytes(content))
    crew.train(5)
    found = saving.save()
    assert found is not None and "does not have the hash" in found.error and not list((tmp_path / "step-00000010").iterdir())
    crew.train(5)
    found = saving.save()
    assert found is not None and not found.error
    assert_same_rows(written(path(str(tmp_path), 15)), crew.rows())


def test_rows_of_another_step_are_not_saved(tmp_path: Path) -> None:
    crew = Crew("reference", 1)
    crew.train(5)
    crew.members[0].committed = 4
    with pytest.raises(RunFailed, match="tables are of step 4, not 5"):
        saver(str(tmp_path), crew.members[0]).save(Arrays(values(5), 5), Save(1, 5), {})  # type: ignore[arg-type]


def test_parts_that_lack_buckets_make_no_checkpoint(tmp_path: Path) -> None:
    crew = Crew("reference", 3)
    saving = Saving(str(tmp_path), crew)
    crew.train(5)
    parts = saving.parts
    for rank, one in enumerate(saving.savers[:2]):
        one.save(Arrays(values(5), 5), Save(1, 5, rank, 2, True), {})  # type: ignore[arg-type]
    assert saving.checkpoints.take(parts[0], 5) is None
    found = saving.checkpoints.take(parts[1], 5)
    assert found is not None and "of table ads is in no file" in found.error
    assert not list(tmp_path.rglob("*.arrow")) and not list(tmp_path.rglob("*.safetensors")), "what was written goes"


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_left_saves_what_it_keeps_as_a_twin_too(kind: str, tmp_path: Path) -> None:
    crew = Crew(kind, 3, twin=True)
    saving = Saving(str(tmp_path), crew)
    crew.train(5)
    wanted = crew.rows()
    for rank, one in enumerate(saving.savers[1:]):
        one.save(Arrays(values(5), 5), Save(1, 5, rank, 2, True), {}, is_alone=True)  # type: ignore[arg-type]
    assert saving.checkpoints.take(saving.parts[0], 5) is None
    found = saving.checkpoints.take(saving.parts[1], 5)
    assert found is not None and not found.error
    assert_same_rows(written(path(str(tmp_path), 5)), wanted)
    verify(saving.checkpoints.store, "step-00000005")
    one = saver(str(tmp_path), crew.members[0])
    for _ in range(2):  # asked again it says so again
        with pytest.raises(RunFailed, match="Buckets .* of the embedding tables are kept by other workers"):
            one.save(Arrays(values(5), 5), Save(2, 5), {}, is_alone=True)  # type: ignore[arg-type]


def test_last_words_hold_all_rows_or_are_not_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair, alone = Crew("reference", 3, twin=True), Crew("reference", 2, twin=True)
    for crew in (pair, alone):
        crew.train(5)
    state: Any = Arrays(values(5), 5)
    assert not saver(str(tmp_path), pair.members[0]).leave(state, 4, {}, [])
    assert "are kept by other workers" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert saver(str(tmp_path), alone.members[1], worker="w1").leave(state, 4, {}, [])
    verify(Store.open(tmp_path), "step-00000005")
    assert_same_rows(written(path(str(tmp_path), 5)), alone.rows())


@pytest.mark.parametrize("mode", ["full", "error"])
def test_of_a_part_that_failed_nothing_is_left(mode: str, tmp_path: Path) -> None:
    crew = Crew("reference", 1)
    saving = Saving(str(tmp_path), crew)
    crew.train(5)
    from elastic.storage.faulty import FaultyFiles

    one = saving.savers[0]
    plain = one._store
    writes = iter(range(3))

    def fail_late(order: Save) -> Store:
        store = plain(order)
        return Store(FaultyFiles(store.files, mode, 8 + 4 * next(writes)), store.root)

    for step in (5, 6, 7):
        one._store = fail_late  # type: ignore[method-assign]
        found = saving.save()
        assert found is not None and found.error, step
        assert not [p.name for p in tmp_path.rglob("*") if p.is_file()], step
        crew.train(1)


def test_a_row_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    crew = Crew("reference", 1)
    crew.train(5)
    store = crew.members[0].stores["users"]
    rows = next(rows for n in range(16) if (rows := store.export(n)).ids.size)
    rows.values[0, 0] = np.inf
    store.load(rows)
    with pytest.raises(NonFiniteLoss, match=f"table users: the row of id {rows.ids[0]} is not finite after step 5"):
        saver(str(tmp_path), crew.members[0]).save(Arrays(values(5), 5), Save(1, 5, wait=True), {})  # type: ignore[arg-type]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_base_that_is_gone_makes_the_next_one_whole(tmp_path: Path) -> None:
    crew = Crew("reference", 2)
    saving = Saving(str(tmp_path), crew)
    for step in (5, 10):
        crew.train(5)
        saving.save()
        (tmp_path / f"step-{step:08d}" / "manifest.json").unlink()
    assert saving.checkpoints.known["step-00000010"].bases == set()
    crew.train(5)
    saving.save()
    crew.train(5)
    late = Saving(str(tmp_path), crew)
    late.savers = saving.savers
    late.parts = saving.parts
    (tmp_path / "step-00000015").rename(tmp_path / "gone")
    for rank, one in enumerate(saving.savers):
        one._is_there = lambda step: step == 15  # type: ignore[method-assign]
        one.save(Arrays(values(20), 20), Save(1, 20, rank, 2, True), {})  # type: ignore[arg-type]
    assert late.checkpoints.take(late.parts[0], 20) is None
    found = late.checkpoints.take(late.parts[1], 20)
    assert found is not None and found.error == "step-00000020 builds on step-00000015, which is not there any more."


def test_a_checkpoint_that_lay_there_before_is_no_base(tmp_path: Path) -> None:
    """Of another timeline: whose rows it has is not known."""
    crew = Crew("reference", 1)
    saving = Saving(str(tmp_path), crew)
    crew.train(5)
    saving.save()
    again = Saving(str(tmp_path), crew)
    again.save(2)
    crew.train(5)
    again.save(2)
    assert not read_manifest(again.checkpoints.store, "step-00000010").bases


def test_restoring_refuses_other_tables_before_anything_is_read(tmp_path: Path) -> None:
    crew = Crew("reference", 1)
    saving = Saving(str(tmp_path), crew)
    crew.train(5)
    saving.save()
    state: Any = Arrays(values(0))
    with pytest.raises(RecipeError, match="tables.ads is missing"):
        saver("/nowhere", None).restore(path(str(tmp_path), 5), state, _solo(), _nothing)
    other = Crew("reference", 1, specs=SPECS[:1])
    with pytest.raises(RecipeError, match="tables.users is missing"):
        saver("/nowhere", other.members[0]).restore(path(str(tmp_path), 5), state, _solo(), _nothing)
    assert other.members[0].committed == 0


def test_a_damaged_byte_leaves_nobody_with_a_state(tmp_path: Path) -> None:
    crew = Crew("reference", 2)
    saving = Saving(str(tmp_path), crew)
    for _ in range(2):
        crew.train(5)
        saving.save()
    for file in sorted(tmp_path.rglob("*.arrow")):
        content = file.read_bytes()
        manifest = read_manifest(saving.checkpoints.store, file.parent.name)
        entry = next(e for e in manifest.tables if e.name == file.name)
        for at in (entry.offsets[0] + 9, entry.offsets[3] + entry.sizes[3] - 1, 0, entry.bytes - 1):
            broken = bytearray(content)
            broken[at] ^= 4
            file.write_bytes(bytes(broken))
            with pytest.raises(BadCheckpoint):
                verify(saving.checkpoints.store, file.parent.name)
            if entry.offsets[0] <= at < entry.offsets[-1] + entry.sizes[-1]:
                for size in (1, 2):
                    other, ends = restore(path(str(tmp_path), 10), "reference", size)
                    assert any(isinstance(end, BadCheckpoint) for end in ends)
                    assert [held.committed for held in other.members] == [-1] * size
        file.write_bytes(content)
    assert newest_good(saving.checkpoints.store, look=verify) == ("step-00000010", [])


def test_a_part_says_all_of_its_files(tmp_path: Path) -> None:
    crew = Crew("reference", 2)
    saving = Saving(str(tmp_path), crew)
    crew.train(5)
    saving.savers[1].save(Arrays(values(5), 5), Save(3, 5, 1, 2, True), {})  # type: ignore[arg-type]
    (part,) = saving.parts
    names = [entry["name"] for entry in json.loads(part.tables)]
    assert names == ["rows-0001-of-0002-g000003.000-ads.arrow", "rows-0001-of-0002-g000003.001-users.arrow"]
    assert sorted(p.name for p in (tmp_path / "step-00000005").iterdir()) == [*names, "state-0001-of-0002-g000003.safetensors"]
