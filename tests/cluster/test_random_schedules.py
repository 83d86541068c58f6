"""Random histories of real processes: kills in every phase, hangs, growth and shrinkage, from a seed; and the same over embedding tables."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from elastic.chaos import PHASES
from elastic.driver.inference import check_checkpoint
from elastic.driver.trainer import Trainer
from elastic.observe.verify import verify
from tests.support.oracle import undisturbed
from tests.support.runs import assert_sound, bits, steps, train
from tests.support.sampling import sample
from tests.support.table_runs import LIMITS, assert_counted, click_log, counting_recipe

pytestmark = pytest.mark.usefixtures("cluster")
STEPS = 48
SMALL = {"run": {"steps": STEPS, "eval_every": 20}, "checkpoint": {"every_steps": 16}}


def schedule(seed: int) -> list[str]:
    """Two to four faults at increasing steps."""
    draw = random.Random(seed)
    faults = []
    for step in sorted(draw.sample(range(3, STEPS - 5), draw.randint(2, 4))):
        kind = draw.choice(["kill", "kill", "kill", "scale", "stop"] if step > 8 else ["kill"])
        rank, phase = draw.randrange(3), draw.choice(PHASES)
        faults.append({"kill": f"kill:{rank}@{step}/{phase}", "stop": f"stop:{rank}@{step}",
                       "scale": f"scale:{draw.randint(1, 3)}@{step}"}[kind])
    return faults


@pytest.mark.parametrize("seed", sample(range(20), 1))
def test_random_schedule(tmp_path: Path, seed: int) -> None:
    result = train(tmp_path / "run", 3, schedule(seed), **SMALL, elastic={"spares": 1, "hang_timeout_s": 3.0})
    assert_sound(result, bits(**SMALL), STEPS)
    verdict = verify(result.run_dir, check_checkpoint)
    assert not verdict.problems


@pytest.mark.parametrize("seed", sample(range(10), 1))
def test_random_schedule_over_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Every row counts what the ledger has; where all keepers of a bucket died, steps before that were redone."""
    pytest.importorskip("numba", reason="numba, which computes rows, is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log, limits = click_log(tmp_path / "log.parquet"), LIMITS[seed % 2]
    recipe = counting_recipe(log, limits, run={"steps": STEPS}, embedding={"twin": seed % 4 < 3},
                             elastic={"max_workers": 3, "spares": 1, "hang_timeout_s": 3.0})
    result = Trainer(recipe, tmp_path / "run", "local", schedule(seed)).fit()
    assert result.status == "done", f"{schedule(seed)}: {result.error}"
    assert steps(result) == list(range(1, STEPS + 1))
    assert result.summary["state_sha256"] == undisturbed(recipe).sha, schedule(seed)
    assert_counted(tmp_path / "run", log, limits, STEPS)
    assert not verify(result.run_dir, check_checkpoint).problems
    print(schedule(seed), result.summary["world_sizes"], "steps lost", result.summary["steps_lost"])
