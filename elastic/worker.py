"""A worker: builds once, then takes part in one generation after another until it is released.

`Worker` knows nothing of Ray: what differs between a process on a cluster and a thread in a test is its `Rim`.
"""

from __future__ import annotations

import queue
import traceback
from collections.abc import Mapping
from typing import Any, Protocol

from elastic.chaos import Fault, Injector
from elastic.checkpoint.saver import Saver
from elastic.collective.group import CollectiveGroup
from elastic.control import Control
from elastic.errors import GroupBroken, NonFiniteLoss, UserError
from elastic.loop import Work, train
from elastic.messages import Generation, Job, Part, Ready, Standing
from elastic.recipe import loads
from elastic.workload import Workload, build_work


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
    """One worker's life. `orders` takes generations; None releases it."""

    def __init__(self, name: str, job: Job, rim: Rim):
        self.name, self.job, self.rim = name, job, rim
        self.control = Control()
        self.orders: queue.SimpleQueue[Generation | None] = queue.SimpleQueue()
        self.part: Part | None = None

    def serve(self) -> None:
        """Builds and compiles, says so, and works until released."""
        recipe = loads(self.job.recipe, locate=False)
        workload = Workload.open(recipe, self.job.info)
        self.saver = Saver(self.name, self.job.checkpoints, self.job.recipe, recipe.data.batch_size, recipe.run.seed, self.job.info,
                           self.post_part)
        self.work: Work = build_work(recipe, workload, self.control, self.rim.post, self.save)
        warm_up(self.work)
        self.recipe = recipe
        self.rim.post(Ready(self.name, self.rim.node, self.rim.pid, self.rim.endpoint, self.work.backend.compilations(), self.rim.shares))
        taken = 0
        while (generation := self.orders.get()) is not None:
            if generation.number > taken:  # a new controller repeats what may not have arrived
                taken = generation.number
                self.rim.post(self.take_part(generation))
        self.saver.join()

    def post_part(self, part: Part) -> None:
        self.part = part
        self.rim.post(part)

    def resync(self) -> None:
        """Says again what a controller may have taken and not yet written down."""
        if self.part is not None:
            self.rim.post(self.part)

    def take_part(self, generation: Generation) -> Standing:
        """One generation, from meeting to parting, and where this worker stands after it."""
        rank = generation.members.index(self.name)
        group: CollectiveGroup | None = None
        self.control.enter(generation.number, generation.written)
        self.work.unwritten.clear()  # a generation is published when its past is on disk
        hashes: Mapping[str, str] = {}
        reason, error, fatal = "broken", "", False
        try:
            self.load(generation)
            group = self.rim.form(generation, rank, self.control)
            self.control.attach(group)
            injector = Injector(generation.chaos, rank, self.rim.announce, self.rim.strike, self.rim.cut_short)
            reason = train(self.work, generation, group, injector)
            if reason == "done":
                hashes = self.saver.hashes(self.work.state)
        except GroupBroken as broken:
            error = str(broken)
        except Exception as failure:
            reason, error, fatal = "failed", describe(failure), isinstance(failure, (NonFiniteLoss, UserError))
            traceback.print_exc()
        if group is not None:
            group.abandon()
        work = self.work
        return Standing(self.name, generation.number, reason, work.state.committed, work.holds, work.ballot, error, fatal,
                        lines=tuple(work.unwritten), compilations=work.backend.compilations(), **hashes)

    def load(self, generation: Generation) -> None:
        """Starting values, where the generation starts from the recipe or from a checkpoint."""
        if not generation.load:
            return
        state = self.work.state
        self.work.gradient, self.work.holds, self.work.ballot = None, -1, None
        if generation.load == "recipe":
            state.start(self.recipe.run.seed, self.saver.initial(self.recipe.model.init, state))
        else:
            arrays, step, self.work.evaluation = self.saver.load(generation.load)
            state.load(arrays, step)

    def save(self, generation: int, step: int, evaluation: Mapping[str, float], wait: bool) -> None:
        self.saver.save(self.work.state, generation, step, evaluation, wait)


def describe(error: BaseException) -> str:
    """One line: the platform's own errors speak for themselves, others are named."""
    if isinstance(error, (UserError, NonFiniteLoss)):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def warm_up(work: Work) -> None:
    """Runs what compiles or allocates lazily, on the first shard, without touching the state."""
    state = work.state
    state.start(work.plan.seed)
    state.committed = -1
    buffer = work.backend.allocate(state.layout.gradient)
    views = state.layout.views(buffer, state.layout.trainable_names)
    work.backend.gradients(work.load_batch(1, 0), 0, views)
    if work.eval_batches:
        work.backend.metrics(work.eval_batches[0]())
