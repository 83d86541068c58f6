"""Whole or absent: whatever happens to its files, a checkpoint is used as it was written or not at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from elastic.checkpoint.manager import clean, commit, newest_good, prune, read_init, split, verify
from elastic.checkpoint.manifest import Manifest
from elastic.controller.checkpoints import Checkpoints
from elastic.errors import BadCheckpoint, RecipeError
from elastic.storage.store import Store
from tests.support.checkpoints import load, write_part


def some_arrays(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {"parameter/w": draw.standard_normal((40, 30)).astype(np.float32),
            "parameter/b": draw.standard_normal(7).astype(np.float32),
            "optimizer/exp_avg/w": draw.standard_normal((40, 30)).astype(np.float32),
            "buffer/count": np.array(seed, np.int64),
            "buffer/mask": draw.random(5) > 0.5, "buffer/none": np.zeros((0, 3), np.float32)}


def halves(arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Two parts: the first array of both is one half of w, the rest lies in the second."""
    w = arrays["parameter/w"]
    rest = {name: array for name, array in arrays.items() if name != "parameter/w"}
    return [{"arrays": {"parameter/w": w[:15]}, "boxes": {"parameter/w": ((40, 30), (0, 0))}},
            {"arrays": {"parameter/w": w[15:], **rest}, "boxes": {"parameter/w": ((40, 30), (15, 0))}}]


def save(store: Store, step: int, generation: int = 1, **keys: Any) -> str:
    parts = [write_part(store, step, generation, f"part-{n}", **half)
             for n, half in enumerate(halves(some_arrays(step)))]
    return commit(store, Manifest(step, generation, step * 12, 7, "recipe", tuple(parts), **keys))


def assert_is(store: Store, name: str, step: int) -> None:
    arrays, manifest = load(store, name)
    expected = some_arrays(step)
    assert manifest.step == step
    assert arrays.keys() == expected.keys()
    for key, value in expected.items():
        assert (arrays[key].dtype, arrays[key].shape) == (value.dtype, value.shape)
        assert arrays[key].tobytes() == value.tobytes()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def store(root: Path) -> Store:
    return Store.open(root)


def test_what_is_saved_in_parts_is_loaded_whole(store: Store) -> None:
    assert newest_good(store) == (None, [])
    assert save(store, 50) == "step-00000050"
    assert save(store, 100) == "step-00000100"
    assert newest_good(store) == ("step-00000100", [])
    assert_is(store, "step-00000050", 50)
    assert_is(store, "step-00000100", 100)
    assert verify(store, "step-00000050").cursor == 600


def test_part_files_are_safetensors_and_carry_their_generation(store: Store, root: Path) -> None:
    save(store, 50, generation=3)
    files = sorted(path.name for path in (root / "step-00000050").iterdir())
    assert files == ["manifest.json", "part-0-g000003.safetensors", "part-1-g000003.safetensors"]
    found = safetensors.numpy.load_file(root / "step-00000050" / files[2])
    for name, value in halves(some_arrays(50))[1]["arrays"].items():
        assert found[name].tobytes() == value.tobytes()
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)


def files_of(root: Path, step: int) -> list[Path]:
    return sorted((root / f"step-{step:08d}").iterdir())


def assert_falls_back(store: Store, why: str) -> None:
    """Step 100 is not whole: it is never loaded, and step 50 is taken."""
    name, rejected = newest_good(store, look=verify)
    assert (name, [bad for bad, _ in rejected]) == ("step-00000050", ["step-00000100"]), why
    assert rejected[0][1].endswith(".")
    with pytest.raises(BadCheckpoint):
        load(store, "step-00000100")
    assert_is(store, "step-00000050", 50)


def test_a_flipped_byte_anywhere_is_found(store: Store, root: Path) -> None:
    save(store, 50)
    save(store, 100)
    draw = np.random.default_rng(0)
    for file in files_of(root, 100):
        whole = file.read_bytes()
        edges = [*range(24), *range(len(whole) - 24, len(whole))]
        for place in sorted({*edges, *draw.integers(0, len(whole), 40).tolist()}):
            broken = bytearray(whole)
            broken[place] ^= 1 << int(draw.integers(8))
            file.write_bytes(bytes(broken))
            assert_falls_back(store, f"{file.name}, byte {place}")
        file.write_bytes(whole)
    assert newest_good(store) == ("step-00000100", [])


def test_a_truncated_lengthened_missing_or_emptied_file_is_found(store: Store, root: Path) -> None:
    save(store, 50)
    save(store, 100)
    for file in files_of(root, 100):
        whole = file.read_bytes()
        for content in (b"", whole[:7], whole[:len(whole) // 2], whole[:-1], whole + b"\0"):
            file.write_bytes(content)
            assert_falls_back(store, f"{file.name}, {len(content)} bytes")
        file.unlink()
        if file.name == "manifest.json":
            assert newest_good(store) == ("step-00000050", [])  # without a manifest there is no checkpoint
        else:
            assert_falls_back(store, f"{file.name} missing")
        file.mkdir()
        assert_falls_back(store, f"{file.name} is a folder")
        file.rmdir()
        file.write_bytes(whole)
    assert newest_good(store) == ("step-00000100", [])


def test_swapped_files_are_found(store: Store, root: Path) -> None:
    """Two parts of one checkpoint, and the same part of two checkpoints."""
    save(store, 50)
    save(store, 100)
    old, new = files_of(root, 50), files_of(root, 100)
    for one, other in ((new[1], new[2]), (new[1], old[1]), (new[2], old[2]), (new[0], old[0])):
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        assert_falls_back(store, f"{one.name} is {other}")
        one.write_bytes(kept)


def test_a_part_from_another_step_with_its_manifest_is_found(store: Store, root: Path) -> None:
    save(store, 50)
    shutil.copytree(root / "step-00000050", root / "step-00000100")
    assert_falls_back(store, "a copy of step 50 under the name of step 100")


def test_a_huge_file_is_not_read(store: Store, root: Path) -> None:
    save(store, 50)
    save(store, 100)
    for file in files_of(root, 100):
        whole = file.read_bytes()
        with open(file, "r+b") as opened:
            opened.truncate(1 << 40)  # a sparse terabyte
        assert_falls_back(store, f"{file.name} is huge")
        file.write_bytes(whole)


def test_a_file_with_a_right_hash_and_other_arrays_is_found(store: Store) -> None:
    save(store, 50)
    entry = write_part(store, 100, 1, "part-0", {"parameter/w": np.zeros(3, np.float32)})
    lie = replace(entry, pieces=(replace(entry.pieces[0], dtype="int32"),))
    commit(store, Manifest(100, 1, 0, 0, "", (lie,)))
    assert_falls_back(store, "dtype")


def test_no_good_checkpoint_is_said_with_every_reason(store: Store, root: Path) -> None:
    for step in (50, 100):
        save(store, step)
        files_of(root, step)[1].unlink()
    name, rejected = newest_good(store)
    assert name is None
    assert [bad for bad, _ in rejected] == ["step-00000100", "step-00000050"]
    assert all("is missing" in reason for _, reason in rejected)


def test_a_younger_generation_saves_the_same_step_again(store: Store, root: Path) -> None:
    save(store, 100, generation=1)
    save(store, 100, generation=2)
    assert_is(store, "step-00000100", 100)
    assert load(store, "step-00000100")[1].generation == 2
    assert clean(store, 2) == [f"step-00000100/part-{n}-g000001.safetensors" for n in range(2)]
    assert_is(store, "step-00000100", 100)


def test_leftovers_go_only_when_nobody_can_want_them(store: Store, root: Path) -> None:
    for step, generation in ((50, 1), (60, 2), (200, 1)):
        write_part(store, step, generation, "part-0", some_arrays(step))
    (root / "step-00000050" / "part-1-g000001.safetensors.0123.tmp").write_bytes(b"half")
    (root / "notes.txt").write_text("somebody's own")
    assert clean(store, 2) == []  # nothing is committed yet
    save(store, 100, generation=2)
    clean(store, 2)
    assert sorted(path.name for path in root.iterdir()) == ["notes.txt", "step-00000060", "step-00000100",
                                                            "step-00000200"]
    clean(store, 3)
    assert sorted(path.name for path in root.iterdir()) == ["notes.txt", "step-00000100", "step-00000200"]
    files_of(root, 100)[0].write_text("broken")
    clean(store, 9)
    assert len(files_of(root, 100)) == 3  # a bad one stays as it is


def test_the_newest_and_the_best_are_kept(store: Store, root: Path) -> None:
    losses = {10: 2.0, 20: 1.5, 30: 1.6, 40: 1.5, 50: 1.7, 60: 1.8, 70: 1.9}
    for step, loss in losses.items():
        save(store, step, eval={"loss": loss, "normalized_entropy": loss, "accuracy": loss})
    assert prune(store, 2, "eval.loss") == [f"step-{step:08d}" for step in (50, 40, 30, 10)]
    assert [path.name for path in sorted(root.iterdir())] == [f"step-{step:08d}" for step in (20, 60, 70)]
    assert prune(store, 2, "eval.normalized_entropy") == []
    assert prune(store, 1, "eval.accuracy", best_mode="max") == ["step-00000060", "step-00000020"]
    assert prune(store, 3, None) == []
    assert_is(store, "step-00000070", 70)


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_link_points_to_is_never_removed(store: Store, root: Path, tmp_path: Path, whole: bool) -> None:
    """Checkpoints that were moved elsewhere, and leftovers in them; a link in a folder that goes."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "diary").write_text("mine")
    for step in (10, 20, 30):
        save(store, step)
    moved = root / "step-00000010"
    moved.rename(elsewhere / "old")
    moved.symlink_to(elsewhere / "old")
    if not whole:
        (elsewhere / "old" / "manifest.json").unlink()
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    (root / "step-00000020" / "notes").symlink_to(elsewhere)
    (root / "step-00000020" / "nowhere").symlink_to(tmp_path / "missing")
    clean(store, 9)
    prune(store, 1)
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in root.glob("step-*")) == (["step-00000030"] if whole
                                                                 else ["step-00000010", "step-00000030"])


def test_every_nth_step_is_kept_for_ever(store: Store, root: Path) -> None:
    for step in range(10, 90, 10):
        save(store, step)
    assert prune(store, 1, None, keep_every=30) == [f"step-{step:08d}" for step in (70, 50, 40, 20, 10)]
    assert [path.name for path in sorted(root.iterdir())] == [f"step-{step:08d}" for step in (30, 60, 80)]


def written(store: Store, step: int) -> Manifest:
    """A manifest that waits for its commit."""
    return Manifest(step, 1, step * 12, 7, "recipe", (write_part(store, step, 1, "part-0", some_arrays(step)),))


def test_nothing_is_committed_whose_files_are_not_to_be_seen(root: Path, tmp_path: Path) -> None:
    manifest = written(Store.open(tmp_path / "elsewhere"), 50)
    with pytest.raises(BadCheckpoint, match="part-0-g000001.safetensors is missing where the controller looks, in "
                                            ".*share"):
        Checkpoints(str(root), 3, "").commit(manifest)
    assert not root.exists()


def test_a_commit_counts_though_old_ones_cannot_be_removed(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    def resist(name: str) -> None:
        raise OSError(5, f"{name} resists")

    checkpoints = Checkpoints(str(root), 1, "")
    checkpoints.commit(written(store, 50))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.store, "remove", resist)
        checkpoints.commit(written(store, 100))
    assert checkpoints.newest == 100 and "resists" in caplog.text
    assert newest_good(store) == ("step-00000100", [])
    checkpoints.commit(written(store, 150))
    assert [path.name for path in root.iterdir()] == ["step-00000150"]


def test_a_commit_reads_no_manifest_twice(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its own nor those of the run that went before, of which only the first commit knows nothing."""
    save(store, 10)
    checkpoints, reads = Checkpoints(str(root), 3, ""), list[str]()
    read = checkpoints.store.files.read
    monkeypatch.setattr(checkpoints.store.files, "read", lambda path, low, high: reads.append(Path(path).parent.name)
                        or read(path, low, high))
    for step in range(20, 70, 10):
        checkpoints.commit(written(store, step))
    assert reads == ["step-00000010"]
    assert [path.name for path in sorted(root.iterdir())] == sorted(checkpoints.known) == [f"step-{step:08d}" for step in (40, 50, 60)]


def test_a_manifest_that_is_known_does_not_make_up_for_files_that_are_gone(store: Store, root: Path) -> None:
    checkpoints = Checkpoints(str(root), 2, "")
    for step in (10, 20):
        checkpoints.commit(written(store, step))
    next((root / "step-00000020").glob("*.safetensors")).unlink()
    checkpoints.commit(written(store, 30))
    assert [path.name for path in sorted(root.iterdir())] == ["step-00000010", "step-00000020", "step-00000030"]


def test_broken_checkpoints_do_not_push_good_ones_out(store: Store, root: Path) -> None:
    for step in (10, 20, 30):
        save(store, step)
    files_of(root, 30)[1].unlink()
    files_of(root, 20)[0].write_text("{}")
    assert prune(store, 1) == []
    assert newest_good(store)[0] == "step-00000010"


def test_one_found_bad_while_it_was_loaded_does_not_push_good_ones_out(store: Store, root: Path) -> None:
    name = save(store, 30)
    file = files_of(root, 30)[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    checkpoints = Checkpoints(str(root), 1, "")
    checkpoints.refuse(checkpoints.path(name))
    checkpoints.commit(written(store, 10))
    checkpoints.commit(written(store, 20))
    assert checkpoints.newest_good()[1] == 20
    assert [path.name for path in sorted(root.iterdir())] == ["step-00000020", "step-00000030"], "it stays where it is"


def test_starting_weights_from_a_file_or_a_checkpoint(store: Store, root: Path, tmp_path: Path) -> None:
    name = save(store, 50)
    file = tmp_path / "weights.safetensors"
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], np.float16)}
    safetensors.numpy.save_file(weights, file, metadata={"format": "np"})
    found = read_init(file)
    assert {name: array.tolist() for name, array in found.items()} == {name: array.tolist()
                                                                       for name, array in weights.items()}
    for path in (root / name, root / name / "manifest.json"):
        found = read_init(path)
        assert set(found) == {"w", "b"}
        assert found["w"].tobytes() == some_arrays(50)["parameter/w"].tobytes()
    assert split(root / name)[1] == name


def test_bfloat16_weights_become_float32(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16()
    file = tmp_path / "weights.safetensors"
    from safetensors.torch import save_file
    save_file({"w": values}, file)
    assert read_init(file)["w"].tolist() == values.float().tolist()


def test_starting_weights_that_cannot_be_read_are_one_sentence(store: Store, root: Path, tmp_path: Path) -> None:
    save(store, 50)
    files_of(root, 50)[1].unlink()
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"\xff" * 100)
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    for path in (tmp_path / "none.safetensors", garbage, pickled, root / "step-00000050", tmp_path):
        with pytest.raises(RecipeError, match="model.init"):
            read_init(path)


def test_a_storage_that_does_not_answer_is_not_one_without_checkpoints(tmp_path: Path) -> None:
    store = Store.open(tmp_path)

    def look(store: Store, name: str) -> None:
        raise OSError("no answer")

    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / "manifest.json").write_text("{}")
    with pytest.raises(OSError, match=r"step-00000004.*no answer.*resume the run when the storage answers"):
        newest_good(store, look=look)
