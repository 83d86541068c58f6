"""Hosts that share no disk: the run is on the head alone, whoever trains and whoever follows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic.driver.follow import result_of
from elastic.observe.jsonl import read_lines
from elastic.observe.metrics import steps_of
from elastic.recipe import dumps
from tests.support.hosts import DISK, PORT, Host, hosts, obstacle, until
from tests.support.inprocess import module_recipe
from tests.support.oracle import undisturbed
from tests.support.runs import assert_sound, events

STEPS, EVERY, DIES = 40, 6, 9


@pytest.fixture
def three() -> Iterator[list[Host]]:
    if why := obstacle():
        pytest.skip(why)
    with hosts(3) as found:
        yield found


def written(run_dir: Path) -> int:
    return max((line["step"] for line in steps_of(read_lines(run_dir / "metrics.jsonl"))), default=0)


def test_a_host_is_lost_and_another_goes_on_from_what_the_head_has(three: list[Host], tmp_path: Path) -> None:
    head, first, second = three
    held = tmp_path / "held"
    held.touch()
    given = module_recipe("Held", STEPS, model={"by": str(held), "seconds": 0.02}, checkpoint={"every_steps": EVERY},
                          elastic={"min_workers": 1, "max_workers": 1, "hang_timeout_s": 20.0})
    recipe, run_dir, there = tmp_path / "recipe.toml", f"{DISK}/runs/one", head.disk / "runs" / "one"
    recipe.write_text(dumps(given))
    ray = f"{head.address}:{PORT}"
    head.join_ray(head, 0)
    first.join_ray(head, 1)
    driver = first.elastic("train", str(recipe), "--run-dir", run_dir, "--address", ray)
    until(lambda: written(there) >= DIES, unless=driver)
    first.die()
    held.unlink()
    second.join_ray(head, 1)
    follower = second.elastic("resume", run_dir, "--address", ray)
    assert follower.wait() == 0, follower.said
    assert "is alive: following it" in follower.said and not os.path.exists(second.disk / "runs")
    result = result_of(there)
    found = undisturbed(given).sha
    assert result.status == "done" and result.summary["state_sha256"] == found
    print(events(result))
    assert_sound(result, found, STEPS)
