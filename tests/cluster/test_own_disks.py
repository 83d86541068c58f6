"""Hosts that share no disk: the run is on the head alone, whoever trains and whoever follows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic.driver.follow import result_of
from elastic.driver.inference import check_checkpoint
from elastic.observe.jsonl import read_lines
from elastic.observe.metrics import steps_of
from elastic.observe.verify import verify
from elastic.recipe import Recipe, dumps
from tests.support.hosts import DISK, PORT, Host, hosts, obstacle, until
from tests.support.inprocess import module_recipe
from tests.support.oracle import undisturbed
from tests.support.runs import events, steps

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
    """The driver is on the host that is lost too, and the next one on the other."""
    head, first, second = three
    held = tmp_path / "held"
    held.touch()
    given = module_recipe("Told", STEPS, model={"by": str(held), "seconds": 0.02}, checkpoint={"every_steps": EVERY},
                          elastic={"min_workers": 1, "max_workers": 1, "hang_timeout_s": 20.0})
    recipe, run_dir, there, ray = tmp_path / "recipe.toml", f"{DISK}/runs/one", head.disk / "runs" / "one", f"{head.address}:{PORT}"
    recipe.write_text(dumps(given))
    head.join_ray(head, 0)
    first.join_ray(head, 1)
    driver = first.elastic("train", str(recipe), "--run-dir", run_dir, "--address", ray)
    until(lambda: written(there) >= DIES, unless=driver)
    assert not (first.disk / "runs").exists()
    first.die()
    held.unlink()
    second.join_ray(head, 1)
    follower = second.elastic("resume", run_dir, "--address", ray)
    assert follower.wait() == 0, follower.said
    assert "is alive: following it" in follower.said and "done: " in follower.said
    assert not (second.disk / "runs").exists()
    assert_whole(there, undisturbed(given).sha)
    assert_refused(second, given, ray)


def assert_whole(run_dir: Path, bits: str) -> None:
    """All of the run is on the head."""
    result = result_of(run_dir)
    assert result.status == "done" and result.summary["state_sha256"] == bits
    assert not verify(run_dir, check_checkpoint).problems
    assert steps(result) == list(range(1, STEPS + 1))
    (loaded,), (rewound,) = events(result, "loaded"), events(result, "rewound")
    assert loaded["step"] == rewound["to"] > 0 and loaded["step"] % EVERY == 0
    joined, (elsewhere, *noted) = events(result, "worker_joined"), events(result, "noted")
    assert "Ray" in elsewhere["why"]
    assert len(joined) == len(noted) == 2 and len({e["node"] for e in joined}) == 2
    for worker, note in zip(joined, noted, strict=True):
        assert note["why"].startswith(f"Node {worker['node'][:8]} does not see {DISK}/runs/one")
        assert f"process {worker['pid']} computes" in (run_dir / "logs" / f"{worker['worker']}.log").read_text()
    assert (run_dir / "report.html").exists() and not (run_dir / "live.json").exists()


def assert_refused(host: Host, given: Recipe, ray: str) -> None:
    """A run that only the driver's node has."""
    (host.disk / "alone").mkdir()
    (host.disk / "alone" / "recipe.toml").write_text(dumps(given))
    driver = host.elastic("resume", f"{DISK}/alone", "--address", ray)
    assert driver.wait() == 2, driver.said
    assert driver.said.strip().splitlines()[-1] == (
        f"elastic: The run in {DISK}/alone is on this node alone, and its controller would be on the head node (10.77.0.1), which does not "
        "see it; copy the directory there, or name another with --run-dir.")
