"""The contract of a fleet, on Ray: its workers are processes, and so are those that a successor finds."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from elastic.controller.ray_fleet import RayFleet
from elastic.messages import NAMESPACE
from tests.support.fleet_cases import Desk, assert_the_contract_of_a_fleet, job_of

pytestmark = pytest.mark.usefixtures("cluster")


class Relay:
    """The actor that workers look for by the controller's name; the test takes the calls from here."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.changed = threading.Condition()

    def receive(self, *call: Any) -> int:
        self._keep("receive", *call)
        return 0

    def announce(self, *call: Any) -> None:
        self._keep("announce", *call)

    def _keep(self, *call: Any) -> None:
        with self.changed:
            self.calls.append(call)
            self.changed.notify_all()

    def since(self, number: int) -> list[tuple[Any, ...]]:
        with self.changed:
            self.changed.wait_for(lambda: len(self.calls) > number, 1.0)
            return self.calls[number:]


def test_on_ray(tmp_path: Path) -> None:
    job, desk, over = job_of(tmp_path, secrets.token_hex(32)), Desk(), threading.Event()
    relay = ray.remote(Relay).options(name=f"{job.run_id}/controller", namespace=NAMESPACE, max_concurrency=16,
                                      num_cpus=0).remote()

    def pass_on() -> None:
        taken = 0
        while not over.is_set():
            calls = ray.get(relay.since.remote(taken))
            taken += len(calls)
            for method, *arguments in calls:
                getattr(desk, method)(*arguments)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()

    fleets: list[RayFleet] = []

    def fleet() -> RayFleet:
        """Another one; the one before is as gone as its process would be."""
        for gone in fleets:
            gone.post = lambda event: None
            gone.closed.set()
        fleets.append(RayFleet(job, desk.post, device="cpu", threads=1, hang_timeout_s=20.0, orphan_timeout_s=60.0))
        return fleets[-1]

    try:
        assert_the_contract_of_a_fleet(fleet(), desk, fleet)
    finally:
        fleets[-1].close()  # it is already, unless the contract is broken
        over.set()
        thread.join()
    left = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["name"].startswith(f"{job.run_id}/worker")]
    assert not left
    ray.kill(relay)
