"""Scaling and failure policies: numbers in, decisions out. No cluster, no clock: time is an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

BACKOFF_S = (0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before the n-th start after failures without a step between them
MAX_FRUITLESS = 8  # starts in a row that failed without a single committed step between them
MAX_SAME_ERROR = 3  # starts in a row that ended in the same error: the next would as well
NODE_LOSSES, NODE_WINDOW_S, NODE_BAN_S = 3, 120.0, 600.0  # a node that loses this many workers in the window is left out


@dataclass(frozen=True)
class Bounds:
    """What the recipe allows."""

    min_workers: int
    max_workers: int
    logical_shards: int
    spares: int = 0


def world_size(available: int, target: int, bounds: Bounds) -> int:
    """How many of the available workers to use; 0 if too few. No worker that would not lower ceil(L / W) is used."""
    most = min(available, target, bounds.max_workers, bounds.logical_shards)
    if most < bounds.min_workers:
        return 0
    slowest = -(-bounds.logical_shards // most)
    return max(bounds.min_workers, -(-bounds.logical_shards // slowest))


@dataclass(frozen=True)
class Losses:
    """What went wrong so far, by cause and by node."""

    fruitless: int = 0  # failures since the last committed step
    committed: int = 0
    unborn: int = 0  # starts in a row that never got ready
    error: str = ""  # what the last start raised, if it never got ready
    same_error: int = 0  # how many in a row raised just that
    by_node: tuple[tuple[str, float], ...] = ()


def note_loss(losses: Losses, node: str, committed: int, now_s: float, was_ready: bool = True, error: str = "") -> Losses:
    """Counts one lost worker; `error` is what it raised, if it did. Progress since the last loss clears the counts of failures
    without any; a worker that gets ready clears `unborn`.
    """
    fruitless = 1 if committed > losses.committed else losses.fruitless + 1
    error = "" if was_ready else error
    same = losses.same_error + 1 if error == losses.error and fruitless > 1 else 1
    recent = tuple((n, t) for n, t in losses.by_node if now_s - t < NODE_BAN_S)
    unborn = losses.unborn + (not was_ready)
    return replace(losses, fruitless=fruitless, unborn=unborn, error=error, same_error=same if error else 0,
                   committed=max(committed, losses.committed), by_node=(*recent, (node, now_s)))


def gives_up(losses: Losses, members: int) -> bool:
    """Too many losses without a step between them (every member may fall once at the same moment), or one error again and again."""
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


SLOW_PHASES = ("start", "checkpoint", "restore")  # a first compile, a large state on a slow disk


@dataclass(frozen=True)
class Pulse:
    """The last word of one worker and when its content last changed."""

    step: int
    phase: str
    inside: int
    waiting: bool
    changed_s: float
    heard_s: float
    detail: int = 0


def suspects(pulses: Mapping[str, Pulse], now_s: float, timeout_s: float, start_timeout_s: float) -> tuple[str, ...]:
    """Who holds the group up: nobody has moved for `timeout_s`, and these have not entered the collective the others wait in.

    A worker that compiles or waits for a disk has `start_timeout_s`. A worker that is not heard of at all is always suspect.
    """
    silent = tuple(w for w, p in pulses.items() if now_s - p.heard_s > timeout_s)
    if silent:
        return silent
    stuck = bool(pulses) and all(
        now_s - p.changed_s > (start_timeout_s if p.phase in SLOW_PHASES else timeout_s) for p in pulses.values())
    if not stuck:
        return ()
    furthest = max(p.inside for p in pulses.values())
    late = tuple(w for w, p in pulses.items() if not p.waiting or p.inside < furthest)
    return late if len(late) < len(pulses) or len(pulses) == 1 else ()
