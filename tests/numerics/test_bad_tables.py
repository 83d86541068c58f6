"""Tables that cannot serve: refused before a worker starts, or, found out during the run, one sentence and nothing lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic import cli
from elastic.data.order import Blocks
from elastic.driver.console import EXIT
from elastic.driver.inference import check_checkpoint
from elastic.recipe import dumps
from tests.support.inprocess import fit
from tests.support.tables import rows, table_recipe, write

pytest.importorskip("torch", reason="torch is not installed")

SIZE, GROUP = 1000, 100


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_the_command_refuses_a_table_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{n}.parquet", rows(50)) for n in range(3)]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dumps(table_recipe(files)))
    assert cli.run(["train", str(recipe), "--check"]) == 0
    write(files[1], rows(50).drop_columns(["y"]))
    nulls = rows(50).set_column(0, "id", pa.array([None, *range(49)], pa.int64()))
    cases = [(rows(50).drop_columns(["y"]), f'{files[1]} has no column "y"'),
             (nulls, f'the column "id" of {files[1]} has no value in row 0'),
             (rows(0), None), (rows(50).select(["word"]), "has no column")]
    for source, words in cases:
        write(files[1], source)
        capsys.readouterr()
        assert cli.run(["train", str(recipe), "--check"]) == (2 if words
                                                              else 0), "an empty file among others is no fault"
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        assert not words or (words in said.err and said.err.count("\n") == 1)


def test_a_damaged_row_group_ends_the_run_with_its_state_intact(tmp_path: Path) -> None:
    """It is found when it is read, at a known step; with the file restored the run goes on to the bits of an
    undisturbed one."""
    file = write(tmp_path / "t.parquet", rows(SIZE), GROUP, use_dictionary=False, compression="none")
    recipe = table_recipe(file, data={"shuffle_by": "blocks", "columns": ["x", "y"], "batch_size": 40},
                          checkpoint={"every_steps": 5})
    whole, bits = file.read_bytes(), fit(tmp_path / "undisturbed", recipe).sha
    # fed from step 16 on
    seventh = int(Blocks(np.full(10, GROUP), recipe.run.seed).locate(np.array([6 * GROUP]))[1][0]) // GROUP
    about = pq.ParquetFile(file).metadata.row_group(seventh).column(1)
    torn = bytearray(whole)
    torn[about.data_page_offset + about.total_compressed_size // 2] ^= 0x01
    file.write_bytes(bytes(torn))
    result = fit(tmp_path / "run", recipe)
    assert result.outcome.status == "failed" and EXIT["failed"] == 3
    error = result.summary["error"]
    assert f"row group {seventh} of {file} cannot be read" in error and "\n" not in error and error.endswith(".")
    assert result.steps == list(range(1, 16)), "every step before it counts"
    good = tmp_path / "run" / "checkpoints" / "step-00000015"
    assert check_checkpoint(good).step == 15
    file.write_bytes(whole)
    again = fit(tmp_path / "run", recipe)
    again.assert_sound(25)
    assert again.sha == bits
