"""The state machine against a small world that plays workers: any order of events, and what must hold after each."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic import membership as m
from elastic.messages import STOP_AND_SAVE, Ballot, Generation, Ready, Standing
from elastic.policy import Bounds

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
    is_healing: bool = False
    is_told: bool = False  # to abandon its generation
    stop: int = 0
    last: Standing | None = None


class World:
    """Plays the workers, and checks every action of the machine."""

    def __init__(self, draw: random.Random):
        self.draw = draw
        least = draw.randint(1, 3)
        self.bounds = Bounds(least, draw.randint(least, 6), draw.choice([4, 6, 8]), draw.randint(0, 2))
        self.bounds = replace(self.bounds, max_workers=min(self.bounds.max_workers, self.bounds.logical_shards))
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
        assert worker.at == 0 and worker.committed == action.step > 0 and action.generation == self.generation
        assert action.step == max(w.committed for name, w in self.workers.items() if name in self.group)
        if self.draw.random() < 0.5:
            self.saved = max(self.saved, action.step)

    def on_abandon(self, action: m.Abandon) -> None:
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
        assert len(set(generation.members)) == len(members)
        least = 1 if self.is_ending else self.bounds.min_workers  # to save what they have, few are enough
        assert least <= len(members) <= min(self.bounds.max_workers, self.bounds.logical_shards)
        assert all(w.is_ready for w in members)
        assert all(w.at == 0 for w in self.workers.values()), "somebody is still in the loop of an older generation"
        furthest = max((self.workers[w].committed for w in self.group if w in self.workers), default=-1)
        self.generation, self.group = generation.number, generation.members
        if generation.committed < 0:
            assert furthest < 0 or furthest == self.saved, "a copy of the state was left behind"
            generation = replace(generation, committed=self.saved)
        else:
            assert generation.committed == furthest
        for rank, worker in enumerate(members):
            self.enter(worker, generation, rank, action.generation.committed < 0)

    def enter(self, worker: Worker, generation: Generation, rank: int, is_load: bool) -> None:
        """As the loop's `begin` does, up to the heal."""
        worker.at, worker.is_told, worker.stop = generation.number, False, 0
        if is_load:
            worker.committed, worker.ballot = generation.committed, None
        elif worker.committed == generation.committed - 1 and worker.holds == generation.committed and generation.ballot:
            assert generation.ballot.step == generation.committed
            worker.committed = generation.committed
        worker.is_healing = rank in generation.healed
        worker.holds = -1
        if worker.is_healing:
            assert rank != generation.source >= 0
            worker.committed = -1
        else:
            assert worker.committed == generation.committed, "a member starts from another step, and nobody heals it"

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
        if done == END:
            self.finish(present)
            return
        code = max(w.stop for _, w in present)
        ballot = Ballot(done + 1, (0.0,), (1.0,), code)
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
        worker.last = Standing(name, worker.at, reason, committed, worker.holds, worker.ballot, state_sha256=str(committed), **more)
        worker.at, worker.committed, worker.is_healing = 0, committed, False
        self.feed(worker.last)

    def start(self) -> None:
        if len(self.workers) < self.wanted:
            name = next(self.names)
            self.workers[name] = Worker(node=f"node-{self.draw.randrange(4)}")
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
        self.feed(m.ScaleTo(self.draw.randint(0, 7)))

    def drain(self) -> None:
        self.feed(m.Drain((f"node-{self.draw.randrange(4)}",)))

    def interrupt(self) -> None:
        if self.draw.random() < 0.05:
            self.is_ending = True
            self.feed(m.Interrupt())


DEEDS = [World.step] * 6 + [World.start, World.ready, World.notice] * 3 + [World.kill, World.fail, World.repeat, World.scale, World.drain,
                                                                          World.interrupt]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 250))
def test_any_order_of_events(seed: int, length: int) -> None:
    world = World(random.Random(seed))
    for _ in range(length):
        if world.ended is None:
            world.draw.choice(DEEDS)(world)
    world.is_calm = True
    for _ in range(10 * END):  # once nothing bad happens any more, the run ends well
        for deed in (World.start, World.ready, World.notice, World.step):
            if world.ended is None:
                deed(world)
    assert world.ended is not None, f"the run hangs: {world.state}"
    assert world.ended.status in ("done", "interrupted") or "without a step" in world.ended.error, world.ended
