"""What embedding tables cannot serve, as users meet it: one sentence before workers start, or before the vote of its step, and nothing lost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic import cli
from elastic.driver.inference import check_checkpoint
from elastic.recipe import dumps
from tests.support.inprocess import MODULES, fit
from tests.support.modules import Steep
from tests.support.table_runs import by_id, click_log, counting_recipe, stored

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("numba", reason="numba, which computes rows, is not installed")

ROWS = 40
EVEN = [2 * row for row in range(ROWS + 1)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lists(file: Path, offsets: Iterable[int] = EVEN, values: pa.Array | None = None, users: Any = range(ROWS)) -> Path:
    """An Arrow file of lists that lie among their values as `offsets` say, which nobody checks."""
    goods = pa.Array.from_buffers(pa.list_(pa.int64()), ROWS, [None, pa.py_buffer(np.array(EVEN, np.int32))],
                                  children=[pa.array(range(2 * ROWS)) if values is None else values])
    table = pa.table({"age": np.zeros(ROWS, np.float32), "user": pa.array(users, pa.int64()), "goods": goods})
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    whole, wanted = file.read_bytes(), np.array(EVEN, np.int32).tobytes()
    assert whole.count(wanted) == 1
    file.write_bytes(whole.replace(wanted, np.array(list(offsets), np.int32).tobytes()))
    return file


def checked(folder: Path, file: Path, capsys: pytest.CaptureFixture[str], *sets: str) -> tuple[int, str]:
    """What `elastic train --check` says: (its code, its sentence)."""
    (folder / "recipe.toml").write_text(dumps(counting_recipe(file, {}, data={"format": file.suffix[1:]})))
    capsys.readouterr()
    code = cli.run(["train", str(folder / "recipe.toml"), "--check", *(word for pair in sets for word in ("--set", pair))])
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    return code, said.err


def changed(row: int, offset: int) -> list[int]:
    return [*EVEN[:row], offset, *EVEN[row + 1:]]


LISTS: dict[str, dict[str, Any]] = {
    "in row 20 (counted from 0) a list from 60 to 42 of 80 values": {"offsets": changed(20, 60)},
    "in row 39 (counted from 0) a list from 78 to 500 of 80 values": {"offsets": changed(ROWS, 500)},
    "in row 0 (counted from 0) a list from -4 to 2 of 80 values": {"offsets": changed(0, -4)},
    "has a list that lacks a value in row 3": {"values": pa.array([None if n == 7 else n for n in range(2 * ROWS)])},
    "has no value in row 39": {"users": [*range(ROWS - 1), None]},
}


@pytest.mark.parametrize("words", LISTS)
def test_lists_that_cannot_be_looked_up_are_refused_with_file_column_and_row(words: str, tmp_path: Path,
                                                                             capsys: pytest.CaptureFixture[str]) -> None:
    file = lists(tmp_path / "log.arrow", **LISTS[words])
    code, said = checked(tmp_path, file, capsys)
    assert (code, said.count("\n")) == (2, 1) and words in said and str(file) in said


@pytest.mark.parametrize(("override", "words"), [
    ("tables.users.ttl_steps=-1", "tables.users.ttl_steps = -1 cannot work"), ("tables.goods.max_rows=-5", "tables.goods.max_rows = -5 cannot work"),
    ("tables.goods.admit=-2", "tables.goods.admit = -2 cannot work"), ("embedding.memory_gb=-1", "embedding.memory_gb = -1 cannot work"),
    ("mesh.tensor=2", "mesh.tensor = 2 is not for embedding tables on workers"),
    ("mesh.pipeline=2", "mesh.pipeline = 2 is not for embedding tables on workers")])
def test_recipes_that_cannot_work_are_refused_before_a_worker_starts(override: str, words: str, tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    file = lists(tmp_path / "log.arrow")
    assert checked(tmp_path, file, capsys)[0] == 0
    code, said = checked(tmp_path, file, capsys, override)
    assert (code, said.count("\n")) == (2, 1) and words in said


def test_ids_below_zero_are_ids_of_a_growing_table(tmp_path: Path) -> None:
    ids = [-(1 << 63), -1, *range(ROWS - 2)]
    recipe = counting_recipe(lists(tmp_path / "log.arrow", users=ids), {}, run={"steps": 5}, data={"format": "arrow"})
    fit(tmp_path / "run", recipe).assert_sound(5)
    assert set(by_id(stored(tmp_path / "run", 5)["users"])) == set(ids)


def test_a_gradient_that_is_no_number_ends_the_run_before_its_step_with_table_and_id(tmp_path: Path) -> None:
    log = click_log(tmp_path / "log.parquet")
    table = pq.read_table(log)
    users = table["user"].to_pylist()
    row = next(row for row, user in enumerate(users) if users.count(user) == 1)
    ages = np.zeros(len(users), np.float32)
    ages[row] = 100
    pq.write_table(table.set_column(table.schema.get_field_index("age"), "age", pa.array(ages)), log)
    recipe = counting_recipe(log, {}, run={"steps": 30}, model={"kind": f"{MODULES}:Steep"}, elastic={"max_workers": 2})
    oracle = fit(tmp_path / "undisturbed", recipe).sha
    Steep.armed.add("slope")
    try:
        result = fit(tmp_path / "run", recipe)
    finally:
        Steep.armed.clear()
    last = max(result.steps)
    error = result.summary["error"]
    assert result.outcome.status == "failed" and "\n" not in error
    assert f"table users: the gradient of id {users[row]} is not finite at step {last + 1}" in error
    assert check_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{last:08d}").step == last
    again = fit(tmp_path / "run", recipe)
    again.assert_sound(30)
    assert again.sha == oracle


def test_a_run_goes_on_with_the_width_and_optimizer_of_its_checkpoint_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = counting_recipe(click_log(tmp_path / "log.parquet"), {}, run={"steps": 5})
    fit(tmp_path / "run", recipe).assert_sound(5)
    for override in ("tables.users.width=4", "tables.users.optimizer=adam"):
        capsys.readouterr()
        assert cli.run(["resume", str(tmp_path / "run"), "--set", override, "--set", "run.steps=8"]) == 2
        said = capsys.readouterr().err
        assert override.partition("=")[0] in said and "is not what this run began with" in said and said.count("\n") == 1
    assert check_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000005").step == 5
