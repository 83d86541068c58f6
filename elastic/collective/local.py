"""A group of threads in one process, which a test can kill, stop and continue as if they were processes.

A member's data is copied when it enters a call, so a call needs no second meeting: it returns as soon as every member's
data is there. A member that was killed or gave up before it entered breaks the call for its peers.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from elastic.buffers import copied
from elastic.collective.group import SLICE_S, Buffer
from elastic.collective.member import Member


class Killed(BaseException):
    """This thread plays a process that was killed: nothing may catch it but whoever started the thread."""


def die() -> None:
    raise Killed


class Hub:
    """Where the threads of one process meet, by generation. Ranks are those of the generation, the newest by default.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worlds: dict[int, World] = {}

    def form(self, generation: int, rank: int, size: int, aborted: threading.Event | None = None) -> LocalGroup:
        """Rank `rank` of generation `generation`; waits for nobody."""
        with self._lock:
            world = self._worlds.setdefault(generation, World(size))
        if world.size != size:
            raise ValueError(f"generation {generation} has {world.size} members, not {size}.")
        return LocalGroup(world, tuple(range(size)), rank, aborted)

    def _world(self, generation: int | None) -> World:
        with self._lock:
            return self._worlds[max(self._worlds) if generation is None else generation]

    def kill(self, rank: int, generation: int | None = None) -> None:
        """The member's own calls raise `Killed`; its peers' present and later calls raise `GroupBroken`."""
        self._world(generation).change(lambda world: world.dead.add(rank))

    def stop(self, rank: int, generation: int | None = None) -> None:
        """The member halts at its next call, and notices nothing, until `cont`."""
        self._world(generation).change(lambda world: world.stopped.add(rank))

    def cont(self, rank: int, generation: int | None = None) -> None:
        self._world(generation).change(lambda world: world.stopped.discard(rank))


class World:
    """One generation's members: who is dead, doomed, stopped or gone, and the calls in flight, by (ranks, number of the
    call)."""

    def __init__(self, size: int):
        self.size = size
        self.condition = threading.Condition()
        self.dead: set[int] = set()
        self.gone: set[int] = set()  # aborted the group; alive
        # who sees the next call's data; what then
        self.doomed: dict[int, tuple[frozenset[int], Callable[[], None]]] = {}
        self.stopped: set[int] = set()
        self.entered: dict[tuple[Any, int], int] = {}  # (group, rank) -> calls entered
        self.calls: dict[tuple[Any, int], dict[int, tuple[Any, frozenset[int] | None]]] = {}
        self.reads: dict[tuple[Any, int], int] = {}
        self.mail: dict[tuple[Any, int, int], deque[Any]] = {}

    def change(self, act: Callable[[World], Any]) -> None:
        with self.condition:
            act(self)
            self.condition.notify_all()


class LocalGroup(Member):
    """`ranks` are the members' ranks in their generation; `rank` is this one's place among them."""

    sums_in_order = True  # `all_reduce` adds in rank order

    def __init__(self, world: World, ranks: tuple[int, ...], rank: int, aborted: threading.Event | None = None,
                 line: Any = ()):
        super().__init__(rank, len(ranks), aborted)
        self._world, self._ranks, self._me = world, ranks, ranks[rank]
        self._line = (*line, ranks)  # a group's calls are numbered apart
        self._formed: Counter[tuple[int, ...]] = Counter()

    def _leave(self) -> None:
        self._world.change(lambda world: world.gone.add(self._me))

    def _enter(self) -> tuple[frozenset[int] | None, Callable[[], None]]:
        """Waits while stopped, dies if killed; who may see this call's data (None: everybody), and what then. Holds the
        condition."""
        world = self._world
        while self._me in world.stopped and self._me not in world.dead:
            world.condition.wait(SLICE_S)
        if self._me in world.dead:
            raise Killed
        self._check()
        return world.doomed.pop(self._me, (None, die))

    def _end(self, then: Callable[[], None]) -> None:
        """The member's end: its peers learn of it, if it does not come back from `then`."""
        self._world.change(lambda world: world.dead.add(self._me))
        then()
        raise Killed

    def _wait(self, ready: Callable[[], bool], needed: Callable[[], Sequence[int]]) -> None:
        """Until `ready`; breaks when a member of `needed` can no longer make it so. Holds the condition."""
        world = self._world
        while not ready():
            lost = [rank for rank in needed() if rank in world.dead or rank in world.gone]
            if lost:
                raise self._break(f"lost rank {self._ranks.index(lost[0])}")
            world.condition.wait(SLICE_S)
            if self._me in world.dead:
                raise Killed
            if self._me not in world.stopped:
                self._check()

    def _exchange(self, payload: Any) -> list[Any]:
        """Every member's payload, in rank order."""
        world = self._world
        with world.condition:
            visible, then = self._enter()
            number = world.entered.get((self._line, self._me), 0)
            world.entered[self._line, self._me] = number + 1
            key = (self._line, number)
            call = world.calls.setdefault(key, {})
            call[self._me] = (payload, visible)
            world.condition.notify_all()
            if visible is not None:
                self._end(then)

            def arrived(rank: int) -> bool:
                seen_by = call[rank][1] if rank in call else frozenset()
                return seen_by is None or self._me in seen_by

            self._wait(lambda: all(map(arrived, self._ranks)), lambda: [r for r in self._ranks if not arrived(r)])
            world.reads[key] = world.reads.get(key, 0) + 1
            if world.reads[key] == self.size:
                del world.reads[key], world.calls[key]
            return [call[rank][0] for rank in self._ranks]

    def all_reduce(self, buffer: Buffer) -> None:
        parts = self._exchange(copied(buffer))
        buffer[:] = parts[0]
        for part in parts[1:]:
            buffer += part

    def all_gather(self, out: Buffer, part: Buffer) -> None:
        size = part.shape[0]
        for rank, piece in enumerate(self._exchange(copied(part))):
            out[rank * size:(rank + 1) * size] = piece

    def all_to_all(self, out: Buffer, out_counts: Sequence[int], buffer: Buffer, counts: Sequence[int]) -> None:
        ends = np.cumsum(counts).tolist()
        at = 0
        for count, pieces in zip(out_counts, self._exchange([copied(buffer[e - c:e]) for c, e in zip(counts, ends)])):
            out[at:at + count] = pieces[self.rank]
            at += count

    def broadcast(self, buffer: Buffer, root: int) -> None:
        buffer[:] = self._exchange(copied(buffer) if self.rank == root else None)[root]

    def barrier(self) -> None:
        self._exchange(None)

    def send(self, buffer: Buffer, to: int) -> None:
        world = self._world
        with world.condition:
            visible, then = self._enter()
            if visible is None or self._ranks[to] in visible:
                world.mail.setdefault((self._line, self.rank, to), deque()).append(copied(buffer))
            world.condition.notify_all()
            if visible is not None:
                self._end(then)

    def receive(self, buffer: Buffer, source: int) -> None:
        world = self._world
        with world.condition:
            visible, then = self._enter()
            if visible is not None:
                self._end(then)
            box = world.mail.setdefault((self._line, source, self.rank), deque())
            self._wait(lambda: bool(box), lambda: [self._ranks[source]])
            buffer[:] = box.popleft()

    def subgroup(self, ranks: Sequence[int]) -> LocalGroup:
        self._check()
        self._formed[tuple(ranks)] += 1
        return LocalGroup(self._world, tuple(self._ranks[r] for r in ranks), list(ranks).index(self.rank),
                          self._aborted, (*self._line, self._formed[tuple(ranks)]))

    def cut_short(self, delivered_to: Collection[int], then: Callable[[], None]) -> None:
        self._world.change(lambda world: world.doomed.update({self._me: (frozenset(self._ranks[r] for r in delivered_to), then)}))
