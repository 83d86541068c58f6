"""A disk that is full under the run directory, under the checkpoints or under both: a small file system of its own. On threads."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.inference import check_checkpoint
from elastic.observe.verify import verify
from tests.support.inprocess import Result, Run, fit, module_recipe

pytest.importorskip("torch", reason="torch is not installed")

STEPS = 80


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Result:
    result = fit(tmp_path_factory.mktemp("one") / "run", recipe(elastic={"max_workers": 1}))
    result.assert_sound(STEPS)
    return result


def recipe(**changes: Any) -> Any:
    checkpoint = {"every_steps": 10, "keep": 2, **changes.pop("checkpoint", {})}
    return module_recipe("Small", STEPS, checkpoint=checkpoint, **{"elastic": {"max_workers": 2}, **changes})


def fill(disk: Path) -> None:
    with open(disk / "ballast", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    if file.write(b"x" * size) < size:
                        break
            except OSError:
                continue


def test_lines_wait_while_there_is_no_room_and_training_goes_on(disk: Path, tmp_path: Path, oracle: Result) -> None:
    steps: list[int] = []

    def free(run: Run) -> None:
        lines = (disk / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert all(line.endswith("\n") for line in lines) and len(lines) < 45
        steps.append(len(lines))
        (disk / "ballast").unlink()

    run = Run(disk / "run", recipe(checkpoint={"path": str(tmp_path / "elsewhere")}), hooks={25: lambda run: fill(disk), 45: free})
    result = run.fit()
    assert steps and result.outcome.status == "done" and result.sha == oracle.sha
    assert result.steps == list(range(1, STEPS + 1)) and result.named("run_finished")
    assert not verify(disk / "run", check_checkpoint).problems


@pytest.mark.parametrize("checkpoints", ["on the same disk", "elsewhere"])
def test_a_disk_that_stays_full_ends_the_run_in_order(checkpoints: str, disk: Path, tmp_path: Path, oracle: Result) -> None:
    place = {"path": str(tmp_path / "elsewhere")} if checkpoints == "elsewhere" else {}
    run = Run(disk / "run", recipe(checkpoint=place), hooks={25: lambda run: fill(disk)})
    result = run.fit()
    assert run.controller.books.written == STEPS, "training went on to the end"
    error = run.controller.outcome.error  # what the driver asks for where there is no summary
    assert run.controller.outcome.status == "failed" and "No space left on device" in error and "\n" not in error
    assert not (disk / "run" / "summary.json").exists() and not any(thread.is_alive() for thread in run.fleet.threads)
    assert 0 < len(result.steps) < 40
    (disk / "ballast").unlink()
    again = fit(disk / "run", recipe(checkpoint=place))
    assert again.outcome.status == "done" and again.sha == oracle.sha
