"""What crosses a process: frozen dataclasses of plain values, and nothing else.

The controller sends the workers orders (`Generation`, `Save`, `Abort`, `RequestStop`); the workers report to it
(`Ready`,
`Standing`, `Progress`, `Line`, `Part`, `Moved`). Every message carries the generation it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from elastic.mesh import Mesh

NAMESPACE = "elastic"  # of Ray's named actors
GO, STOP, STOP_AND_SAVE = 0, 1, 2  # the stop request that rides in the vote; the largest wins


@dataclass(frozen=True)
class Ballot:
    """A completed vote: what every member needs, beside its reduced gradients, to apply `step`."""

    step: int
    loss: float  # the sum over all logical shards, along the canonical tree
    weight: float  # likewise
    stop: int = GO
    busy: bool = False  # somebody still writes the checkpoint before
    squared_norm: float = 0.0  # of all reduced gradients, where the recipe clips


# a mesh as plain values: data, pipeline, tensor, expert; data 0 is as many as there are members
Axes = tuple[int, int, int, int]


@dataclass(frozen=True)
class Holder:
    """What the member at `rank` has when a generation starts: the state of one coordinate (a rank within a replica) of
    `mesh`; -1: nothing."""

    rank: int
    mesh: Axes
    coordinate: int


@dataclass(frozen=True)
class Buckets:
    """Of tables whose rows lie on the members: by bucket the rank of its owner and of its twin (-1: none) when the
    generation begins; what is copied beside the training, (bucket, from, to) by ascending buckets; and, where that is
    anything, who holds what afterwards. `at_once`: all of it is copied before the first step."""

    owners: tuple[int, ...]
    twins: tuple[int, ...]
    moves: tuple[tuple[int, int, int], ...] = ()
    last_owners: tuple[int, ...] = ()
    last_twins: tuple[int, ...] = ()
    at_once: bool = False


@dataclass(frozen=True)
class Generation:
    """One membership of the group, and where everybody starts.

    When it begins, every member gets the state of its own coordinate at step `committed`. Who has the gradients of that
    step commits them first, under the coordinate that it had. Then, with `healers`, each source gives its state to
    those it heals, which sit where it sits in other replicas (and may have held another coordinate before); with
    `resharded`, everything moves from the old coordinates to the new ones. Of two members that hold the same, the lower
    rank sends. With `resharded`, a holder's state stays whole until all have what they need, and is what it stands by
    with; one that `healers` give another coordinate lets its own go, for as many others as there are replicas hold that
    one.
    """

    number: int
    members: tuple[str, ...]  # worker ids in the mesh's rank order
    endpoint: str  # host:port of the store at which the group meets
    transport: str  # "gloo" | "shared" | "nccl" | "local"
    committed: int  # steps that count when the generation starts
    ballot: Ballot | None = None  # for members that hold the last step's gradients but did not see its vote
    # (a source's rank, those it heals), for each coordinate where somebody needs state
    healers: tuple[tuple[int, tuple[int, ...]], ...] = ()
    load: str = ""  # "": keep what you have; "recipe": start anew; else the checkpoint that every member loads
    written: int = 0  # steps already in metrics.jsonl
    evaluated: int = 0  # last step whose evaluation is on disk
    checkpointed: int = 0  # last step whose checkpoint is committed
    chaos: tuple[str, ...] = ()  # faults that have not fired yet
    mesh: Axes = (0, 1, 1, 1)
    # of a sharded optimizer, by rank: what each has at `committed` when that is applied
    held: tuple[tuple[tuple[int, int], ...], ...] = ()
    torn: tuple[int, ...] = ()  # ranks that have, of the parameters, nothing else at `committed`
    # one for each member, where the mesh is another than the one that they hold; then `healers` is empty
    resharded: tuple[Holder, ...] = ()
    buckets: Buckets | None = None  # where the run has tables

    @property
    def shape(self) -> Mesh:
        return shape(self.mesh, len(self.members))


def shape(mesh: Axes, members: int = 1) -> Mesh:
    """The mesh of plain values, of which `members` lie on it where it does not say how many replicas there are."""
    data, pipeline, tensor, expert = mesh
    return Mesh(data or max(1, members // (pipeline * tensor * expert)), pipeline, tensor, expert)


@dataclass(frozen=True)
class Ready:
    """A worker has imported, built and compiled; it waits for its first generation."""

    worker: str
    node: str
    pid: int
    endpoint: str
    compilations: int = 0  # traces and compilations of its process so far
    shares: bool = False  # it can meet others of its node over shared memory
    buckets: int = 0  # of the run's tables; 0: there are none
    twin: bool = False  # whether each bucket is to have a second keeper


@dataclass(frozen=True)
class Standing:
    """A worker has left a generation's loop and stands by.

    `reason`: "broken" (a peer is gone), "stopped" (the vote said so), "done", or "failed" (an error of the step
    itself).
    `committed` is -1 where the state is missing or torn. `holds` is the step whose reduced gradients it has, else -1.
    State and gradients are those of `coordinate` (a rank within a replica) of `mesh`; a coordinate of -1 is nobody's:
    nothing of it is of use.
    """

    worker: str
    generation: int
    reason: str
    committed: int
    holds: int = -1
    ballot: Ballot | None = None
    error: str = ""
    fatal: bool = False  # deterministic: a redo cannot mend it
    rejected: str = ""  # the checkpoint that turned out bad while it was loaded
    state_sha256: str = ""
    parameters_sha256: str = ""
    compilations: int = 0
    # of metrics.jsonl, that may not be on disk yet: rank 0 may have died with them
    lines: tuple[dict[str, Any], ...] = ()
    mesh: Axes = (0, 1, 1, 1)
    coordinate: int = 0
    # of a sharded optimizer: the ranges of blocks, of `blocks`, whose slots it has, own and twin's in turn
    held: tuple[tuple[int, int], ...] = ()
    blocks: int = 0
    torn: bool = False  # only what it keeps, of the parameters, is of `committed`
    # of `buckets` of the tables (0: there are none) those that it owns, and those that it keeps as a twin, as bits in
    # hexadecimal digits
    buckets: int = 0
    owned: str = ""
    twins: str = ""
    stale: str = ""  # of both, those that got no sums of the step that it `holds`: its commit lets them go


@dataclass(frozen=True)
class Progress:
    """Where a worker is. `inside` counts collectives entered in this generation; `waiting`: it is inside one now."""

    worker: str
    generation: int
    step: int
    phase: str
    inside: int
    waiting: bool
    detail: int = 0  # shard or batch within the phase: shows that a long phase moves


@dataclass(frozen=True)
class Line:
    """A line for metrics.jsonl or events.jsonl, with the generation that it comes from."""

    generation: int
    file: str  # "metrics" | "events"
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Save:
    """An order to write a checkpoint: one rank's share of it. The controller gives it to survivors where too few are
    left to go on."""

    generation: int
    step: int
    rank: int = 0
    world_size: int = 1
    wait: bool = False  # until it is durable
    fault: str = ""  # that the file system is to have
    ballot: Ballot | None = None  # of `step`, for who holds its gradients and has not applied them


@dataclass(frozen=True)
class Abort:
    """An order to leave a generation's collectives and stand by."""

    worker: str
    generation: int


@dataclass(frozen=True)
class RequestStop:
    """An order to leave a generation together with all others, after a vote. `code`: STOP or STOP_AND_SAVE."""

    worker: str
    generation: int
    code: int


Order = Generation | Save | Abort | RequestStop


@dataclass(frozen=True)
class Part:
    """A rank's part of a checkpoint is written and synced, or `error` says why not. All parts of one make the
    controller commit it."""

    worker: str
    generation: int
    step: int
    file: str  # its entry in the manifest, as JSON
    stall_s: float
    seconds: float
    rank: int = 0
    world_size: int = 1
    head: str = ""  # rank 0's: the manifest without its files
    error: str = ""
    tables: str = "[]"  # the entries of its files of tables, a JSON list


@dataclass(frozen=True)
class Moved:
    """Rank 0's word that all moves of a generation are done: every member has the buckets that it is to hold."""

    worker: str
    generation: int
    step: int
    buckets: int
    bytes: int
    seconds: float  # at its `steps` boundaries together
    steps: int


@dataclass(frozen=True)
class Job:
    """What every worker of a run gets when it starts."""

    run_id: str
    recipe: str  # TOML, resolved
    info: dict[str, Any]  # what the data's door found out: vocabulary, files
    run_dir: str
    checkpoints: str  # path or URI
    sys_path: tuple[str, ...] = ()
    chaos: tuple[str, ...] = ()
    num_steps: int = 0
    is_local: bool = False  # on a Ray of this machine alone: nobody elsewhere is to reach its workers
    notes: tuple[tuple[str, str], ...] = ()  # (event, why): what was found before the start and is to be known
    # what members show to each other; the controller's journal has it, and nothing else on disk
    secret: str = field(default="", repr=False)


@dataclass(frozen=True)
class Begin:
    """What a run's directory holds when it is resumed; the defaults are a new run's."""

    written: int = 0  # steps whose lines stay
    evaluated: int = 0
    generation: int = 0  # the last one
    events: int = 0  # lines of events.jsonl
    rewound_from: int = -1  # the last step there was
    data: str = ""  # key of the data that it trained on
