"""What a worker trains: what the run is, the same everywhere and always, and what this worker has of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from elastic.data.ledger import Ledger
from elastic.mesh import Mesh, Seat
from elastic.messages import Ballot
from elastic.model.backend import Backend, Buffer, Habits
from elastic.parallel.layout import Portion
from elastic.parallel.pipeline import Pipeline
from elastic.state.state import State
from elastic.worker.watch import Watch


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


@dataclass
class Placement:
    """A coordinate of the mesh, and what a worker computes with there. `mesh` is one replica's; a worker is on any replica's coordinate."""

    backend: Backend
    state: State
    mesh: Mesh = Mesh(1)
    seat: Seat = Seat()
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
