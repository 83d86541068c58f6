"""The membership's state machine in a test's hand: events in, actions out."""

from __future__ import annotations

from typing import Any

from elastic.controller import membership as m
from elastic.controller.policy import Bounds
from elastic.messages import Ballot, Generation, Ready, Standing, shape

BOUNDS = Bounds(min_workers=1, max_workers=4, logical_shards=8)
PAIRS = Bounds(2, 4, 8, meshes=((1, 2, 1),))  # a replica is two workers along `tensor`, and nothing else will do


class Machine:
    """Feeds events and keeps every action."""

    def __init__(self, bounds: Bounds = BOUNDS, **begin: Any):
        self.state, first = m.begin(bounds, **begin)
        self.done: list[Any] = list(first)

    def feed(self, *events: Any) -> list[Any]:
        """The actions that these events lead to."""
        new: list[Any] = []
        for event in events:
            self.state, actions = m.advance(self.state, event)
            new += actions
        self.done += new
        return new

    def ready(self, *names: str, node: str = "") -> list[Any]:
        return self.feed(*[m.Starting(n) for n in names], *[Ready(n, node or f"node-{n}", 1, f"{n}:1") for n in names])

    def stand(self, name: str, reason: str, committed: int, **more: Any) -> list[Any]:
        return self.feed(Standing(name, self.state.generation, reason, committed, **more))


def only(actions: list[Any], kind: type) -> Any:
    found = [a for a in actions if isinstance(a, kind)]
    assert len(found) == 1, actions
    return found[0]


def kinds(actions: list[Any]) -> list[str]:
    return [type(a).__name__ for a in actions]


def ballot(step: int, stop: int = 0) -> Ballot:
    return Ballot(step, 1.0, 1.0, stop)


def running(*names: str, bounds: Bounds = PAIRS, nodes: dict[str, str] | None = None) -> Machine:
    machine = Machine(bounds)
    machine.feed(*[m.Starting(n) for n in names], *[Ready(n, (nodes or {}).get(n, "n"), 1, f"{n}:1") for n in names])
    assert machine.state.phase == "running"
    return machine


def stand(machine: Machine, name: str, committed: int, reason: str = "broken", **more: Any) -> list[Any]:
    """A member of the group stands by with the state of its own coordinate, unless `more` says otherwise."""
    mesh = machine.state.mesh
    place = machine.state.group.index(name) % shape(mesh).replica_size
    return machine.stand(name, reason, committed, **{"mesh": mesh, "coordinate": place, **more})


def formed(actions: list[Any]) -> Generation:
    generation = only(actions, m.Form).generation
    assert isinstance(generation, Generation)
    return generation
