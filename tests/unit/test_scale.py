"""What a worker costs the controller, with many of them and with four times as many: instructions, bytes sent, bytes of the journal."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic.controller import membership as m
from elastic.controller.controller import Settings
from elastic.controller.policy import Bounds, legal
from elastic.messages import Axes, Ballot, Ready, Standing
from elastic.state.ownership import held
from tests.support.rig import Rig

BLOCKS = 1000


def instructions(work: Callable[[], None]) -> int:
    """Of Python's own, as many as are carried out: a clock would count what else the machine does."""
    found = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal found
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        found += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return found


class Fleet:
    """How many bytes leave the controller, where what several get leaves it once."""

    def __init__(self) -> None:
        self.bytes, self.orders = 0, dict[int, Any]()
        self.want = self.release = self.kill = lambda *arguments: None

    def transport(self, ready: Any) -> str:
        return "local"

    def send(self, worker: str, order: Any) -> None:
        if id(order) not in self.orders:
            self.orders[id(order)], self.bytes = order, self.bytes + len(pickle.dumps(order))


def cost(folder: Path, size: int, mesh: Axes, holders: int) -> dict[str, list[float]]:
    """Of a start, a failure and a scaling to half, each worker's share of the instructions, the bytes sent, and the journal."""
    folder.mkdir()
    bounds = Bounds(1, size, 2 * size // mesh[2], meshes=legal(mesh[1:]), holders=holders)
    rig = Rig(folder, settings=Settings(bounds, 30.0, 600.0, 3, ""))
    fleet = rig.controller.fleet = Fleet()  # type: ignore[assignment]
    journal = rig.controller.journal.lines

    def start() -> None:
        for number in range(size):
            rig.controller.advance(m.Starting(f"w{number}", f"n{number // 8}"))
        for number in range(size):
            rig.say(Ready(f"w{number}", f"n{number // 8}", 1, "h:1"))

    def stand(reason: str, lost: str = "") -> None:
        state = rig.controller.state
        for rank, name in enumerate(state.group):
            data, place = divmod(rank, mesh[2])
            if name != lost:
                has = held(data, state.mesh[0], BLOCKS, True) if holders else ()
                rig.say(Standing(name, state.generation, reason, 4, 4, Ballot(4, 0.1, 1.0, int(reason == "stopped")),
                                 mesh=(1, *state.mesh[1:]), coordinate=place, held=has, blocks=BLOCKS if holders else 0))

    def fail() -> None:
        lost = rig.controller.state.group[1]
        rig.controller.advance(m.Lost(lost, "killed"))
        stand("broken", lost)

    def halve() -> None:
        rig.controller.advance(m.ScaleTo(size // 2))
        stand("stopped")

    found = {}
    for generation, work in enumerate((start, fail, halve), 1):
        sent, written = fleet.bytes, journal.size
        figures = [instructions(work), fleet.bytes - sent, journal.size - written]
        assert rig.controller.state.generation == generation and rig.controller.state.phase in ("running", "stopping")
        found[work.__name__] = [figure / size for figure in figures]
    return found


@pytest.mark.parametrize(("mesh", "holders"), [((0, 1, 1, 1), 0), ((0, 1, 4, 1), 2)])
def test_a_worker_costs_as_much_whatever_their_number(mesh: Axes, holders: int, tmp_path: Path) -> None:
    few, many = (cost(tmp_path / str(size), size, mesh, holders) for size in (64, 256))
    for phase, figures in few.items():
        growth = [more / max(1.0, less) for less, more in zip(figures, many[phase])]
        assert max(growth) < 1.15, f"{phase}: instructions, bytes, journal a worker grow by {growth}, from {figures}"
