"""Three epochs of a table whose length nothing divides, under kills, resizing and a resumption: every row exactly once an epoch.

Two witnesses that know nothing of each other: a model that counts each row's id in a parameter, and the ledger.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.chaos import PHASES
from elastic.checkpoint.manager import split
from elastic.driver.inference import check_checkpoint
from elastic.observe.ledger_files import FOLDER, files, pieces
from elastic.observe.verify import verify
from tests.support.checkpoints import load
from tests.support.inprocess import Run
from tests.support.sampling import sample
from tests.support.tables import counting, rows, write

pytest.importorskip("torch", reason="torch is not installed")

SIZE, EPOCHS, BATCH, MOST = 10_007, 3, 512, 4
STEPS = -(-SIZE * EPOCHS // BATCH)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, so that blocks lie in both."""
    folder = tmp_path_factory.mktemp("tables") / "table"
    folder.mkdir()
    write(folder / "a.parquet", rows(6_000), 900)
    write(folder / "b.parquet", rows(SIZE - 6_000, first=6_000), 777)
    return folder


def history(seed: int) -> tuple[list[str], list[str], dict[int, Any], int]:
    """Faults before and after a resumption, deeds by step, and the step at which the run is interrupted."""
    draw = random.Random(seed)
    stop = draw.randint(STEPS // 3, 2 * STEPS // 3)

    def faults(low: int, high: int) -> list[str]:
        found = [f"kill:{draw.randrange(3)}@{draw.randint(low, high)}/{draw.choice(PHASES)}" for _ in range(2)]
        return [*found, f"scale:{draw.randint(1, MOST)}@{draw.randint(low, high)}"]

    before, after = faults(1, stop - 5), faults(stop + 10, STEPS)
    if seed % 3 == 0:  # all at once: back to a checkpoint
        step = draw.randint(2, stop - 5)
        before += [f"kill:{rank}@{step}/forward" for rank in range(MOST)]
    deeds = {draw.randint(1, stop - 1): lambda run: run.drain("node-0"),
             draw.randint(1, stop - 1): lambda run: run.fleet.grow(6)}
    return before, after, deeds, stop


def recipe(table: Path, seed: int) -> Any:
    return counting(table, SIZE, BATCH, run={"epochs": EPOCHS, "seed": seed},
                    data={"format": "parquet", "columns": ["id"], "ledger": True,
                          "shuffle_by": ("rows", "blocks")[seed % 2]},
                    elastic={"max_workers": MOST, "logical_shards": 8, "spares": 1},
                    checkpoint={"every_steps": 7, "keep": 10})


def fed(run_dir: Path, step: int) -> np.ndarray:
    """How often each row's id came by, up to a step, by the model's own count."""
    return load(*split(run_dir / "checkpoints" / f"step-{step:08d}"))[0]["parameter/fed"]


def assert_the_model_saw_each_row_once_an_epoch(run_dir: Path) -> None:
    steps = sorted(int(folder.name[5:]) for folder in (run_dir / "checkpoints").glob("step-*")
                   if (folder / "manifest.json").exists())
    assert len(steps) > 2 and steps[-1] == STEPS
    for step in steps[:-1]:  # in the middle of an epoch: each row as often as epochs are over, or once more
        counts, over = fed(run_dir, step), step * BATCH // SIZE
        assert set(counts.tolist()) == {over, over + 1} and counts.sum() == step * BATCH
    last = SIZE * EPOCHS - (STEPS - 1) * BATCH  # rows of the last step: its mean is over so many
    counts, weight = fed(run_dir, STEPS), np.float32(EPOCHS - 1 + BATCH / last)
    assert np.isclose(counts, weight).sum() == last
    assert (counts[~np.isclose(counts, weight)] == EPOCHS).all()


def assert_the_ledger_has_each_row_once_an_epoch(run_dir: Path) -> None:
    """With plain sets, beside the proof of `elastic verify`."""
    seen = [(epoch, sample) for file in files(run_dir / FOLDER) for batch, _ in pieces(file)
            for epoch, sample in zip(batch["epoch"].tolist(), batch["sample"].tolist())]
    assert len(seen) == EPOCHS * SIZE and set(seen) == {(epoch, sample) for epoch in range(EPOCHS)
                                                        for sample in range(SIZE)}
    verdict = verify(run_dir, check_checkpoint)
    assert not verdict.problems
    assert f"ledger: {EPOCHS * SIZE} positions, each fed once; {EPOCHS} whole epochs, every sample of each exactly once" in verdict.facts


@pytest.mark.parametrize("seed", sample(range(8), 4))
def test_each_row_is_fed_once_an_epoch_whatever_happens(seed: int, table: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(table.parent))
    before, after, deeds, stop = history(seed)
    first = Run(tmp_path / "run", recipe(table, seed), before, capacity=5, nodes=3,
                hooks={**deeds, stop: lambda run: run.interrupt()}).fit()
    # on a loaded machine the interrupt may come too late
    assert first.outcome.status in ("interrupted", "done"), first.outcome.error
    result = Run(tmp_path / "run", recipe(table, seed), after,
                 capacity=5).fit() if first.outcome.status == "interrupted" else first
    result.assert_sound(STEPS, steps_lost=result.summary["steps_lost"])
    assert result.named("chaos") and len(result.named("generation_started")) > 2, "nothing happened"
    assert_the_model_saw_each_row_once_an_epoch(tmp_path / "run")
    assert_the_ledger_has_each_row_once_an_epoch(tmp_path / "run")
