"""Random schedules of kills, stops, failing disks, joins and leaves: every run ends well, and all end with the same bits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic.chaos import DISK, PHASES
from tests.support.inprocess import Result, fit
from tests.support.sampling import sample
from tests.support.schedules import STEPS, Schedule, play, recipe_of, schedule

pytest.importorskip("torch", reason="torch is not installed")
# a saver's thread dies with its process
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

SEEDS, AT_ONCE, TOGETHER = 100, 4, 10  # most of a run is waiting: for hangs to be found, for files to be durable


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One worker that nobody disturbs."""
    result = fit(tmp_path_factory.mktemp("one") / "run", recipe_of({"max_workers": 1}))
    result.assert_sound(STEPS)
    return result


def assert_survived(result: Result, plan: Schedule, oracle: Result) -> None:
    lost = result.summary["steps_lost"] if result.outcome.status == "done" else 0
    result.assert_sound(STEPS, steps_lost=lost)
    assert result.sha == oracle.sha, f"state {result.sha}, undisturbed {oracle.sha}"
    for found, wanted in zip(result.metrics, oracle.metrics, strict=True):
        assert (found["step"], found["loss"], found["samples"]) == (wanted["step"], wanted["loss"], wanted["samples"])
    stopped = {e["worker"] for e in result.named("chaos") if e["fault"].startswith("stop")}
    # a loaded machine may look like a hang
    if plan.is_gentle and {e["worker"] for e in result.named("hang")} <= stopped:
        assert lost == 0 and not result.named("rewound"), f"{lost} steps were lost, but rank 0 never fell"


def assert_seed(seed: int, folder: Path, oracle: Result) -> None:
    plan = schedule(seed)
    try:
        assert_survived(play(folder / str(seed), plan), plan, oracle)
    except Exception as error:
        raise AssertionError(f"{plan}: {error}") from error


@pytest.mark.parametrize("first", sample(range(0, SEEDS, TOGETHER), 2))
def test_every_schedule_ends_with_the_same_bits(first: int, oracle: Result, tmp_path: Path) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tasks = [pool.submit(assert_seed, seed, tmp_path, oracle) for seed in range(first, first + TOGETHER)]
    problems = [str(task.exception()) for task in tasks if task.exception()]
    assert not problems, "\n".join(problems)


def test_the_schedules_are_as_wild_as_they_should_be() -> None:
    plans = [schedule(seed) for seed in range(SEEDS)]
    faults = [spec for plan in plans for spec in plan.chaos]
    assert plans[7] == schedule(7)
    assert {spec.partition(":")[0] for spec in faults} == {"kill", "stop", "cont", "scale", "disk"}
    assert len({spec.rpartition("/")[2] for spec in faults if "/" in spec}) == len(PHASES) + len(DISK)
    assert {name for plan in plans for name, _ in plan.deeds.values()} == {"grow", "drain", "scale"}
    assert sum(len(plan.chaos) for plan in plans) > 300
