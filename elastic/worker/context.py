"""One generation as its steps see it: who is in it, what it computes with, and how it waits for the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np

from elastic.chaos import Injector
from elastic.collective.group import CollectiveGroup
from elastic.collective.reduction import Scratch, out_size
from elastic.mesh import shards_of
from elastic.messages import Buckets, Generation
from elastic.model.backend import Buffer
from elastic.parallel.groups import MeshGroups
from elastic.state.flat_layout import BLOCK
from elastic.tables.moving import Moving, Ranks
from elastic.worker.own_figures import OwnFigures
from elastic.worker.training import Member, Placement


class StepContext:
    """Made once a generation, when its members are on their coordinates. `step` is the one at hand, the newest
    committed one between two."""

    def __init__(self, member: Member, generation: Generation, group: CollectiveGroup, injector: Injector):
        self.member, self.generation, self.group, self.injector = member, generation, group, injector
        self.training, self.plan, self.control, self.held = member.training, member.training.plan, member.control, member.held
        self.place, self.backend, self.state = member.place, member.place.backend, member.place.state
        self.tables, self.step = member.tables, generation.committed
        self.look_ahead: Any = None  # `elastic.worker.look_ahead.LookAhead`, where the recipe has it
        self.moving = Moving(generation.buckets or Buckets((), ()), generation.committed)
        self.sent, self.moving_s = 0, 0.0  # bytes of rows that this member has sent, and seconds, of the moves so far
        portion = self.place.portion
        self.groups = MeshGroups(group, generation.shape, portion, self.control.collective)
        if portion is not None:
            self.backend.connect(self.groups.dims(portion.layout.dims))

    @cached_property
    def run(self) -> range:
        """This member's logical shards."""
        return shards_of(self.groups.data.rank, self.groups.data.size, self.plan.num_shards)

    @cached_property
    def buffers(self) -> Buffers:
        """For the first step: what a member holds of a sharded state is known by then."""
        return Buffers(self.place, self.groups.data)

    @cached_property
    def own_shards(self) -> OwnFigures:
        """Which logical shards are which replica's."""
        size = self.groups.data.size
        runs = [len(shards_of(rank, size, self.plan.num_shards)) for rank in range(size)]
        return OwnFigures(np.repeat(np.arange(size), runs), size)

    def holders_at(self, step: int) -> tuple[Ranks, Ranks]:
        """By bucket of the embedding tables, the ranks of the owner and of the twin that serve `step`, any from the
        generation's start on."""
        return self.moving.at(step)

    def at(self, phase: str, detail: int = 0) -> None:
        """Says where the step is; `GroupBroken` if the generation was aborted meanwhile."""
        self.control.at(self.step, phase, detail)

    def fire(self, phase: str) -> None:
        """A chance for the faults that are due."""
        self.injector.at(self.step, phase)

    @contextmanager
    def waiting(self, phase: str, group: Any = None) -> Iterator[Any]:
        """Inside, this member is in a collective: who has not entered one that others wait in is the suspect of a hang.
        Gives `group`, cut short where a fault is due in this phase.
        """
        chosen = None if group is None else self.injector.cut(group, self.step, phase)
        with self.control.collective(self.step, phase):
            yield chosen

    def gather(self, phase: str, part: np.ndarray) -> np.ndarray:
        """What all members give, (members, length), in one all-gather."""
        world = self.groups.world
        out = np.empty(world.size * len(part))
        with self.waiting(phase, world) as group:
            group.all_gather(out, part)
        return out.reshape(world.size, -1)

    def untouched(self, whole: bool) -> AbstractContextManager[None]:
        """Inside, users' code computes. Overwritten where it changes parameters; `whole`: all of them are looked at."""
        watch = self.place.watch
        return watch.over(self.state.param, self.step, whole) if watch else nullcontext()


class Buffers:
    """One generation's communication buffers. A broken group's are never used again: a stopped peer may still write to
    them."""

    def __init__(self, place: Placement, group: CollectiveGroup):
        state, layout = place.state, place.state.layout
        self.numel = layout.gradient
        self._allocate = partial(group.allocate, plain=place.backend.allocate)
        size = out_size(self.numel, BLOCK, group.size)
        if state.num_blocks:
            size = state.holding.store.size + out_size(self.numel - layout.trainable, BLOCK, group.size)
        self.out = self._allocate(size) if group.size > 1 else None
        self.scratch = Scratch(place.backend.allocate)
        self._all: list[Buffer] = []
        self._free: list[Buffer] = []

    def reset(self) -> None:
        self._free = list(self._all)

    def take(self) -> Buffer:
        """A zeroed buffer for gradients."""
        if not self._free:
            self._all.append(self._allocate(self.numel))
            return self._all[-1]
        buffer = self._free.pop()
        buffer[:] = 0
        return buffer

    def give(self, buffer: Buffer) -> None:
        self._free.append(buffer)
