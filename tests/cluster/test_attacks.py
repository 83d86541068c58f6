"""Strangers at every port that a run's own processes open, and workers killed meanwhile: the run recovers as if nobody were there."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private.state import actors

from elastic.driver.trainer import Trainer
from elastic.observe.jsonl import read_lines
from tests.support.attacks import under_attack
from tests.support.inprocess import module_recipe
from tests.support.oracle import undisturbed
from tests.support.runs import assert_sound, events

STEPS, ROOM = 40, 60  # descriptors that a worker may have beside those that it has


def ours(pids: list[int]) -> list[tuple[str, int]]:
    """What these processes listen at, without Ray's own: each actor has one port of Ray."""
    ray = {actor["Address"]["Port"] for actor in actors().values()}
    found = [c.laddr for pid in pids for c in psutil.Process(pid).net_connections("inet")
             if c.status == psutil.CONN_LISTEN]
    assert len(found) - len(ours_among(found, ray)) == len(pids), "Ray has other ports than those that it tells of"
    return ours_among(found, ray)


def ours_among(found: list[Any], ray: set[int]) -> list[tuple[str, int]]:
    return [(address.ip, address.port) for address in found if address.port not in ray]


class Attacker:
    """Follows a run. Each time that its group has three members it attacks all ports, takes away descriptors and kills
    one, twice in all. Then it takes `hold` away.
    """

    def __init__(self, run_dir: Path, held: ExitStack, hold: Path):
        self.run_dir, self.held, self.hold = run_dir, held, hold
        self.controller, self.due = 0, [2, 0]  # ranks to kill: one of many, and the one at whose store they have met
        self.ports: list[tuple[str, int]] = []
        self.live, self.made = "", 0

    def on_event(self, fields: dict[str, Any]) -> None:
        if fields["event"] == "run_started":
            self.controller = fields["pid"]
        if fields["event"] == "generation_started" and fields["world_size"] == 3 and self.due:
            self.attack([worker["pid"] for worker in fields["workers"]])

    def attack(self, workers: list[int]) -> None:
        ports = ours([self.controller, *workers])
        assert len(ports) == 3, "one of each worker"
        for pid in workers:
            process = psutil.Process(pid)
            few = process.num_fds() + ROOM
            process.rlimit(resource.RLIMIT_NOFILE, (few, process.rlimit(resource.RLIMIT_NOFILE)[1]))
        self.ports += ports
        self.made += self.held.enter_context(under_attack([port for _, port in ports]))
        self.live = (self.run_dir / "live.json").read_text()
        os.kill(workers[self.due.pop(0)], signal.SIGKILL)
        if not self.due:
            self.hold.unlink()


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
def test_attacks_on_all_ports_and_kills_change_nothing(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    recipe = module_recipe("Held", STEPS, model={"by": str(hold), "seconds": 0.5}, checkpoint={"every_steps": 0},
                           elastic={"max_workers": 3, "min_workers": 3, "hang_timeout_s": 20.0})
    oracle = undisturbed(recipe)
    hold.touch()  # both attacks meet the run alive
    run_dir = tmp_path / "run"
    with ExitStack() as held:
        attacker = Attacker(run_dir, held, hold)
        result = Trainer(recipe, run_dir).fit(on_event=attacker.on_event)
    assert not attacker.due and attacker.made > 300
    assert {host for host, _ in attacker.ports} == {"127.0.0.1"}, "nobody elsewhere is to reach a local run"
    assert_sound(result, oracle.sha, STEPS)
    assert len(events(result, "worker_lost")) == 2, "somebody else fell, too"
    assert not events(result, "hang") and not events(result, "step_failed") and not events(result, "rewound")
    secret = read_lines(run_dir / "journal.jsonl")[0]["secret"]
    assert (run_dir / "journal.jsonl").stat().st_mode & 0o777 == 0o600
    assert len(secret) == 64 and secret not in attacker.live
    telling = [file for file in run_dir.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
    assert [file.name for file in telling] == ["journal.jsonl"]
