"""How many workers train on which mesh, when a lost one is started again and where, and when a run gives up: numbers in, decisions out.

No cluster, no clock: time is an argument.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from elastic.recipe import Recipe

# before the n-th start after failures without a step between them
BACKOFF_S = (0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
MAX_FRUITLESS = 8  # starts in a row that failed without a single committed step between them
MAX_UNSAVED = 2  # generations beyond the first that may fail to save what an interrupt asks for
MAX_SAME_ERROR = 3  # starts in a row that ended in the same error: the next would as well
# of the time that a node has to drain, 30 s by Ray's default, in which its workers hand over their rows beside the training
HAND_OVER_S = 10.0
# replicas that a group with twins is made smaller by one after the other, each a pause; by more, it goes by a checkpoint
ONE_BY_ONE = 8
# a node that loses this many workers in the window is left out
NODE_LOSSES, NODE_WINDOW_S, NODE_BAN_S = 3, 120.0, 600.0


Degrees = tuple[int, int, int]  # pipeline, tensor, expert


@dataclass(frozen=True)
class Bounds:
    """What the recipe allows."""

    min_workers: int
    max_workers: int
    logical_shards: int
    spares: int = 0
    meshes: tuple[Degrees, ...] = ((1, 1, 1),)  # of a replica, the preferred ones first
    holders: int = 0  # of each block of a sharded optimizer's state: 2 with a twin; 0: everybody keeps all


def bounds_of(recipe: Recipe) -> Bounds:
    """A recipe's bounds. Where its mesh cannot be filled, one of fewer workers in a replica serves, if there are
    min_workers for it."""
    elastic, mesh = recipe.elastic, recipe.mesh
    return Bounds(elastic.min_workers, elastic.max_workers, elastic.logical_shards, elastic.spares,
                  legal((mesh.pipeline, mesh.tensor, mesh.expert)),
                  (1 + recipe.optimizer.twin) * recipe.optimizer.sharded)


def choose(available: int, target: int, bounds: Bounds) -> tuple[int, int, int, int] | None:
    """The mesh (data, pipeline, tensor, expert) to train on: as many whole replicas of the first degrees that fit at
    all; None if too few.

    No replica that would not lower ceil(L / replicas) is used.
    """
    for degrees in bounds.meshes:
        size = math.prod(degrees)
        least = max(1, -(-bounds.min_workers // size))
        most = min(min(available, target, bounds.max_workers) // size, bounds.logical_shards)
        if most >= least:
            slowest = -(-bounds.logical_shards // most)
            return max(least, -(-bounds.logical_shards // slowest)), *degrees
    return None


def world_size(available: int, target: int, bounds: Bounds) -> int:
    """How many of the available workers to use; 0 if too few."""
    mesh = choose(available, target, bounds)
    return math.prod(mesh) if mesh else 0


def wanted(bounds: Bounds, target: int, leaving: int = 0) -> int:
    """Worker processes to have: a group, its spares, and a replacement for everyone who is about to leave."""
    return max(1, world_size(target, target, bounds)) + bounds.spares + leaving


def fewest(bounds: Bounds) -> int:
    """Workers without which nothing can be trained."""
    least = [(max(1, -(-bounds.min_workers // size)), size) for size in map(math.prod, bounds.meshes)]
    return min((n * size for n, size in least if n <= bounds.logical_shards), default=bounds.min_workers)


def legal(degrees: Degrees) -> tuple[Degrees, ...]:
    """The recipe's degrees, then those to fall back to while a replica is not complete: what divides them, the largest
    replica first."""
    pipelines, tensors, experts = ([n for n in range(1, degree + 1) if degree % n == 0] for degree in degrees)
    return tuple(sorted(itertools.product(pipelines, tensors, experts),
                        key=lambda mesh: (-math.prod(mesh), tuple(-n for n in mesh))))


@dataclass(frozen=True)
class Losses:
    """What went wrong so far, by cause and by node."""

    fruitless: int = 0  # failures since the last committed step
    committed: int = 0
    unborn: int = 0  # starts in a row that never got ready
    error: str = ""  # what the last start raised, if it never got ready
    same_error: int = 0  # how many in a row raised just that
    by_node: tuple[tuple[str, float], ...] = ()


def note_loss(losses: Losses, node: str, committed: int, now_s: float, was_ready: bool = True,
              error: str = "") -> Losses:
    """Counts one lost worker; `error` is what it raised, if it did. Progress since the last loss clears the counts of
    failures without any; a worker that gets ready clears `unborn`.
    """
    fruitless = 1 if committed > losses.committed else losses.fruitless + 1
    error = "" if was_ready else error
    same = losses.same_error + 1 if error == losses.error and fruitless > 1 else 1
    recent = tuple((n, t) for n, t in losses.by_node if now_s - t < NODE_BAN_S)
    unborn = losses.unborn + (not was_ready)
    return replace(losses, fruitless=fruitless, unborn=unborn, error=error, same_error=same if error else 0,
                   committed=max(committed, losses.committed), by_node=(*recent, (node, now_s)))


def gives_up(losses: Losses, members: int) -> bool:
    """Too many losses without a step between them (every member may fall once at the same moment), or one error again
    and again."""
    return losses.fruitless >= MAX_FRUITLESS + members or losses.same_error >= MAX_SAME_ERROR


def restart_delay_s(losses: Losses) -> float:
    return BACKOFF_S[min(max(losses.fruitless, losses.unborn), len(BACKOFF_S) - 1)]


def banned_nodes(losses: Losses, now_s: float, nodes: Sequence[str]) -> tuple[str, ...]:
    """Nodes that lost too many workers lately; never all of them."""
    times: dict[str, list[float]] = {}
    for node, time in losses.by_node:
        times.setdefault(node, []).append(time)
    banned = tuple(node for node, t in times.items() if node and now_s - t[-1] < NODE_BAN_S
                   and sum(t[-1] - one < NODE_WINDOW_S for one in t) >= NODE_LOSSES)
    return banned if set(nodes) - set(banned) else ()
