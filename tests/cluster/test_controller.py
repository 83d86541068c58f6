"""The controller and the driver die, on a real Ray: the workers train on, and the run ends with the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from elastic.actor import NAMESPACE
from elastic.trainer import Result, Trainer
from tests.support.runs import assert_sound, assert_survivors_kept, events, recipe, train


@pytest.fixture(scope="module")
def bits(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train(tmp_path_factory.mktemp("undisturbed") / "run", 1).summary["state_sha256"]


class Killer:
    """Sends SIGKILL to the controller when an event's line arrives, once."""

    def __init__(self, *names: str):
        self.names, self.pid = list(names), 0

    def __call__(self, line: dict[str, Any]) -> None:
        if line["event"] in ("run_started", "controller_restarted"):
            self.pid = line["pid"]
        if self.names and line["event"] == self.names[0]:
            del self.names[0]
            os.kill(self.pid, signal.SIGKILL)


def fit(folder: Path, on_event: Callable[[dict[str, Any]], None], chaos: tuple[str, ...] = (), **changes: Any) -> Result:
    return Trainer(recipe(2, **changes), folder, "local", chaos).fit(on_event=on_event)


def assert_nothing_left(result: Result) -> None:
    """No actor and no placement group of the run is left in Ray."""
    started = events(result, "run_started")[0]["run"]
    assert not [n for n in ray.util.list_named_actors(all_namespaces=True) if n["namespace"] == NAMESPACE and n["name"].startswith(started)]
    assert not [p for p in placement_group_table().values() if p["name"].startswith(started) and p["state"] != "REMOVED"]


@pytest.mark.parametrize("phase", ["reduction", "update"])
def test_killed_while_the_group_steps(bits: str, tmp_path: Path, phase: str) -> None:
    """And again in the middle of a recovery: `phase` is where a worker falls just after the controller."""
    result = train(tmp_path / "run", 2, ["controller@20", "controller@50", f"kill:1@51/{phase}"])
    assert_sound(result, bits)
    assert_survivors_kept(result)
    assert len(events(result, "controller_restarted")) == 2
    assert len({e["worker"] for e in events(result, "worker_lost")}) == 1
    assert_nothing_left(result)


@pytest.mark.parametrize("event", ["worker_joined", "generation_started", "worker_lost", "recovered", "resized", "checkpoint_committed"])
def test_killed_at_an_event(bits: str, tmp_path: Path, event: str) -> None:
    """While workers start, form, re-form, resize and save."""
    killer = Killer(event)
    result = fit(tmp_path / "run", killer, ("scale:1@20", "scale:2@40", "kill:1@70"), elastic={"spares": 1})
    assert not killer.names, f"no {event} came"
    assert_sound(result, bits)
    assert_survivors_kept(result)
    assert len(events(result, "controller_restarted")) == 1
    assert_nothing_left(result)


def test_killed_again_and_again(bits: str, tmp_path: Path) -> None:
    result = train(tmp_path / "run", 2, [f"controller@{step}" for step in range(10, 110, 20)])
    assert_sound(result, bits)
    assert len(events(result, "controller_restarted")) == 5
    assert not events(result, "worker_lost")
    assert len(events(result, "generation_started")) == 1, "the group never noticed"
