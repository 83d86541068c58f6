"""A worker: takes part in one generation after another until it is released.

`Worker` knows nothing of Ray: what differs between a process on a cluster and a thread in a test is its `Rim`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import astuple, replace
from functools import partial
from typing import Any, Protocol, Self

from elastic.chaos import Fault, Injector
from elastic.checkpoint.manager import read_start
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.state_hash import hashes_of
from elastic.collective.group import CollectiveGroup
from elastic.errors import BadCheckpoint, GroupBroken, NonFiniteLoss, Overwritten, RunFailed, UserError
from elastic.mesh import Mesh
from elastic.messages import Generation, Job, Part, Ready, Save, Standing, shape
from elastic.model.user_code import describe
from elastic.recipe import Recipe, loads
from elastic.state.relayout import relay, whole_arrays
from elastic.state.state import State
from elastic.storage.remote import join, parted, shown
from elastic.tables.moving import Moving, roles_of
from elastic.worker.bucket_moves import held_buckets
from elastic.worker.build import build_training, place_on
from elastic.worker.context import StepContext
from elastic.worker.embedding import table_digests
from elastic.worker.loop import apply_update, begin, train
from elastic.worker.loop_control import Control
from elastic.worker.rehearsal import warm_up
from elastic.worker.saver import Saver
from elastic.worker.training import Held, Member, Placement, keep_lines
from elastic.workload import Workload, laid, mesh_of


class Rim(Protocol):
    """A worker's surroundings."""

    node: str
    pid: int
    endpoint: str
    shares: bool  # whether it can meet others of its node over shared memory

    def form(self, generation: Generation, rank: int, control: Control) -> CollectiveGroup:
        """Joins the generation's group; `GroupBroken` if it cannot be formed or is aborted meanwhile."""

    def post(self, message: Any) -> None:
        """To the controller, in order; returns at once."""

    def announce(self, spec: str) -> None:
        """Tells the controller that a fault fires now; returns when it knows."""

    def strike(self, fault: Fault) -> None:
        """Carries the fault out on this worker."""

    def cut_short(self, fault: Fault, group: CollectiveGroup) -> CollectiveGroup:
        """The group in whose next collective the fault strikes."""


class Worker(Member):
    """One worker's life. Open it on the thread that serves."""

    def __init__(self, name: str, job: Job, rim: Rim, control: Control, recipe: Recipe, workload: Workload,
                 place: Placement):
        super().__init__(build_training(recipe, workload), place, control, rim.post)
        self.name, self.rim, self.recipe, self.workload = name, rim, recipe, workload
        head = Manifest(0, 0, 0, recipe.run.seed, job.recipe,
                        extra={"info": workload.facts(job.info), "run": job.run_id})
        self.saver = Saver(name, job.checkpoints, head, recipe.data.batch_size, self.post_part,
                           lambda: rim.strike(Fault("kill", 0, 0, "checkpoint", "disk")), recipe.checkpoint.write_mb_s,
                           self.tables, recipe.checkpoint.full_every)
        self.parts: dict[Save, Part] = {}  # of the last checkpoint
        self.ready: Ready | None = None
        self.standing: Standing | None = None  # where it stands by

    @classmethod
    def open(cls, name: str, job: Job, rim: Rim, control: Control) -> Self:
        """Builds and compiles, on the coordinate that this worker is likely to get: one that gets another builds again.
        """
        recipe = loads(job.recipe, locate=False)
        workload, mesh = Workload.open(recipe, job.info), mesh_of(recipe)
        place = place_on(recipe, workload, mesh, mesh.coordinate(int(name.rpartition("-")[2]) % mesh.replica_size))
        worker = cls(name, job, rim, control, recipe, workload, place)
        warm_up(worker.training, place)
        return worker

    def serve(self) -> None:
        """Says that it is there, and works until released."""
        tables = self.training.tables
        self.ready = Ready(self.name, self.rim.node, self.rim.pid, self.rim.endpoint, self.place.backend.compilations(),
                           self.rim.shares, *((tables.num_buckets, tables.twin) if tables else ()))
        self.post(self.ready)
        taken = 0
        while (order := self.control.orders.get()) is not None:
            if isinstance(order, Save):
                self.save_alone(order)
            elif order.number > taken:  # a new controller repeats what may not have arrived
                taken, self.standing = order.number, None
                self.standing = self.take_part(order)
                self.post(self.standing)
        if self.control.is_orphan:
            self.leave()
        self.saver.join()
        if self.tables:
            self.tables.close()

    def save_alone(self, order: Save) -> None:
        """A final checkpoint: too few are left to go on, and no checkpoint has what this one has. Its part reports how
        it went."""
        written, state = self.parts.get(replace(order, ballot=None)), self.place.state
        if written is not None and not written.error:
            self.post(written)
            return
        try:
            if order.ballot and (state.committed, self.held.step) == (order.step - 1, order.step):
                apply_update(self, order.ballot)
            if state.committed != order.step:
                raise RunFailed(f"{self.name} has not the state of step {order.step} any more.")
            self.saver.save(state, order, self.evaluation, is_alone=True)
        except RunFailed as failed:
            self.post_part(Part(self.name, order.generation, order.step, "", 0.0, 0.0, order.rank, order.world_size,
                                error=str(failed)))

    def leave(self) -> None:
        """An orphan's final checkpoint: its whole state, unless a checkpoint has it, with the lines since the newest
        checkpoint."""
        try:
            if self.saver.leave(self.place.state, self.control.generation, self.evaluation, self.unsaved):
                print(f"Step {self.place.state.committed} is saved; there was nobody to report it to.", flush=True)
        except (OSError, NonFiniteLoss) as error:
            print(f"The final checkpoint was not written: {error}", flush=True)
        finally:
            self.control.is_gone.set()

    def post_part(self, part: Part) -> None:
        parts = {order: old for order, old in self.parts.items() if (order.generation,
                                                                     order.step) == (part.generation, part.step)}
        self.parts = {**parts, Save(part.generation, part.step, part.rank, part.world_size): part}
        self.post(part)

    def resync(self) -> None:
        """Says again what a controller may have taken and not yet written down: all of it, where its disk was full."""
        for report in (self.ready, self.standing, *self.parts.values()):
            if report is not None:
                self.post(report)
        self.control.repeat.set()

    def take_part(self, generation: Generation) -> Standing:
        """One generation, from meeting to parting, and where this worker stands after it."""
        rank = generation.members.index(self.name)
        group: CollectiveGroup | None = None
        context: StepContext | None = None
        self.control.enter(generation.number, generation.written)
        keep_lines(self.unwritten, generation.written, generation.committed)
        keep_lines(self.unsaved, generation.checkpointed, generation.committed)
        hashes: Mapping[str, Any] = {}
        reason, error, fatal, rejected = "broken", "", False, ""
        if generation.load:  # from the recipe or a checkpoint: nothing that this worker has counts
            self.held, self.place.state.committed = Held(), -1
        try:
            group = self.rim.form(generation, rank, self.control)
            self.control.attach(group)
            injector = Injector(generation.chaos, rank, self.rim.announce, self.rim.strike, self.rim.cut_short)
            context = begin(self, generation, group, injector)
            self.saver.prepare(self.place.state, rank, group.size)
            reason = train(context)
            if reason == "done":
                hashes = self.hashes(context)
        except GroupBroken as broken:
            error = str(broken)
        except BadCheckpoint as bad:
            reason, error, rejected = "failed", str(bad), generation.load
        except Overwritten as written:
            self.place.state.committed = -1
            self.drop()
            reason, error, fatal = "failed", str(written), True
        except Exception as failure:
            if context and context.groups.broken:  # a framework turns what a collective raises into an error of its own
                error = str(context.groups.broken[0])
            else:
                reason, error, fatal = "failed", describe(failure), isinstance(failure, (NonFiniteLoss, UserError))
                traceback.print_exc()
        if group is not None:
            group.abort()
        state, held, place = self.place.state, self.held, self.place
        has_state = state.committed >= 0 or held.step >= 0
        return Standing(self.name, generation.number, reason, state.committed, held.step, held.ballot, error, fatal,
                        rejected,
                        lines=tuple(self.unwritten), compilations=place.backend.compilations(),
                        mesh=astuple(place.mesh),
                        coordinate=place.mesh.rank(place.coordinate) if has_state else -1, held=state.holding.blocks
                        if state.committed >= 0 else (),
                        blocks=state.num_blocks, torn=state.torn, **hashes,
                        **held_buckets(self.tables, has_state))

    def settle(self, generation: Generation, group: CollectiveGroup) -> None:
        """With `resharded`, its part of the state comes out of what all members hold; until all have theirs, what this
        one holds stays."""
        mesh, coordinate = generation.shape, generation.shape.coordinate(group.rank)
        place = self.place
        if (replace(mesh, data=1), replace(coordinate, data=0)) != (place.mesh, place.coordinate):
            place = place_on(self.recipe, self.workload, mesh, coordinate)
            self.control.at(generation.committed, "start")
            warm_up(self.training, place)
        if generation.resharded:
            self.move(generation, group, place.state)
        self.place = place
        if generation.load:
            place.state.own_as(coordinate.data, mesh.data)
            if self.tables and generation.buckets:
                self.tables.begin(*roles_of(group.rank, Moving(generation.buckets, 0).first), generation.committed)
        if generation.load == "recipe":
            place.state.start(self.recipe.run.seed, read_start(self.recipe.model.init, place.state.whole))
        elif generation.load:
            self.restore(generation, group)

    def move(self, generation: Generation, group: CollectiveGroup, state: State) -> None:
        """Fills `state` out of what the members hold."""
        started, mesh = time.perf_counter(), generation.shape
        holders = {held.rank: shape(held.mesh).coordinate(held.coordinate) for held in generation.resharded
                   if held.coordinate >= 0}
        was = shape(next(held.mesh for held in generation.resharded if held.coordinate >= 0))
        given = self.place.state if group.rank in holders else None
        waiting = partial(self.control.collective, generation.committed, "relay")
        moved = relay(group, laid(self.recipe, self.workload, was), holders, given,
                      laid(self.recipe, self.workload, mesh), state, waiting)
        with waiting(0):
            group.barrier()
        state.committed = generation.committed
        if group.rank == 0:
            self.event(generation, "relaid", **{"from": degrees(was), "to": degrees(mesh), "bytes": moved,
                                                "seconds": time.perf_counter() - started})

    def restore(self, generation: Generation, group: CollectiveGroup) -> None:
        """From the checkpoint that the generation starts with. Rank 0 reports it."""
        started = time.perf_counter()
        self.control.at(generation.committed, "restore")
        waiting = partial(self.control.collective, generation.committed, "restore")
        path = join(self.saver.location, parted(generation.load)[1])  # which the controller may reach by another name
        manifest, read = self.saver.restore(path, self.place.state, group, waiting)
        self.evaluation = dict(manifest.eval)
        if group.rank == 0:
            self.event(generation, "loaded", step=manifest.step, path=shown(generation.load), bytes=manifest.bytes,
                       read_bytes=read,
                       seconds=time.perf_counter() - started)

    def hashes(self, context: StepContext) -> dict[str, str]:
        """Of the whole model: each array is put together from the replica's parts."""
        step, groups = context.state.committed, context.groups
        waiting = partial(self.control.collective, step, "hashes")
        tables = table_digests(context) if context.tables else []
        parameters, state = hashes_of(whole_arrays(context.state, groups.replica, waiting, groups.data),
                                      step * self.recipe.data.batch_size, tables)
        return {"parameters_sha256": parameters, "state_sha256": state}

    def save(self, order: Save) -> None:
        keep_lines(self.unsaved, self.saver.newest, order.step)
        self.saver.save(self.place.state, order, self.evaluation, self.control.note)

    def is_busy(self) -> bool:
        return self.saver.writing


def degrees(mesh: Mesh) -> dict[str, int]:
    return {axis: size for axis, size in mesh.as_dict().items() if axis != "data"}
