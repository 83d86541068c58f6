"""The state machine against a small world that plays workers: any order of events, and what must hold after each."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.controller import membership as m
from elastic.controller.journal import decode, encode
from elastic.controller.policy import Bounds, Degrees, fewest, legal
from elastic.messages import STOP_AND_SAVE, Ballot, Generation, Ready, Standing

END = 60  # steps of the run


@dataclass
class Worker:
    """What one process holds. `at` is the generation whose loop it is in, 0 when it stands by."""

    is_ready: bool = False
    node: str = ""
    at: int = 0
    committed: int = -1
    holds: int = -1
    ballot: Ballot | None = None
    degrees: Degrees = (1, 1, 1)  # what it holds: the state of one coordinate of a replica of these
    coordinate: int = -1
    is_healing: bool = False
    moves_to: tuple[Degrees, int] | None = None  # where its state is being resharded
    is_told: bool = False  # to abort its generation
    stop: int = 0
    last: Standing | None = None


class World:
    """Plays the workers, and checks every action of the machine."""

    def __init__(self, draw: random.Random, degrees: Degrees):
        self.draw = draw
        size, least = math.prod(degrees), draw.randint(1, 3)
        if size > 1:
            least = draw.choice([1, size, 2 * size])
        most = draw.randint(least, 6) if size == 1 else draw.choice([n for n in (size, 2 * size, 3 * size)
                                                                     if n >= least])
        self.bounds = Bounds(least, most, draw.choice([4, 6, 8]), draw.randint(0, 2),
                             draw.choice([legal(degrees), (degrees,)]))
        self.bounds = replace(self.bounds, max_workers=min(self.bounds.max_workers, self.bounds.logical_shards * size))
        self.saving: dict[tuple[int, int, int], set[int]] = {}
        self.workers: dict[str, Worker] = {}
        self.names = iter(f"w{i}" for i in range(10_000))
        self.saved, self.generation, self.group = 0, 0, ()
        self.ended: m.Finish | None = None
        self.is_calm = False  # nobody falls any more
        self.is_ending = False
        self.state, actions = m.begin(self.bounds)
        self.perform(actions)

    # The machine's side.

    def feed(self, event: Any) -> None:
        self.state, actions = m.advance(self.state, event)
        self.perform(actions)

    def perform(self, actions: Any) -> None:
        for action in actions:
            assert self.ended is None, f"{action} after the end"
            getattr(self, "on_" + type(action).__name__.lower())(action)

    def on_want(self, action: m.Want) -> None:
        assert action.workers >= 1
        self.wanted = action.workers

    def on_wait(self, action: m.Wait) -> None:
        assert action.ready < action.needed

    def on_savealone(self, action: m.SaveAlone) -> None:
        worker = self.workers[action.worker]
        if action.ballot and (worker.committed, worker.holds) == (action.step - 1, action.step):
            worker.committed = action.step
        assert worker.at == 0 and worker.committed == action.step > 0 and action.generation == self.generation
        assert action.step == max(w.committed for name, w in self.workers.items() if name in self.group)
        assert (worker.coordinate, math.prod(worker.degrees)) == (action.rank, action.world_size)
        if self.draw.random() < 0.7:
            parts = self.saving.setdefault((action.generation, action.step, action.world_size), set())
            parts.add(action.rank)
            if len(parts) == action.world_size:
                self.saved = max(self.saved, action.step)

    def on_abort(self, action: m.Abort) -> None:
        assert action.generation == self.generation and action.worker in self.group
        self.workers[action.worker].is_told = True

    def on_requeststop(self, action: m.RequestStop) -> None:
        assert action.generation == self.generation and action.worker in self.group
        if action.worker in self.workers:
            worker = self.workers[action.worker]
            worker.stop = max(worker.stop, action.code)

    def on_release(self, action: m.Release) -> None:
        assert self.workers.pop(action.worker).at == 0, "a worker is let go in the middle of its loop"

    def on_finish(self, action: m.Finish) -> None:
        self.ended = action
        if action.status == "done":
            assert action.standing is not None and action.standing.committed == END == self.saved
        if action.status == "interrupted" and action.standing is not None:
            assert action.standing.committed == self.saved

    def on_form(self, action: m.Form) -> None:
        generation = action.generation
        members = [self.workers[name] for name in generation.members]  # all of them live
        assert generation.number == self.generation + 1
        assert len(set(generation.members)) == len(members) == generation.shape.world_size
        assert all(w.is_ready for w in members)
        assert all(w.at == 0 for w in self.workers.values()), "somebody is still in the loop of an older generation"
        furthest = max((self.workers[w].committed for w in self.group if w in self.workers), default=-1)
        is_there = self.is_whole(furthest)
        least = 1 if self.is_ending else fewest(self.state.bounds)  # to save what they have, few are enough
        assert len(members) >= least and 1 <= generation.shape.data <= self.bounds.logical_shards
        assert len(members) <= self.bounds.max_workers
        assert generation.mesh[1:] in self.state.bounds.meshes
        self.generation, self.group = generation.number, generation.members
        if generation.committed < 0:
            assert not is_there or furthest == self.saved, "a copy of the state was left behind"
            assert not generation.healers and not generation.resharded
            generation = replace(generation, committed=self.saved)
            for worker in self.workers.values():  # what others have is of a past that is given up
                worker.committed = -1
        else:
            assert generation.committed == furthest
        for rank, worker in enumerate(members):
            self.enter(worker, generation, rank, action.generation.committed < 0)
        if generation.resharded:
            degrees = generation.resharded[0].mesh[1:]
            assert degrees != generation.mesh[1:] and not generation.healers and len(generation.resharded) == len(members)
            assert {holder.coordinate for holder in generation.resharded} >= set(range(math.prod(degrees))), "a part comes from nowhere"

    def is_whole(self, step: int) -> bool:
        """Whether the living have every coordinate of one mesh at this step."""
        ballot = any(w.ballot and w.ballot.step == w.committed == step for name, w in self.workers.items()
                     if name in self.group)
        held: dict[Degrees, set[int]] = {}
        for name, worker in self.workers.items():
            if worker.committed == step or (name in self.group and ballot and worker.committed == step - 1
                                            and worker.holds == step):
                held.setdefault(worker.degrees, set()).add(worker.coordinate)
        return step >= 0 and any(len(coordinates - {-1}) == math.prod(degrees) for degrees, coordinates in held.items())

    def enter(self, worker: Worker, generation: Generation, rank: int, is_load: bool) -> None:
        """As the loop's `begin` does, up to the heal."""
        worker.at, worker.is_told, worker.stop = generation.number, False, 0
        mine = generation.mesh[1:], rank % math.prod(generation.mesh[1:])
        if is_load:
            worker.committed, worker.ballot = generation.committed, None
            worker.degrees, worker.coordinate = mine
        elif worker.committed == generation.committed - 1 and worker.holds == generation.committed and generation.ballot:
            assert generation.ballot.step == generation.committed
            worker.committed = generation.committed
        worker.holds = -1
        if generation.resharded:
            holder = generation.resharded[rank]
            assert holder.rank == rank
            if holder.coordinate >= 0:
                assert (worker.degrees, worker.coordinate,
                        worker.committed) == (holder.mesh[1:], holder.coordinate, generation.committed)
            else:
                worker.committed = -1
            worker.moves_to = mine
            return
        healers = {r: source for source, healed in generation.healers for r in healed}
        worker.is_healing = rank in healers
        if worker.is_healing:
            assert healers[rank] not in healers
            assert healers[rank] % math.prod(mine[0]) == mine[1], "healed by one that holds another coordinate"
            worker.committed = -1
            worker.degrees, worker.coordinate = mine
        else:
            assert worker.committed == generation.committed, "a member starts from another step, and nobody heals it"
            assert (worker.degrees, worker.coordinate) == mine, "a member starts with another coordinate's state"

    # The workers' side.

    def step(self) -> None:
        """All members commit one step, or some see the vote and a member falls before the others do."""
        members = [(name, self.workers.get(name)) for name in self.group]
        if not members or any(w is None or w.at != self.generation or w.is_told for _, w in members):
            return
        present = [(name, w) for name, w in members if w is not None]
        done = max(w.committed for _, w in present)
        for _, worker in present:
            worker.committed, worker.is_healing = done, False
            self.move(worker)
        if done == END:
            self.finish(present)
            return
        code = max(w.stop for _, w in present)
        ballot = Ballot(done + 1, 0.0, 1.0, code)
        falls = not self.is_calm and self.draw.random() < 0.2
        for _, worker in present:
            worker.holds = done + 1
            if not falls or self.draw.random() < 0.4:
                worker.ballot, worker.committed = ballot, done + 1
        if falls:
            self.kill(self.draw.choice(present)[0])
        elif done + 1 == END:
            self.finish(present)
        elif code:
            if code == STOP_AND_SAVE:
                self.saved = done + 1
            for name, _ in present:
                self.stand(name, "stopped")

    def move(self, worker: Worker) -> None:
        if worker.moves_to:
            worker.degrees, worker.coordinate = worker.moves_to
            worker.moves_to = None

    def finish(self, present: list[tuple[str, Worker]]) -> None:
        if not self.is_calm and self.draw.random() < 0.3:
            lost = self.draw.randrange(len(present))
            self.kill(present[lost][0])  # before it has saved its part
            present = present[:lost] + present[lost + 1:]
        else:
            self.saved = END
        for name, _ in present:
            if name in self.workers and self.workers[name].at == self.generation:
                self.stand(name, "done")

    def stand(self, name: str, reason: str, **more: Any) -> None:
        worker = self.workers[name]
        committed = -1 if worker.is_healing else worker.committed
        worker.moves_to = None  # what it had is whole until all have moved
        worker.last = Standing(name, worker.at, reason, committed, worker.holds, worker.ballot,
                               state_sha256=str(committed),
                               mesh=(0, *worker.degrees), coordinate=worker.coordinate, **more)
        worker.at, worker.committed, worker.is_healing = 0, committed, False
        self.feed(worker.last)

    def start(self) -> None:
        if len(self.workers) < self.wanted:
            name = next(self.names)
            self.workers[name] = Worker(node="node-new" if self.is_calm else f"node-{self.draw.randrange(4)}")
            self.feed(m.Starting(name))

    def ready(self) -> None:
        for name, worker in self.workers.items():
            if not worker.is_ready:
                worker.is_ready = True
                self.feed(Ready(name, worker.node, 1, f"{name}:1"))
                return

    def kill(self, name: str = "") -> None:
        if self.workers and self.ended is None:
            name = name or self.draw.choice(list(self.workers))
            del self.workers[name]
            self.feed(m.Lost(name, "killed"))

    def notice(self) -> None:
        """A member whose peer is gone, or that was told to, stands by."""
        broken = any(w not in self.workers or self.workers[w].at != self.generation for w in self.group)
        for name in self.draw.sample(self.group, len(self.group)):
            worker = self.workers.get(name)
            if worker is not None and worker.at and (broken or worker.is_told):
                self.stand(name, "broken")
                return

    def fail(self) -> None:
        inside = [name for name, w in self.workers.items() if w.at]
        if inside:
            self.stand(self.draw.choice(inside), "failed", error=f"error {self.draw.random()}")

    def repeat(self) -> None:
        """A word of an older generation changes nothing."""
        for worker in self.workers.values():
            if worker.last is not None and worker.last.generation < self.generation:
                before = self.state
                self.feed(worker.last)
                assert self.state == before

    def scale(self) -> None:
        other = self.draw.choice([None, *self.bounds.meshes])
        self.feed(m.ScaleTo(self.draw.randint(0, 7), other))

    def drain(self) -> None:
        self.feed(m.Drain((f"node-{self.draw.randrange(4)}",)))

    def interrupt(self) -> None:
        if self.draw.random() < 0.05:
            self.is_ending = True
            self.feed(m.Interrupt())


DEEDS = [World.step] * 6 + [World.start, World.ready,
                            World.notice] * 3 + [World.kill, World.fail, World.repeat, World.scale, World.drain,
                                                                          World.interrupt]


def assert_ends_well(seed: int, length: int, degrees: Degrees) -> None:
    world = World(random.Random(seed), degrees)
    for _ in range(length):
        if world.ended is None:
            world.draw.choice(DEEDS)(world)
    assert decode(json.loads(json.dumps(encode(world.state)))) == world.state, "a journal would not give it back"
    world.is_calm = True
    for _ in range(20):  # nobody falls any more, all that are wanted come
        for deed in (World.start, World.ready, World.notice):
            deed(world)
    # at most: a step to stop at, to hand over to those who stay, to stop again
    for deed in [World.step, World.notice] * 4:
        if world.ended is None:
            deed(world)
    if world.ended is None and not world.is_ending:
        bounds, target = world.state.bounds, world.state.target
        fewest_of = {mesh: -(-bounds.min_workers // math.prod(mesh)) for mesh in bounds.meshes}  # replicas
        preferred = next(mesh for mesh, n in fewest_of.items() if target >= math.prod(mesh) * n
                         and bounds.logical_shards >= n)
        assert world.state.mesh[1:] == preferred, f"not on the preferred mesh: {world.state}"
    for _ in range(10 * END):  # once nothing bad happens any more, the run ends well
        for deed in (World.start, World.ready, World.notice, World.step):
            if world.ended is None:
                deed(world)
    assert world.ended is not None, f"the run hangs: {world.state}"
    hopeless = "without a step", "its last checkpoint is not there"
    assert world.ended.status in ("done", "interrupted") or any(words in world.ended.error for words in hopeless), world.ended


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 250))
def test_any_order_of_events(seed: int, length: int) -> None:
    assert_ends_well(seed, length, (1, 1, 1))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 250),
       degrees=st.sampled_from([(1, 2, 1), (2, 1, 1), (2, 2, 1)]))
def test_any_order_of_events_where_a_replica_is_several_workers(seed: int, length: int, degrees: Degrees) -> None:
    assert_ends_well(seed, length, degrees)
