"""Ours on a mesh: the engine's own loop, without the controller, in one of a contestant's processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.kit.mesh_case import Case, opened
from benchmarks.kit.turns import Turns
from elastic.chaos import Injector
from elastic.collective.gloo import GlooGroup
from elastic.collective.shared import SharedGroup
from elastic.messages import Generation, Line
from elastic.worker.build import build_training, place_on
from elastic.worker.loop import begin, train
from elastic.worker.loop_control import Control
from elastic.worker.rehearsal import warm_up
from elastic.worker.training import Loader, Member, Placement, Training
from elastic.workload import mesh_of


class Gate:
    """A loader that waits for its process's turn at the first batch of every step."""

    def __init__(self, load: Loader, turns: Turns):
        self._load, self._turns, self._step = load, turns, 0

    def __call__(self, step: int, shard: int) -> Mapping[str, Any]:
        if step != self._step:
            self._step = step
            self._turns.begin()
        return self._load(step, shard)

    def expect(self, keys: Iterable[tuple[int, int]]) -> None:
        self._load.expect(keys)

    def close(self) -> None:
        self._load.close()


def take_part(rank: int, turns: Turns, case: Case, text: str, address: str, transport: str) -> None:
    recipe = case.recipe(text)
    mesh, workload = replace(mesh_of(recipe), data=case.data), opened(recipe)
    training, place = build_training(recipe, workload), place_on(recipe, workload, mesh, mesh.coordinate(rank))
    warm_up(training, place)
    if place.state.is_sharded:
        place.state.own_as(mesh.coordinate(rank).data, case.data)
    place.state.start(recipe.run.seed)
    take_turns(rank, turns, training, place, address, transport, size=case.size,
               mesh=(0, mesh.pipeline, mesh.tensor, 1))


def take_turns(rank: int, turns: Turns, training: Training, place: Placement, address: str, transport: str, *, size: int,
               ready: Callable[[Member], None] = lambda member: None, **generation: Any) -> None:
    """Trains for good, a step whenever it is this process's turn. `ready` is called before the first one."""
    control = Control()

    def post(message: Any) -> None:
        if isinstance(message, Line) and message.file == "metrics":
            turns.note(message.fields["step"], message.fields["loss"])

    training.load_batch = Gate(training.load_batch, turns)
    group: Any = (SharedGroup.form(rank, size, address, transport, threading.Event(), 60.0)
                  if transport == "shared"
                  else GlooGroup.form(rank, size, address, transport, threading.Event(), 60.0, "127.0.0.1"))
    control.enter(1)
    control.attach(group)
    member = Member(training, place, control, post)
    ready(member)
    about = Generation(1, tuple(f"worker-{r}" for r in range(size)), address, transport, 0, load="recipe", **generation)
    injector = Injector((), rank, lambda spec: None, lambda fault: None, lambda fault, g: g)
    train(begin(member, about, group, injector))
