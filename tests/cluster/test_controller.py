"""The controller and the driver die, on a real Ray: the workers train on, and the run ends with the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from elastic.driver.trainer import Result, Trainer
from elastic.messages import NAMESPACE
from tests.support.inprocess import module_recipe
from tests.support.oracle import undisturbed
from tests.support.runs import assert_fired, assert_sound, assert_survivors_kept, bits, events, train
from tests.support.sampling import sometimes

pytestmark = pytest.mark.usefixtures("cluster")


class Killer:
    """Sends SIGKILL to the controller when the line of one of these events arrives: at each of them once, and to each
    controller once."""

    def __init__(self, *names: str):
        self.left, self.killed, self.pid = set(names), 0, 0

    def __call__(self, line: dict[str, Any]) -> None:
        if line["event"] in ("run_started", "controller_restarted"):
            self.pid = line["pid"]
        if line["event"] in self.left and self.pid:
            self.left.remove(line["event"])
            os.kill(self.pid, signal.SIGKILL)
            self.pid, self.killed = 0, self.killed + 1


def assert_nothing_left(result: Result) -> None:
    """No actor and no placement group of the run is left in Ray."""
    started = events(result, "run_started")[0]["run"]
    assert not [n for n in ray.util.list_named_actors(all_namespaces=True) if n["namespace"] == NAMESPACE
                and n["name"].startswith(started)]
    assert not [p for p in placement_group_table().values() if p["name"].startswith(started)
                and p["state"] != "REMOVED"]


def test_killed_while_the_group_steps(tmp_path: Path) -> None:
    """Again and again, and nobody notices; then in the middle of a recovery: each time a worker falls just after the
    controller."""
    faults = ["controller@6", "controller@12", "controller@18", "kill:1@19/reduction", "controller@30",
              "kill:1@31/update"]
    result = train(tmp_path / "run", 2, faults, elastic={"min_workers": 2})
    assert_sound(result, bits())
    assert_survivors_kept(result)
    assert_fired(result, faults)
    before = [e["event"] for e in events(result)]
    before = before[:before.index("worker_lost")]
    assert before.count("controller_restarted") >= 2 and before.count("generation_started") == 1, "the group never noticed"
    assert len(events(result, "controller_restarted")) == 4
    assert len({e["worker"] for e in events(result, "worker_lost")}) == 2
    assert_nothing_left(result)


@sometimes("killed at events", 0.6)
def test_killed_at_events(tmp_path: Path) -> None:
    """While workers start, form, re-form, resize and save."""
    killer = Killer("worker_joined", "generation_started", "worker_lost", "recovered", "resized",
                    "checkpoint_committed")
    faults = ("scale:1@12", "scale:2@24", "kill:1@36", "kill:1@44")
    given = module_recipe("Held", 60, model={"by": str(tmp_path / "held")},
                          elastic={"max_workers": 2, "spares": 1, "logical_shards": 4,
                                                                                     "hang_timeout_s": 20.0})
    oracle = undisturbed(given)
    (tmp_path / "held").touch()  # each resize comes before the next is asked for
    result = Trainer(given, tmp_path / "run", "local", faults).fit(on_event=killer)
    assert not killer.left, f"these did not come: {killer.left}"
    assert_sound(result, oracle.sha, 60)
    assert_survivors_kept(result)
    assert len(events(result, "controller_restarted")) == killer.killed == 6
    assert_nothing_left(result)
