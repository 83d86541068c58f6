"""A worker: builds once, then takes part in one generation after another until it is released.

`Worker` knows nothing of Ray: what differs between a process on a cluster and a thread in a test is its `Rim`.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from elastic.chaos import Fault, Injector
from elastic.collective.group import CollectiveGroup
from elastic.data.collate import num_rows, sliced
from elastic.errors import BadCheckpoint, GroupBroken, NonFiniteLoss, Overwritten, RunFailed, UserError
from elastic.mesh import Mesh
from elastic.messages import Generation, Job, Line, Part, Ready, Save, Standing, shape
from elastic.model.user_code import describe, is_of_machine, users
from elastic.parallel.groups import mirrored
from elastic.recipe import loads
from elastic.state.relayout import relay, whole_arrays
from elastic.state.state import State
from elastic.storage.remote import shown
from elastic.worker.build import build_work, take_seat
from elastic.worker.evaluation import measure, named
from elastic.worker.loop import Work, commit, keep_lines, train
from elastic.worker.loop_control import Control
from elastic.worker.saver import Saver
from elastic.workload import Workload, laid, mesh_of

LAST_WORDS_S = 600.0  # for an orphan to write its state


class Orphan:
    """An order that a worker gives itself: leave."""


class Rim(Protocol):
    """A worker's surroundings."""

    node: str
    pid: int
    endpoint: str
    shares: bool  # whether it can meet others of its node over shared memory

    def form(self, generation: Generation, rank: int, control: Control) -> CollectiveGroup:
        """Joins the generation's group; `GroupBroken` if it cannot be formed or is abandoned meanwhile."""

    def post(self, message: Any) -> None:
        """To the controller, in order; returns at once."""

    def announce(self, spec: str) -> None:
        """Tells the controller that a fault fires now; returns when it knows."""

    def strike(self, fault: Fault) -> None:
        """Carries the fault out on this worker."""

    def cut_short(self, fault: Fault, group: CollectiveGroup) -> CollectiveGroup:
        """The group in whose next collective the fault strikes."""


class Worker:
    """One worker's life. `orders` takes generations and what is to be saved; None releases it."""

    def __init__(self, name: str, job: Job, rim: Rim):
        self.name, self.job, self.rim = name, job, rim
        self.control = Control()
        self.orders: queue.SimpleQueue[Generation | Save | Orphan | None] = queue.SimpleQueue()
        self.is_gone = threading.Event()  # an orphan has said its last words
        self.parts: dict[Save, Part] = {}  # of the last checkpoint
        self.said: Ready | None = None
        self.stood: Standing | None = None  # where it stands by

    def serve(self) -> None:
        """Builds and compiles, says so, and works until released."""
        recipe = loads(self.job.recipe, locate=False)
        workload = Workload.open(recipe, self.job.info)
        self.saver = Saver(self.name, self.job.checkpoints, self.job.recipe, recipe.data.batch_size, recipe.run.seed, workload.facts(self.job.info),
                           self.post_part, self.crash, mb_s=recipe.checkpoint.write_mb_s, run=self.job.run_id)
        self.recipe, self.workload = recipe, workload
        mesh = mesh_of(recipe)
        seat = mesh.seat(int(self.name.rpartition("-")[2]) % mesh.replica_size)  # a guess: a worker that gets another builds again
        self.work: Work = build_work(recipe, workload, self.control, self.rim.post, self.save, seat)
        self.work.settle, self.work.restore, self.work.ready = self.settle, self.restore, self.prepare
        self.work.is_busy = self.saver.is_busy
        self.place = (mesh.pipeline, mesh.tensor, mesh.expert, seat)
        warm_up(self.work)
        self.said = Ready(self.name, self.rim.node, self.rim.pid, self.rim.endpoint, self.work.backend.compilations(), self.rim.shares)
        self.rim.post(self.said)
        taken = 0
        while (order := self.orders.get()) is not None:
            if isinstance(order, Orphan):
                self.leave()
                return
            if isinstance(order, Save):
                self.save_alone(order)
            elif order.number > taken:  # a new controller repeats what may not have arrived
                taken, self.stood = order.number, None
                self.stood = self.take_part(order)
                self.rim.post(self.stood)
        self.saver.join()

    def save_alone(self, order: Save) -> None:
        """Last words: too few are left to go on, and no checkpoint has what this one has. Its part tells how it went."""
        written, work, state = self.parts.get(replace(order, ballot=None)), self.work, self.work.state
        if written is not None and not written.error:
            self.rim.post(written)
            return
        try:
            if order.ballot and (state.committed, work.holds) == (order.step - 1, order.step):
                commit(work, order.ballot)
            if state.committed != order.step:
                raise RunFailed(f"{self.name} has not the state of step {order.step} any more.")
            self.saver.save(state, order, work.evaluation)
        except RunFailed as failed:
            self.post_part(Part(self.name, order.generation, order.step, "", 0.0, 0.0, order.rank, order.world_size, error=str(failed)))

    def orphan(self, timeout_s: float = LAST_WORDS_S) -> None:
        """From another thread: nobody has answered for too long. Returns when the state is on disk, or cannot be."""
        self.orders.put(Orphan())
        self.control.abandon(self.control.generation)
        self.is_gone.wait(timeout_s)

    def leave(self) -> None:
        """An orphan's last words: its whole state, unless a checkpoint has it, with the lines since the newest checkpoint."""
        work = self.work
        try:
            if self.saver.leave(work.state, self.control.generation, work.evaluation, work.unsaved):
                print(f"Step {work.state.committed} is saved; nobody was there to be told.", flush=True)
        except (OSError, NonFiniteLoss) as error:
            print(f"The last words were not written: {error}", flush=True)
        finally:
            self.is_gone.set()

    def post_part(self, part: Part) -> None:
        parts = {order: old for order, old in self.parts.items() if (order.generation, order.step) == (part.generation, part.step)}
        self.parts = {**parts, Save(part.generation, part.step, part.rank, part.world_size): part}
        self.rim.post(part)

    def resync(self) -> None:
        """Says again what a controller may have taken and not yet written down: all of it, where its disk was full."""
        for word in (self.said, self.stood, *self.parts.values()):
            if word is not None:
                self.rim.post(word)
        self.control.repeat.set()

    def take_part(self, generation: Generation) -> Standing:
        """One generation, from meeting to parting, and where this worker stands after it."""
        rank = generation.members.index(self.name)
        group: CollectiveGroup | None = None
        self.control.enter(generation.number, generation.written)
        keep_lines(self.work.unwritten, generation.written, generation.committed)
        keep_lines(self.work.unsaved, generation.checkpointed, generation.committed)
        hashes: Mapping[str, Any] = {}
        reason, error, fatal, rejected = "broken", "", False, ""
        try:
            self.load(generation)
            group = self.rim.form(generation, rank, self.control)
            self.control.attach(group)
            injector = Injector(generation.chaos, rank, self.rim.announce, self.rim.strike, self.rim.cut_short)
            reason = train(self.work, generation, group, injector)
            if reason == "done":
                hashes = self.hashes(generation)
        except GroupBroken as broken:
            error = str(broken)
        except BadCheckpoint as bad:
            reason, error, rejected = "failed", str(bad), generation.load
        except Overwritten as written:
            self.work.state.committed, self.work.holds = -1, -1
            reason, error, fatal = "failed", str(written), True
        except Exception as failure:
            behind = self.work.links.broken if self.work.links else []  # a framework turns what a collective raises into an error of its own
            if behind:
                error = str(behind[0])
            else:
                reason, error, fatal = "failed", describe(failure), isinstance(failure, (NonFiniteLoss, UserError))
                traceback.print_exc()
        if group is not None:
            group.abandon()
        work, self.work.links = self.work, None
        return Standing(self.name, generation.number, reason, work.state.committed, work.holds, work.ballot, error, fatal, rejected,
                        lines=tuple(work.unwritten), compilations=work.backend.compilations(), mesh=(1, *self.place[:3]),
                        seat=self.seat(), kept=work.state.blocks if work.state.committed >= 0 else (), blocks=work.state.num_blocks,
                        torn=work.state.torn, **hashes)

    def seat(self) -> int:
        """The rank within a replica of the seat whose state this worker holds; -1: it holds none."""
        pipeline, tensor, expert, seat = self.place
        return Mesh(1, pipeline, tensor, expert).rank(seat) if self.work.state.committed >= 0 or self.work.holds >= 0 else -1

    def load(self, generation: Generation) -> None:
        """A generation that starts from the recipe or a checkpoint owes nothing to what this worker holds."""
        if generation.load:
            self.work.gradient, self.work.holds, self.work.ballot = None, -1, None
            self.work.state.committed = -1

    def settle(self, generation: Generation, group: CollectiveGroup) -> None:
        """Takes the seat that the generation gives this worker. With `relaid`, its part of the state comes out of what all members hold; until
        all have theirs, what this one holds stays what it was.
        """
        work, mesh = self.work, generation.shape
        seat = replace(mesh.seat(group.rank), data=0)
        taken: tuple[Any, ...] = (work.portion, work.backend, work.state, work.pipeline)
        if (mesh.pipeline, mesh.tensor, mesh.expert, seat) != self.place:
            taken = take_seat(self.recipe, self.workload, mesh, seat)
            self.control.at(generation.committed, "start")
            warm_up(replace(work, portion=taken[0], backend=taken[1], state=taken[2], pipeline=taken[3]))
        if generation.relaid:
            self.move(generation, group, taken[2])
        work.portion, work.backend, work.state, work.pipeline = taken
        self.place = (mesh.pipeline, mesh.tensor, mesh.expert, seat)
        if generation.load:
            work.state.keep(mesh.seat(group.rank).data, mesh.data)
        if generation.load == "recipe":
            work.state.start(self.recipe.run.seed, self.saver.initial(self.recipe.model.init, work.state))

    def move(self, generation: Generation, group: CollectiveGroup, state: State) -> None:
        """Fills `state` out of what the members hold."""
        started, mesh = time.perf_counter(), generation.shape
        holders = {held.rank: shape(held.mesh).seat(held.seat) for held in generation.relaid if held.seat >= 0}
        was = shape(next(held.mesh for held in generation.relaid if held.seat >= 0))
        given = self.work.state if group.rank in holders else None

        def tell(number: int) -> AbstractContextManager[None]:
            self.control.detail = number
            return self.control.collective(generation.committed, "relay")

        moved = relay(group, laid(self.recipe, self.workload, was), holders, given, laid(self.recipe, self.workload, mesh), state, tell)
        with tell(0):
            group.barrier()
        state.committed = generation.committed
        if group.rank == 0:
            self.rim.post(Line(generation.number, "events", {
                "event": "relaid", "step": generation.committed, "from": degrees(was), "to": degrees(mesh), "bytes": moved,
                "seconds": time.perf_counter() - started}))

    def prepare(self, generation: Generation, group: CollectiveGroup) -> None:
        self.saver.prepare(self.work.state, group.rank, group.size)

    def hashes(self, generation: Generation) -> dict[str, str]:
        """Of the whole model: each array is put together from the replica's parts."""
        links, state = self.work.links, self.work.state
        assert links is not None

        def tell(number: int) -> AbstractContextManager[None]:
            self.control.detail = number
            return self.control.collective(state.committed, "hashes")

        return self.saver.hashes(whole_arrays(state, links.replica, tell, links.data), state.committed)

    def restore(self, generation: Generation, group: CollectiveGroup) -> None:
        """From the checkpoint that the generation starts with. Rank 0 tells of it."""
        started = time.perf_counter()

        def at(window: int) -> AbstractContextManager[None]:
            self.control.detail = window
            return self.control.collective(generation.committed, "restore")

        self.control.at(generation.committed, "restore")
        manifest, read = self.saver.restore(generation.load, self.work.state, group, at)
        self.work.evaluation = dict(manifest.eval)
        if group.rank == 0:
            self.rim.post(Line(generation.number, "events", {
                "event": "loaded", "step": manifest.step, "path": shown(generation.load), "bytes": manifest.bytes, "read_bytes": read,
                "seconds": time.perf_counter() - started}))

    def save(self, order: Save, evaluation: Mapping[str, float]) -> None:
        def tell(done: int) -> None:
            self.control.detail = done

        keep_lines(self.work.unsaved, self.saver.newest, order.step)
        self.saver.save(self.work.state, order, evaluation, tell)

    def crash(self) -> None:
        """For fault injection: this process ends between two calls of its file system."""
        self.rim.strike(Fault("kill", 0, 0, "checkpoint", "disk"))


def degrees(mesh: Mesh) -> dict[str, int]:
    return {axis: size for axis, size in mesh.as_dict().items() if axis != "data"}


def warm_up(work: Work) -> None:
    """Runs what compiles or allocates lazily, on the first shard, without touching the state."""
    try:
        with users(work.is_own):
            rehearse(work)
    except UserError:
        traceback.print_exc()
        raise


def rehearse(work: Work) -> None:
    state, plan = work.state, work.plan
    state.start(plan.seed)
    state.committed = -1
    if work.portion is not None:
        work.backend.connect(mirrored(work.portion.layout, work.portion.seat))

    def room() -> Mapping[str, Any]:
        return state.layout.views(work.backend.allocate(state.layout.gradient), state.layout.trainable_names)

    first = work.load_batch(1, 0)
    if work.pipeline is not None:
        work.pipeline.warm_up(first_rows(work, first), room())
        return
    habits = work.backend.rehearse(first_rows(work, first), room)
    if habits.undivided and plan.num_shards * plan.micro_batches > 1:
        raise UserError(habits.undivided)
    work.apart, work.sums = habits.apart, habits.sums
    state.layout.move([*state.buffers, *habits.moved])
    last = shorter(work)
    if last is not None:
        batch, rows = work.load_batch(plan.num_steps, last), int((work.positions(plan.num_steps, last) >= 0).sum())
        with fewer(f"The last step leaves {rows} of a logical shard's {len(work.positions(1, 0))} samples to logical shard {last}",
                   "choose run.steps, data.batch_size or elastic.logical_shards so that all shards are alike"):
            work.backend.gradients(batch, 0, room())
    if work.eval_batches:
        rehearse_evaluation(work)


def rehearse_evaluation(work: Work) -> None:
    """Of the first batch, and of the last where it has fewer rows."""
    tally, first = work.tally(), first_rows(work, work.eval_batches[0](), 1)
    found, best = measure(work.backend, tally, first), work.plan.best.removeprefix("eval.")
    if best and best not in found and best not in (known := named(found, tally)):
        raise UserError(f'checkpoint.best = "{work.plan.best}" is none of the figures of this evaluation, {", ".join(known)}; write one of them.')
    if work.portion is not None or work.fills:
        return
    last = work.eval_batches[-1]()
    if num_rows(last) == num_rows(first):
        return
    with fewer(f"The last batch of the evaluation has {num_rows(last)} rows where the others have {num_rows(first)}",
               f"choose data.eval_fraction so that the evaluation set has a multiple of {num_rows(first)} rows, or let the model take any number"):
        work.backend.metrics(last)


@contextmanager
def fewer(what: str, remedy: str) -> Iterator[None]:
    """Inside, the model computes with fewer rows than before: UserError where it cannot."""
    try:
        yield
    except Exception as error:
        if is_of_machine(error):
            raise
        raise UserError(f"{what}, and the model cannot take that ({describe(error)}); {remedy}.") from error


def shorter(work: Work) -> int | None:
    """The shard of the last step that has fewer rows than the others but not none, where rows are left out rather than filled up."""
    if work.plan.micro_batches > 1 or work.portion is not None or work.fills:
        return None
    for shard in range(work.plan.num_shards):
        real = work.positions(work.plan.num_steps, shard) >= 0
        if 0 < real.sum() < len(real):
            return shard
    return None


def first_rows(work: Work, batch: Mapping[str, Any], micro_batches: int = 0) -> Mapping[str, Any]:
    """As many rows as a micro-batch has on this worker."""
    parts = (micro_batches or work.plan.micro_batches) * (work.portion.mesh.expert if work.portion else 1)
    return batch if parts == 1 else sliced(batch, 0, num_rows(batch) // parts)
