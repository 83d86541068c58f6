"""The contract of a fleet, on threads; tests/cluster goes through it with Ray's processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic.controller.thread_fleet import ThreadFleet
from tests.support.fleet_cases import Desk, assert_the_contract_of_a_fleet, job_of

pytest.importorskip("torch", reason="torch is not installed")


def test_on_threads(tmp_path: Path) -> None:
    fleet, desk = ThreadFleet(job_of(tmp_path), capacity=4), Desk()
    fleet.controller = desk
    assert_the_contract_of_a_fleet(fleet, desk, lambda: fleet)
    assert not any(thread.is_alive() for thread in fleet.threads)
