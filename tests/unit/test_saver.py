"""A worker's side: copied at once, written beside, one at a time; and what is said when it fails."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.checkpoint.manager import committed, read_manifest
from elastic.controller.checkpoints import Checkpoints
from elastic.errors import NonFiniteLoss, RunFailed
from elastic.messages import Part, Save
from elastic.storage import store as stores
from elastic.storage.faulty import FaultyFiles
from elastic.storage.remote import open_files
from elastic.storage.store import Store
from elastic.worker.saver import Saver
from tests.support.checkpoints import Arrays, assert_same, load, saver, values, write_parts


class Gate(FaultyFiles):
    """A disk that takes nothing until it is opened."""

    opened = threading.Event()

    def due(self, name: str) -> bool:
        assert name != "write" or self.opened.wait(20)
        return super().due(name)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    opened = threading.Event()
    monkeypatch.setattr(Gate, "opened", opened)
    monkeypatch.setattr(stores, "open_files",
                        lambda location: (lambda files, root: (Gate(files), root))(*open_files(location)))
    return opened


def test_a_write_keeps_to_its_pace_until_somebody_waits_for_it(tmp_path: Path) -> None:
    posted: list[Any] = []
    one = saver(str(tmp_path), post=posted.append, mb_s=1e-6)  # the ten kilobytes would take hours
    one.save(Arrays(values(50), 50), Save(1, 50), {})
    assert one.thread is not None
    one.thread.join(0.5)
    assert one.writing and not posted
    one.save(Arrays(values(60), 60), Save(1, 60, wait=True), {})
    assert [(part.step, part.error) for part in posted] == [(50, ""), (60, "")]


def test_training_goes_on_while_it_is_written_and_what_is_written_is_the_state_of_the_step(tmp_path: Path, gate: threading.Event) -> None:
    posted: list[Any] = []
    one, state = saver(str(tmp_path), "w0", posted.append), Arrays(values(50), 50)
    one.save(state, Save(1, 50), {"loss": 1.5, "worse": float("nan")})
    assert one.writing and not posted
    for array in state.arrays.values():
        array[...] = 0  # the next step
    gate.set()
    one.join()
    assert not one.writing
    (part,) = posted
    assert (part.worker, part.generation, part.step, part.rank, part.world_size, part.error) == ("w0", 1, 50, 0, 1, "")
    assert part.seconds >= part.stall_s >= 0
    found = Checkpoints(str(tmp_path), 3, "").take(part, 50)
    assert found is not None and found.event == "checkpoint_committed" and found.fields["bytes"] > 10_000
    arrays, manifest = load(Store.open(tmp_path), "step-00000050")
    assert_same(arrays, values(50))
    assert (manifest.cursor, manifest.seed, manifest.recipe, manifest.eval) == (600, 7, "recipe", {"loss": 1.5})
    assert manifest.extra == {"info": {"key": "data"}, "run": "a-run"}


def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: threading.Event) -> None:
    posted: list[Any] = []
    one = saver(str(tmp_path), "w0", posted.append)
    one.save(Arrays(values(50), 50), Save(1, 50), {})
    second = threading.Thread(target=lambda: one.save(Arrays(values(60), 60), Save(1, 60, wait=True), {}))
    second.start()
    second.join(0.1)
    assert second.is_alive() and not posted
    gate.set()
    second.join(20)
    assert [part.step for part in posted] == [50, 60]


def test_two_saves_of_one_plan_use_the_same_memory(tmp_path: Path) -> None:
    one = saver(str(tmp_path))
    one.prepare(Arrays(values(0)), 1, 3)  # type: ignore[arg-type]
    one.join()
    assert one.image is not None
    address = one.image.memory.__array_interface__["data"]
    for step in (10, 20):
        one.save(Arrays(values(step), step), Save(1, step, 1, 3, True), {})
        assert one.image.memory.__array_interface__["data"] == address
    one.save(Arrays(values(30), 30), Save(2, 30, 0, 2, True), {})  # another plan
    (tmp_path / "x").mkdir()
    parts = write_parts(str(tmp_path / "x"), 30, 2, 2)
    names = {"state-0000-of-0002-g000002.safetensors"}
    assert {p.name for p in (tmp_path / "step-00000030").iterdir()} == names and len(parts) == 2
    assert (tmp_path / "step-00000030" / min(names)).read_bytes() == (tmp_path / "x" / "step-00000030" / min(names)).read_bytes()


def test_the_same_step_is_not_written_twice_in_a_generation(tmp_path: Path) -> None:
    posted: list[Any] = []
    one = saver(str(tmp_path), "w0", posted.append)
    for order in (Save(1, 50), Save(1, 50, wait=True), Save(2, 50, wait=True)):
        one.save(Arrays(values(50), 50), order, {})
    assert [part.generation for part in posted] == [1, 2]


def failing(tmp_path: Path, mode: str) -> tuple[Saver, list[Part]]:
    posted: list[Part] = []
    return saver(str(tmp_path), "w0", posted.append), posted


@pytest.mark.parametrize(("mode", "words"), [("full", "No space left on device"), ("error", "Input/output error")])
def test_a_failure_is_told_and_raised_only_where_it_is_waited_for(mode: str, words: str, tmp_path: Path) -> None:
    one, posted = failing(tmp_path, mode)
    one.save(Arrays(values(50), 50), Save(1, 50, fault=mode), {})
    one.join()
    one.save(Arrays(values(60), 60), Save(1, 60), {})  # a checkpoint that was not written does not stop the training
    with pytest.raises(RunFailed) as error:
        one.save(Arrays(values(70), 70), Save(1, 70, wait=True, fault=mode), {})
    sentence = f"The checkpoint of step 70 could not be written to {tmp_path} ({words}); make room or mend the storage, then resume the run."
    assert str(error.value) == posted[2].error == sentence
    assert [part.step for part in posted] == [50, 60, 70] and [bool(part.error)
                                                               for part in posted] == [True, False, True]
    assert [p.name for p in tmp_path.rglob("*.safetensors*")] == ["state-0000-of-0001-g000001.safetensors"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_no_checkpoint(value: float, tmp_path: Path) -> None:
    one, posted = failing(tmp_path, "")
    state = Arrays(values(50), 50)
    state.arrays["parameter/w"][17, 3] = value
    one.save(state, Save(1, 50), {})
    one.join()
    assert "not finite after step 50" in posted[0].error
    with pytest.raises(NonFiniteLoss):
        one.save(Arrays(values(60), 60), Save(1, 60), {})
    other, _ = failing(tmp_path, "")
    with pytest.raises(NonFiniteLoss):
        other.save(state, Save(1, 50, wait=True), {})
    assert not list(tmp_path.rglob("*.safetensors*"))


# The controller's side.


def test_a_checkpoint_counts_with_its_last_part_whatever_the_order(tmp_path: Path) -> None:
    parts = write_parts(str(tmp_path), 50, 3, loss=1.0)
    checkpoints, ready = Checkpoints(str(tmp_path), 3, ""), []
    for part in (parts[2], parts[2], parts[0]):  # one is told twice
        assert checkpoints.take(part, 50, lambda: ready.append(1)) is None
    assert committed(checkpoints.store) == [] and not ready
    found = checkpoints.take(parts[1], 50, lambda: ready.append(1))
    assert found is not None and not found.error and ready == [1] and checkpoints.newest == 50
    assert checkpoints.take(parts[1], 50) is None, "it is told again"
    assert read_manifest(checkpoints.store, "step-00000050").eval == {"loss": 1.0}


def test_parts_of_two_generations_or_group_sizes_make_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), 3, "")
    one, two, alone = write_parts(str(tmp_path), 50, 2,
                                  1), write_parts(str(tmp_path), 50, 2, 2), write_parts(str(tmp_path), 50, 1, 2)
    assert checkpoints.take(one[0], 50) is None and checkpoints.take(two[1], 50) is None
    assert committed(checkpoints.store) == []
    found = checkpoints.take(alone[0], 50)
    assert found is not None and not found.error


def test_a_part_that_failed_ends_it_and_what_the_others_wrote_goes(tmp_path: Path) -> None:
    checkpoints, parts = Checkpoints(str(tmp_path), 3, ""), write_parts(str(tmp_path), 50, 3)
    assert checkpoints.take(parts[0], 50) is None
    found = checkpoints.take(Part("w1", 1, 50, "", 0.0, 0.0, 1, 3, "", "The disk is full."), 50)
    assert found is not None and (found.event, found.fields["reason"]) == ("checkpoint_rejected", "The disk is full.")
    assert checkpoints.take(parts[2], 50) is None and committed(checkpoints.store) == []
    assert [p.name for p in tmp_path.rglob("*.safetensors")] == ["state-0001-of-0003-g000001.safetensors"], "rank 1 said that it wrote nothing"


def test_a_checkpoint_beyond_the_lines_on_disk_does_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), 3, "")
    (part,) = write_parts(str(tmp_path), 50, 1)
    found = checkpoints.take(part, 49)
    assert found is not None and "not all on disk" in found.error and committed(checkpoints.store) == []


def test_last_words_are_said_only_where_nothing_as_new_is(tmp_path: Path) -> None:
    lines = [{"step": 50, "loss": 1.0}]
    assert saver(str(tmp_path), "w3").leave(Arrays(values(50), 50), 4, {"loss": 2.0}, lines)
    for step in (0, -1, 49, 50):
        assert not saver(str(tmp_path), "w1").leave(Arrays(values(50), step), 4, {}, lines)
    arrays, manifest = load(Store.open(tmp_path), "step-00000050")
    assert_same(arrays, values(50))
    assert manifest.extra["lines"] == lines and manifest.generation == 4
    assert Checkpoints(str(tmp_path), 3, "").lines_of(str(tmp_path / "step-00000050")) == lines
    assert saver(str(tmp_path), "w1").leave(Arrays(values(51), 51), 4, {}, [])
