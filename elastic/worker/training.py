"""What a worker trains: what the run is, the same everywhere and always, and what this worker, a member of the group, has of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from elastic.collective.group import CollectiveGroup
from elastic.data.ledger import Ledger
from elastic.mesh import Coordinate, Mesh
from elastic.messages import Ballot, Generation, Line, Save
from elastic.model.backend import Backend, Buffer, Habits
from elastic.parallel.layout import Portion
from elastic.parallel.pipeline import Pipeline
from elastic.state.state import State
from elastic.tables.features import Tables
from elastic.tables.held import HeldTables
from elastic.worker.loop_control import Control
from elastic.worker.overwrite_watch import Watch

MAX_LINES = 50_000  # that a manifest carries; those before are on the disk itself long since


@dataclass(frozen=True)
class Plan:
    """What to train, as plain numbers; the same on every worker and in every generation."""

    num_steps: int
    num_shards: int
    seed: int
    exact: bool
    optimizer: Mapping[str, Any]  # the keys of `[optimizer]`, the rates scaled to the batch
    eval_every: int = 0
    checkpoint_every: int = 0
    skip_busy: bool = False  # a checkpoint that is due while one is being written is left out
    micro_batches: int = 1  # of a logical shard
    best: str = ""  # the figure by which a checkpoint is kept, as "eval.loss"

    def is_saved(self, step: int) -> bool:
        return step == self.num_steps or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)


class Loader(Protocol):
    """Batches by (step, shard). `expect` names those that come next, so that they can be loaded ahead."""

    def __call__(self, step: int, shard: int) -> Mapping[str, Any]: ...

    def expect(self, keys: Iterable[tuple[int, int]]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Training:
    """What a run is. Positions below 0 are filler."""

    plan: Plan
    load_batch: Loader
    positions: Callable[[int, int], np.ndarray]  # by step and shard
    eval_batches: Sequence[Callable[[], Mapping[str, Any]]] = ()
    unit: str = ""  # that weights count, beside samples
    is_own: bool = False  # model or data set is the user's: what fails in computing a shard is their code
    fills: bool = True  # a batch that lacks samples has rows of weight 0 in their place
    ledger: Ledger | None = None  # where the recipe asks for one
    tables: Tables | None = None  # embedding tables whose rows lie on the members


@dataclass
class Placement:
    """A coordinate of the mesh, and what a worker computes with there. `mesh` is one replica's; a worker is on any
    replica's coordinate."""

    backend: Backend
    state: State
    mesh: Mesh = Mesh(1)
    coordinate: Coordinate = Coordinate()
    portion: Portion | None = None  # of the model, where a replica is several workers
    pipeline: Pipeline | None = None  # where the mesh has one
    watch: Watch | None = None  # over what a user's own model trains
    habits: Habits = field(default_factory=Habits)  # known once it is warmed up


@dataclass
class Held:
    """What a member has between a step's reduction and its commit. `ballot` is the last vote that it saw complete."""

    gradient: Buffer | None = None
    step: int = -1
    ballot: Ballot | None = None

    def drop(self) -> None:
        self.gradient, self.step = None, -1


class Member:
    """It outlives generations. This much trains without checkpoints on the coordinate that it has;
    `elastic.worker.worker.Worker` does the rest.

    `post` sends a message to the controller, in order, and returns at once.
    """

    def __init__(self, training: Training, place: Placement, control: Control, post: Callable[[Any], None]):
        self.training, self.place, self.control, self.post = training, place, control, post
        self.held = Held()
        self.tables = HeldTables(training.tables) if training.tables else None
        self.evaluation: dict[str, float] = {}  # the last one
        self.steps_s: deque[float] = deque(maxlen=9)  # of the last steps
        self.unwritten: deque[dict[str, Any]] = deque()  # lines of metrics.jsonl that may not be on disk
        # those since the newest checkpoint known to be committed
        self.unsaved: deque[dict[str, Any]] = deque(maxlen=MAX_LINES)

    def settle(self, generation: Generation, group: CollectiveGroup) -> None:
        """Takes the coordinate that the generation gives it, and loads the checkpoint that it names, if any, all
        members together."""
        assert not generation.resharded

    def drop(self) -> None:
        """Lets go of what it holds of a step that is done anew."""
        self.held.drop()
        if self.tables:
            self.tables.forget()

    def save(self, order: Save) -> None:
        """Writes this member's share of a checkpoint, where there are any."""
        return

    def is_busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return False

    def event(self, generation: Generation, event: str, **fields: Any) -> None:
        """A line for events.jsonl, of `generation.committed` unless `fields` have another step."""
        self.post(Line(generation.number, "events", {"event": event, "step": generation.committed, **fields}))

    def write_down(self, generation: Generation, rank: int, fields: dict[str, Any]) -> None:
        """Rank 0 sends a line for metrics.jsonl; every member keeps it until it is known to be on disk."""
        keep_lines(self.unwritten, self.control.written, fields["step"])
        self.unwritten.append(fields)
        self.unsaved.append(fields)
        if rank == 0:
            repeats = self.control.repeat.is_set()
            if repeats:  # else what is asked for just now would be forgotten
                self.control.repeat.clear()
            for one in self.unwritten if repeats else (fields,):
                self.post(Line(generation.number, "metrics", one))


def keep_lines(lines: deque[dict[str, Any]], there: int, last: int) -> None:
    """Those of the steps after `there`, whose evaluation may be missing too, up to `last`: a run may have gone back."""
    while lines and lines[0]["step"] + ("eval" in lines[0]) <= there:
        lines.popleft()
    while lines and lines[-1]["step"] > last:
        lines.pop()
