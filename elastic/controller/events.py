"""What the state machine takes and what it orders: its events, beside `Ready` and `Standing`; its actions, beside `Abort` and `RequestStop`."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.controller.policy import Degrees
from elastic.messages import Axes, Ballot, Generation, Standing


# Events beside `Ready` and `Standing`.
@dataclass(frozen=True)
class Starting:
    """A worker process is being started: a place for it was found."""

    worker: str
    node: str = ""


@dataclass(frozen=True)
class Lost:
    """A worker's process is gone, or it was given up. `raised`: by an error of its own code, which is then the cause.
    """

    worker: str
    cause: str
    raised: bool = False


@dataclass(frozen=True)
class ScaleTo:
    """So many workers are to train, on a mesh of these degrees where they are given and make up a replica."""

    workers: int
    degrees: Degrees | None = None


@dataclass(frozen=True)
class Drain:
    """These nodes will go away: their workers leave at the next step boundary."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Hurry:
    """Who leaves a drained node has no time left to hand over its buckets beside the training."""


@dataclass(frozen=True)
class Interrupt:
    """Checkpoint at the next step boundary, then end."""


@dataclass(frozen=True)
class GiveUp:
    """It is no use, says a policy or the driver: the state is saved, and the run ends."""

    error: str
    status: str = "failed"


# Actions beside `Abort` and `RequestStop`.
@dataclass(frozen=True)
class Want:
    """Keep this many worker processes alive or asked for."""

    workers: int


@dataclass(frozen=True)
class Form:
    """Start this generation; the carrier fills in what only it knows (transport, what is on disk)."""

    generation: Generation
    cause: str
    before: int  # world size of the generation before
    was: Axes = (0, 1, 1, 1)  # its mesh


@dataclass(frozen=True)
class Release:
    worker: str


@dataclass(frozen=True)
class Wait:
    """Too few workers: the survivors stay warm."""

    ready: int
    needed: int


@dataclass(frozen=True)
class SaveAlone:
    """This worker is to write down what it has, if no checkpoint has it: the run cannot go on without others.

    It writes the part of `rank` of `world_size`, each of which is asked of somebody, several of one where the others
    are lost. With a `ballot` it holds the gradients of `step`, and applies them first.
    """

    worker: str
    generation: int
    step: int
    rank: int = 0
    world_size: int = 1
    ballot: Ballot | None = None


@dataclass(frozen=True)
class Finish:
    status: str  # "done" | "failed" | "interrupted"
    error: str = ""
    standing: Standing | None = None


def done(reports: list[Standing]) -> Finish:
    """All replicas must hold the same bits; anything else is a fault that no result should hide."""
    if len({s.state_sha256 for s in reports}) > 1:
        return Finish("failed", "The workers' states differ at the end: "
                      + ", ".join(f"{s.worker} {s.state_sha256[:12]}" for s in reports))
    return Finish("done", standing=reports[0])
