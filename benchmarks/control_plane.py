"""What the control plane costs with thousands of workers: the real controller and Ray's fleet, in one process, on workers that only report.

    python -m benchmarks.control_plane [--workers 16 256 1024 4096] [--case replicated sharded replicas]

start: every worker gets ready, and a generation forms. failure: one is lost, all others stand by, and the next
generation goes to who is left. replacement: another comes, and all stop and meet again. half: so many are to train on.
half lost: of these every other replica falls at once. Seconds are the controller's, without steps, a network, or Ray
itself. Bytes are pickled: what the controller sends, what is put into the object store counted once, and what it
receives; the journal's are its length by then. A member's: what it receives in a vote, and the longest time in which
it finds out which blocks of a sharded optimizer move.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.kit import results
from elastic.controller import events, ray_fleet
from elastic.controller.controller import Controller, Settings
from elastic.controller.policy import Bounds, legal
from elastic.controller.run_log import RunLog
from elastic.messages import STOP, Axes, Ballot, Generation, Job, Line, Order, Ready, RequestStop, Standing
from elastic.state.ownership import held
from elastic.state.resharding import plan
from elastic.worker.own_figures import OwnFigures
from elastic.worker.vote import packed

CASES: dict[str, tuple[Axes, int]] = {"replicated": ((0, 1, 1, 1), 0), "sharded": ((0, 1, 1, 1), 2),
                                      "replicas": ((0, 1, 8, 1), 2)}
PER_NODE = 8
BLOCKS = 16_000  # a coordinate's, of 65,536 elements: a billion parameters
REFERENCE = bytes(28)  # an object's id, which is what goes to each member


@dataclass
class Traffic:
    """Bytes that have left the controller, and those that it has received."""

    sent: int = 0
    received: int = 0

    def put(self, value: Any) -> bytes:
        self.sent += len(pickle.dumps(value, 5))
        return REFERENCE


class Actor:
    """A worker's process as the fleet sees it."""

    def __init__(self, traffic: Traffic):
        self.traffic = traffic
        self.take = self.release = self

    def remote(self, *arguments: Any) -> None:
        self.traffic.sent += len(pickle.dumps(arguments, 5))


class Fleet(ray_fleet.RayFleet):
    """Ray's fleet without Ray: a place is there as soon as it is asked for."""

    def __init__(self, job: Job, traffic: Traffic, post: Callable[[Any], None]):
        super().__init__(job, post, device="cpu", threads=1, hang_timeout_s=30.0, orphan_timeout_s=60.0)
        self.watcher, self.traffic = SimpleNamespace(ident=1), traffic  # type: ignore[assignment]
        self.current: Generation | None = None
        self.code = STOP

    def start(self, slot: ray_fleet.Slot) -> None:
        self.slots[slot.name], slot.is_placed, slot.actor = slot, True, Actor(self.traffic)
        self.taken.add(slot.name)

    def send(self, worker: str, order: Order) -> None:
        self.current = order if isinstance(order, Generation) else self.current
        self.code = order.code if isinstance(order, RequestStop) else self.code
        super().send(worker, order)


class Run:
    """A run of `size` workers, played."""

    def __init__(self, folder: Path, size: int, case: str):
        self.mesh, self.holders = CASES[case]
        self.size, self.traffic, self.step = size, Traffic(), 0
        self.shards = 2 * size // self.mesh[2]
        bounds = Bounds(1, size, self.shards, meshes=legal(self.mesh[1:]), holders=self.holders)
        (folder / "checkpoints").mkdir()
        job = Job("run", "", {}, str(folder), str(folder / "checkpoints"))
        self.fleet = Fleet(job, self.traffic, lambda event: self.controller.post(event))
        self.controller = Controller(job, Settings(bounds, 30.0, 600.0, 3, ""), self.fleet, RunLog(folder))
        self.controller.perform(self.controller.past.actions)
        self.names = list(self.fleet.slots)
        self.journal = self.controller.journal.lines.path

    @property
    def generation(self) -> Generation:
        assert self.fleet.current is not None and self.fleet.current.number == self.controller.state.generation
        return self.fleet.current

    @property
    def replica(self) -> int:
        return self.generation.shape.replica_size

    def say(self, worker: str, *messages: Any) -> None:
        """As it arrives: in a copy of its own."""
        content = pickle.dumps(messages, 5)
        self.traffic.received += len(content)
        self.controller.deliver(worker, pickle.loads(content))

    def drain(self) -> None:
        while not self.controller.mailbox.empty():
            self.controller.handle(self.controller.mailbox.get(0.0))
        self.controller.check()

    def join(self, names: Sequence[str]) -> None:
        nodes = {name: f"node-{int(name.rpartition('-')[2]) // PER_NODE}" for name in names}
        for name in names:
            self.controller.post(events.Starting(name, nodes[name]))
        self.drain()
        for name in names:
            self.say(name, Ready(name, nodes[name], 7, f"{nodes[name]}:1", 3))
        self.drain()

    def steps(self, count: int) -> None:
        """Rank 0's lines."""
        generation = self.generation
        for _ in range(count):
            self.step += 1
            self.say(generation.members[0], Line(generation.number, "metrics", {
                "step": self.step, "loss": 1.0, "time": time.time(), "step_s": 0.1,
                "world_size": len(generation.members), "generation": generation.number, "samples": 1}))
        self.drain()

    def stand(self, reason: str, without: Collection[str] = ()) -> None:
        """All members say where they stand, at the step that all have committed."""
        generation, size = self.generation, self.replica
        ballot = Ballot(self.step, 1.0 / 3.0, 1.0, self.fleet.code * (reason == "stopped"), squared_norm=1.0 / 7.0)
        for rank, name in enumerate(generation.members):
            if name not in without:
                ranges = held(rank // size, generation.shape.data, BLOCKS, self.holders > 1) if self.holders else ()
                self.say(name, Standing(name, generation.number, reason, self.step, self.step, ballot, "a peer is gone",
                                        compilations=3, mesh=(1, *generation.mesh[1:]), coordinate=rank % size,
                                        held=ranges, blocks=BLOCKS if self.holders else 0))
        self.drain()

    def fail(self, victims: Sequence[str] = ()) -> None:
        victims = victims or self.generation.members[-2:-1]
        for victim in victims:
            self.fleet.forget(victim)
            self.controller.post(events.Lost(victim, "killed"))
        self.stand("broken", set(victims))

    def replace(self) -> None:
        self.controller.want()  # what it does once the time has come
        self.join([name for name in self.fleet.slots if name not in self.controller.workers])
        self.stand("stopped")

    def halve(self) -> None:
        self.controller.advance(events.ScaleTo(self.size // 2))
        self.controller.checkpoints.newest = self.step  # as if all had sent their parts, if they were asked for them
        self.stand("stopped")

    def lose_half(self) -> None:
        self.fail([name for rank, name in enumerate(self.generation.members) if rank // self.replica % 2])


PHASES: dict[str, Callable[[Run], None]] = {
    "start": lambda run: run.join(run.names), "failure": Run.fail, "replacement": Run.replace, "half": Run.halve,
    "half lost": Run.lose_half}


def measured(size: int, case: str) -> Iterator[tuple[str, list[str]]]:
    """A row for each phase, and one of what a member has to do."""
    plans_s = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), size, case)
        ray_fleet.ray.put = run.traffic.put  # type: ignore[method-assign]
        for number, (phase, work) in enumerate(PHASES.items(), 1):
            began, worked = time.perf_counter(), time.process_time()
            run.traffic.sent = run.traffic.received = 0
            work(run)
            seconds, worked, traffic = time.perf_counter() - began, time.process_time() - worked, run.traffic
            assert run.generation.number == number, run.generation
            run.step = run.generation.committed  # 0 where it goes on from a checkpoint, for there is none
            yield phase, [case, str(size), str(len(run.generation.members)), f"{seconds:.3f}", f"{worked / size * 1e6:.0f}",
                          *(f"{count / size:.0f}" for count in (traffic.sent, traffic.received, run.journal.stat().st_size))]
            plans_s.append(moving(run) if run.generation.held else 0.0)
            run.steps(3)
    own = OwnFigures(np.arange(run.shards) // 2, run.shards // 2)
    vote = packed(own, 0, [np.zeros(run.shards)] * 2, 0.0, False, 0)  # what each gives, all get
    yield "a member", [case, str(size), f"{size * vote.nbytes / 1e3:.1f}", f"{max(plans_s):.3f}"]


def moving(run: Run) -> float:
    """Seconds of a member's plan of a generation."""
    generation, began = run.generation, time.perf_counter()
    ranks = generation.shape.axis_ranks(0, "data")
    plan([generation.held[rank] for rank in ranks], [], run.holders > 1, BLOCKS, 0)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 256, 1024, 4096])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    tables: dict[str, list[list[str]]] = {}
    for case in options.case:
        for size in [size for size in options.workers if size >= 4 * CASES[case][0][2]]:  # half of half is a replica
            for name, row in measured(size, case):
                tables.setdefault(name, []).append(row)
                print(name, *row, flush=True)
    head = ["", "workers", "members then", "seconds", "us of a processor a worker", "B sent a worker", "B received a worker", "B of journal a worker"]
    ours = ["", "workers", "a vote, kB", "a plan, s"]
    sections = [f"## {name}\n\n{results.table(ours if name == 'a member' else head, rows)}" for name, rows in tables.items()]
    text = __doc__.split("\n\n")
    results.write("control_plane", "The control plane at scale", [text[0], text[2].strip(), NOTE, *sections])


NOTE = """replicated: every worker has the whole state. sharded: an optimizer's state is shared out over all, with twins. replicas: of
eight workers each along `tensor`, sharded over the replicas. Two logical shards a replica: where all have the whole state,
two thirds of the replicas take as long as all without one, so so many train until the replacement is there."""


if __name__ == "__main__":
    main()
