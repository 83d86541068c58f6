"""Whole runs with embedding tables on threads: one hash whoever owns the rows and whatever happens, and rows that count what was fed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from elastic.chaos import PHASES
from elastic.driver.inference import evaluate
from elastic.tables.held import HeldTables
from recommender.rocks_pages import RocksPages
from tests.support.frameworks import names
from tests.support.inprocess import Result, fit
from tests.support.sampling import sample
from tests.support.table_runs import assert_counted, click_log, clicks_recipe, counting_recipe
from tests.support.tight_rows import make_tight

STEPS = 24
KILLS = [f"kill:{rank}@{step}/{phase}" for (phase, rank), step in
         zip(product([p for p in PHASES if p not in ("gather", "heal", "move")], (0, 2)), itertools.cycle(range(3, 14)))]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("clicks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield click_log(folder / "log.parquet")


@pytest.fixture(scope="module", params=names(without="reference"))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def undisturbed(backend: str, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The oracle: one worker, nothing happens."""
    result = fit(tmp_path_factory.mktemp("one") / "run", clicks_recipe(log, backend, elastic={"max_workers": 1}))
    result.assert_sound(STEPS)
    return result


def test_a_checkpoint_evaluates_as_the_run_did(undisturbed: Result) -> None:
    assert evaluate(undisturbed.run.run_dir / "checkpoints") == undisturbed.summary["eval"]


def assert_same(result: Result, oracle: Result, lost: int = 0) -> None:
    result.assert_sound(STEPS, lost)
    assert result.sha == oracle.sha
    for found, wanted in zip(result.metrics, oracle.metrics, strict=True):
        assert [found.get(key) for key in ("step", "loss", "eval")] == [wanted.get(key) for key in
                                                                       ("step", "loss", "eval")]


@pytest.mark.parametrize("workers, twin, look_ahead", [(2, True, 2), (2, False, 0), (5, True, 0), (5, False, 2)])
def test_any_number_of_owners(workers: int, twin: bool, look_ahead: int, backend: str, log: Path, undisturbed: Result,
                              tmp_path: Path) -> None:
    result = fit(tmp_path, clicks_recipe(log, backend, elastic={"max_workers": workers, "min_workers": workers},
                                         embedding={"twin": twin, "look_ahead": look_ahead}))
    assert_same(result, undisturbed)
    assert result.summary["world_sizes"] == [workers]


@pytest.mark.parametrize(("twin", "move_mb"), [(True, 16.0), (False, 16.0), (True, 0.002), (False, 0.002)])
def test_live_2_5_1_3(twin: bool, move_mb: float, backend: str, log: Path, undisturbed: Result, tmp_path: Path) -> None:
    recipe = clicks_recipe(log, backend, elastic={"max_workers": 5, "spares": 4},
                           embedding={"twin": twin, "move_mb": move_mb})
    result = fit(tmp_path, recipe, ["scale:2@1", "scale:5@7", "scale:1@13", "scale:3@19"])
    assert_same(result, undisturbed)
    sizes = iter(result.summary["world_sizes"])  # between them, those that leave hand over
    if move_mb > 1:
        assert all(wanted in sizes for wanted in (2, 5, 1, 3)), result.summary["world_sizes"]
    else:
        assert max(event["steps"] for event in result.named("tables_resharded")) > 1


MOVING = [(0, 3, True), (2, 3, False), (1, 4, True), (3, 4, False), (3, 5, True), (0, 5, False)]


@pytest.mark.parametrize(("rank", "step", "twin"), sample(MOVING, 2))
def test_a_kill_while_buckets_move(rank: int, step: int, twin: bool, backend: str, log: Path, undisturbed: Result,
                                   tmp_path: Path) -> None:
    """Those who are to leave fill the others, one bucket at a time. Whoever falls may take the only copy of some along."""
    recipe = clicks_recipe(log, backend, elastic={"max_workers": 5, "spares": 4}, embedding={"twin": twin, "move_mb": 1e-6})
    result = fit(tmp_path, recipe, ["scale:2@1", f"kill:{rank}@{step}/move"])
    assert_same(result, undisturbed, lost=result.summary["steps_lost"])
    assert len(result.named("worker_lost")) == 1


def test_rows_on_disk_change_no_bit(backend: str, log: Path, undisturbed: Result, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """As few rows in memory as a step can do with, while workers are killed, come and go."""
    sent = make_tight(monkeypatch)
    recipe = clicks_recipe(log, backend, elastic={"max_workers": 3, "spares": 2},
                           embedding={"memory_gb": 1.0, "disk_path": str(tmp_path / "cold")})
    result = fit(tmp_path / "run", recipe, ["scale:2@1", "kill:1@6/push", "scale:3@10", "kill:0@14/update", "scale:1@19"])
    assert_same(result, undisturbed)
    assert len(result.named("worker_lost")) == 2 and sum(sent) > 1000


@pytest.mark.parametrize("fault", sample(KILLS, 2))
def test_a_kill_in_each_phase_costs_no_step(fault: str, backend: str, log: Path, undisturbed: Result,
                                            tmp_path: Path) -> None:
    result = fit(tmp_path, clicks_recipe(log, backend), [fault])
    assert_same(result, undisturbed)
    assert len(result.named("worker_lost")) == 1 and result.named("recovered")[0]["steps_lost"] == 0


def test_kills_one_after_the_other(backend: str, log: Path, undisturbed: Result, tmp_path: Path) -> None:
    faults = ["kill:0@5/rows", "kill:1@9/push", "kill:2@13/vote", "kill:0@17/update", "kill:1@21/reduction"]
    result = fit(tmp_path, clicks_recipe(log, backend, elastic={"min_workers": 3}), faults)
    assert_same(result, undisturbed)
    assert len(result.named("worker_lost")) == 5


def test_without_twins_the_run_goes_back_to_the_newest_checkpoint(backend: str, log: Path, undisturbed: Result,
                                                                  tmp_path: Path) -> None:
    result = fit(tmp_path, clicks_recipe(log, backend, embedding={"twin": False}), ["kill:1@12/push"])
    assert_same(result, undisturbed, lost=result.summary["steps_lost"])
    assert result.named("rewound") and result.summary["steps_lost"] <= 11


def test_a_joiner_that_has_no_room_for_its_rows_costs_nobody_the_last_checkpoint(
        log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed")

    def load(tables: HeldTables, parts: Any) -> None:
        assert not parts or tables.held, "no room"

    monkeypatch.setattr(HeldTables, "load", load)
    result = fit(tmp_path, clicks_recipe(log, "torch"), ["kill:1@12/forward"])
    assert result.outcome.status == "failed" and "no room" in result.outcome.error
    # the others go on until it comes
    assert result.named("checkpoint_committed")[-1]["step"] == result.steps[-1] >= 11
    assert not result.named("checkpoint_rejected")


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(log: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    recipe = clicks_recipe(log, "torch", embedding={"memory_gb": 1.0, "disk_path": str(log)})
    result = fit(tmp_path, recipe)
    assert result.outcome.status == "failed" and not result.metrics
    assert f'embedding.disk_path = "{log}" cannot be written on this node' in result.outcome.error


def test_a_disk_that_is_full_ends_the_run_with_its_last_step_saved(log: Path, undisturbed: Result, backend: str, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "torch":
        pytest.skip("nothing of it is a framework's")
    changes: dict[str, Any] = {"elastic": {"max_workers": 2}, "embedding": {"memory_gb": 1.0, "disk_path": str(tmp_path / "cold")}}
    with monkeypatch.context() as patch:
        sent = make_tight(patch)
        written = RocksPages.put

        def put(self: RocksPages, numbers: Any, pages: Any) -> None:
            if sum(sent) > 600:
                raise self._failed("has no room for 4.1 KB more (IO error: No space left on device)")
            written(self, numbers, pages)

        patch.setattr(RocksPages, "put", put)
        result = fit(tmp_path / "run", clicks_recipe(log, backend, **changes))
    assert result.outcome.status == "failed" and "has no room for 4.1 KB more" in result.outcome.error
    last = result.metrics[-1]["step"]
    assert 2 < last < STEPS and result.named("checkpoint_committed")[-1]["step"] == last
    again = fit(tmp_path / "run", clicks_recipe(log, backend, **changes))
    assert again.sha == undisturbed.sha


@pytest.mark.parametrize("limits", [{}, {"admit": 2, "ttl_steps": 4}], ids=["all", "admitted and evicted"])
@pytest.mark.parametrize("chaos", [["kill:1@5/push", "kill:0@11/rows", "kill:3@16/update"],
                                   ["scale:1@4", "scale:4@9", "kill:0@13/vote", "scale:2@18"]], ids=" ".join)
def test_every_row_counts_what_the_ledger_has(limits: dict[str, Any], chaos: list[str], log: Path,
                                              tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    result = fit(tmp_path, counting_recipe(log, limits), chaos)
    # a kill may come while one member is still alone with its rows
    result.assert_sound(STEPS, result.summary["steps_lost"] if "scale:1@4" in chaos else 0)
    assert_counted(tmp_path, log, limits, STEPS)
