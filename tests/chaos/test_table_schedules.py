"""Random schedules of kills, stops, failing disks, joins and leaves over embedding tables: every row counts what the ledger has, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from elastic.recipe import Recipe
from tests.support.inprocess import Result, fit
from tests.support.sampling import sample
from tests.support.schedules import STEPS, Schedule, play, schedule
from tests.support.table_runs import LIMITS, assert_counted, click_log, counting_recipe
from tests.support.tight_rows import make_tight

pytest.importorskip("torch", reason="torch is not installed")
# a saver's thread dies with its process
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

SEEDS, AT_ONCE, TOGETHER = 100, 4, 5

MOVE_MB = (16.0, 1e-6, 3e-4)  # all buckets at one boundary, one by one, and a few at a time


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("clicks")
    with pytest.MonkeyPatch.context() as patch:
        make_tight(patch)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield click_log(folder / "log.parquet")


@pytest.fixture(scope="module")
def oracles(log: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """One worker that nobody disturbs, without and with limits."""
    return [fit(tmp_path_factory.mktemp("one") / "run", recipe_of(log, number, {"max_workers": 1}))
            for number in range(len(LIMITS))]


def recipe_of(log: Path, seed: int, elastic: dict[str, Any], disk: str = "") -> Recipe:
    return counting_recipe(log, LIMITS[seed % 2], run={"steps": STEPS}, elastic=elastic,
                           embedding={"twin": seed % 4 < 3, "look_ahead": 2 * (seed % 3 > 0),
                                      "move_mb": MOVE_MB[seed // 4 % 3], "memory_gb": 1.0, "disk_path": disk})


def assert_seed(seed: int, folder: Path, log: Path, oracles: list[Result]) -> None:
    plan: Schedule = schedule(seed)
    disk = str(folder / "cold") if seed % 3 == 0 else ""  # most rows lie on it
    try:
        result = play(folder / str(seed), plan, recipe_of(log, seed, plan.elastic, disk))
        result.assert_sound(STEPS, steps_lost=result.summary["steps_lost"])
        assert result.sha == oracles[seed % 2].sha
        assert_counted(folder / str(seed), log, LIMITS[seed % 2], STEPS)
    except Exception as error:
        raise AssertionError(f"{plan}: {error}") from error


@pytest.mark.parametrize("first", sample(range(0, SEEDS, TOGETHER), 1))
def test_every_row_counts_what_was_fed(first: int, log: Path, oracles: list[Result], tmp_path: Path) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tasks = [pool.submit(assert_seed, seed, tmp_path, log, oracles) for seed in range(first, first + TOGETHER)]
    problems = [str(task.exception()) for task in tasks if task.exception()]
    assert not problems, "\n".join(problems)
