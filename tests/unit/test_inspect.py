"""A look into checkpoints: what is in one, and what differs between two, against NumPy and the files themselves."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from elastic import cli
from elastic.checkpoint.find import find
from elastic.checkpoint.inspect import array_rows, differences, distance, values_apart
from elastic.checkpoint.manager import commit, read_manifest
from elastic.checkpoint.manifest import Manifest
from elastic.storage.store import Store
from tests.support.checkpoints import write_part

RECIPE = '[run]\nname = "small"\n'


def make(root: Path, step: int, arrays: dict[str, np.ndarray], halves: bool = False) -> Path:
    """A checkpoint of one file, or of two that each hold half of every array's first dim."""
    store, files = Store.open(root), []
    if halves:
        for rank, pick in enumerate((slice(None, 2), slice(2, None))):
            boxes = {name: (array.shape, (2 * rank,) + (0,) * (array.ndim - 1)) for name, array in arrays.items()}
            files.append(write_part(store, step, 1, f"state-{rank}",
                                    {name: array[pick] for name, array in arrays.items()}, boxes))
    else:
        files.append(write_part(store, step, 1, "state", arrays))
    return root / commit(store, Manifest(step, 1, step * 8, 3, RECIPE, tuple(files), eval={"loss": 1.5}))


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {"parameter/w": generator.standard_normal((4, 6), np.float32),
            "optimizer/exp_avg/w": generator.standard_normal((4, 6), np.float32),
            "buffer/count": np.arange(5, dtype=np.int64)}


def test_tables_say_what_is_on_the_disk(tmp_path: Path, arrays: dict[str, np.ndarray],
                                        capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "run" / "checkpoints", 7, arrays)
    assert cli.run(["inspect", str(tmp_path / "run")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["step", "7"] in lines and ["cursor", "56", "samples"] in lines and ["evaluation", "loss", "1.5000"] in lines
    assert ["recipe", "small"] in lines and ["generation", "1"] in lines and ["seed", "3"] in lines
    for name, array in arrays.items():
        assert [name, array.dtype.name, *" x ".join(map(str, array.shape)).split(), str(array.nbytes), "1"] in lines
    file = next(f for f in os.listdir(path) if f.endswith(".safetensors"))
    row = next(line for line in lines if file in line)
    assert row[:4] == ["1", file, str((path / file).stat().st_size), "3"]


def test_an_array_in_two_files_is_one_row(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    del arrays["buffer/count"]
    store, name = find(make(tmp_path, 7, arrays, halves=True))
    manifest = read_manifest(store, name)
    assert [(row.name, row.shape, row.bytes, row.files) for row in array_rows(manifest)] == [
        ("optimizer/exp_avg/w", (4, 6), 96, (1, 2)), ("parameter/w", (4, 6), 96, (1, 2))]


def test_damage_is_shown_and_is_exit_code_3(tmp_path: Path, arrays: dict[str, np.ndarray],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, 7, arrays)
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert cli.run(["inspect", str(path / "manifest.json")]) == 3
    out = capsys.readouterr().out
    assert "not whole" in out and f"has {file.stat().st_size} bytes" in out and "parameter/w" in out
    file.unlink()
    assert cli.run(["inspect", str(path)]) == 3
    out = capsys.readouterr().out
    assert out.count("missing") == 1 and "not whole" in out


def test_a_difference_is_counted_as_numpy_counts_it(tmp_path: Path, arrays: dict[str, np.ndarray],
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    other = {name: array.copy() for name, array in arrays.items()}
    other["parameter/w"][1, 2:5] += np.float32([0.5, -2, 1e-3])
    other["buffer/count"] = other["buffer/count"].astype(np.int32)
    other["parameter/new"] = np.zeros(3, np.float32)
    a, b = make(tmp_path / "a", 7, arrays), make(tmp_path / "b", 8, other)
    found, num_same = differences(find(a), find(b))
    assert num_same == 1
    assert [(d.name, d.reason) for d in found] == [("buffer/count", "int64 in A, int32 in B"),
                                                   ("parameter/new", "only in B"), ("parameter/w", "")]
    largest = np.abs(arrays["parameter/w"].astype(np.float64) - other["parameter/w"]).max()
    assert (found[2].num_elements, found[2].num_different, found[2].max_abs) == (24, 3, largest)
    assert cli.run(["inspect", str(a), "--diff", str(b)]) == 0
    out = capsys.readouterr().out
    assert "3 arrays differ, 1 array the same to the bit" in out
    assert ["parameter/w", "24", "3", "2"] in [line.split() for line in out.splitlines()]


def test_a_checkpoint_does_not_differ_from_itself_however_it_is_cut(tmp_path: Path,
                                                                    arrays: dict[str, np.ndarray]) -> None:
    del arrays["buffer/count"]
    arrays["parameter/w"][0, :3] = [np.nan, np.inf, -np.inf]
    assert differences(find(make(tmp_path / "a", 7, arrays)),
                       find(make(tmp_path / "b", 7, arrays, halves=True))) == ([], 2)


@pytest.mark.parametrize(("x", "y", "different", "largest"), [
    ([0.0, 1.0], [-0.0, 1.0], 1, 0.0),
    ([np.nan, 1.0], [np.nan, 3.0], 1, 2.0),
    ([np.nan, 1.0], [2.0, 9.0], 2, math.nan),
    ([np.inf, 1.0], [-np.inf, 1.0], 1, math.inf),
])
def test_special_numbers(x: list[float], y: list[float], different: int, largest: float) -> None:
    found = values_apart(np.array(x, np.float32), np.array(y, np.float32))
    assert found[0] == different and (found[1] == largest or math.isnan(found[1]) and math.isnan(largest))


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint64", "bool"])
def test_whole_numbers_at_their_limits(kind: str) -> None:
    low, high = (0, 1) if kind == "bool" else (np.iinfo(kind).min, np.iinfo(kind).max)
    assert distance(np.array([high, low], kind), np.array([low, high], kind)) == float(int(high) - int(low))


@pytest.mark.parametrize(("arguments", "says"), [
    (["absent"], "There is no good checkpoint at absent"),
    (["."], "There is no good checkpoint at ."),
    ([""], "There is no good checkpoint at ."),
    (["/"], "There is no good checkpoint at /;"),
    (["nonsense://x/y"], "'nonsense://x' cannot be opened"),
    (["good", "--diff", "absent"], "There is no good checkpoint at absent"),
    (["bad"], "does not have the hash"),
    ([], "Missing argument"),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path, arrays: dict[str, np.ndarray], arguments: list[str],
                                                   says: str,
                                                   monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("good", "bad"):
        os.rename(make(tmp_path / name, 7, arrays), tmp_path / "step-00000007")
        os.rmdir(tmp_path / name)
        os.rename(tmp_path / "step-00000007", tmp_path / name)
    manifest = tmp_path / "bad" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("small", "large"))
    assert cli.run(["inspect", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("elastic: ") and err.count("\n") == 1


def test_a_run_directory_means_its_newest_good_one(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    root = tmp_path / "run" / "checkpoints"
    older, newer = make(root, 7, arrays), make(root, 8, arrays)
    assert find(tmp_path / "run")[1] == find(f"{newer}/")[1] == find(root)[1] == newer.name
    assert find(f"file://{tmp_path}/run")[1] == find(f"file://{newer}/manifest.json")[1] == newer.name
    next(newer.glob("*.safetensors")).unlink()
    assert find(tmp_path / "run")[1] == older.name
