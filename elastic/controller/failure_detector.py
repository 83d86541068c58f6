"""Which workers count as dead or hung, by their heartbeats alone. No clock: time is an argument.

Whose process or node dies is known at once, from Ray (`ray_fleet`); here are those who only fall silent or hold the
others up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elastic.messages import Progress

SLOW_PHASES = ("start", "checkpoint", "restore")  # a first compile, a large state on a slow disk


@dataclass(frozen=True)
class Heartbeat:
    """The last report of one worker, and when its content last changed."""

    progress: Progress
    changed_s: float
    received_s: float

    def followed(self, progress: Progress, now_s: float) -> Heartbeat:
        return Heartbeat(progress, self.changed_s if progress == self.progress else now_s, now_s)


def suspects(beats: Mapping[str, Heartbeat], now_s: float, timeout_s: float, start_timeout_s: float) -> tuple[str, ...]:
    """Who holds the group up: nobody has moved for `timeout_s`, and these are in no collective while others wait in
    one.

    Where all wait, it is the one that entered the fewest: one alone, for the members of a replica enter different ones,
    and a count that is behind may be as it should be. A worker that compiles or waits for a disk has `start_timeout_s`.
    A worker that is silent at all is always suspect.
    """
    silent = tuple(w for w, beat in beats.items() if now_s - beat.received_s > timeout_s)
    if silent:
        return silent
    stuck = bool(beats) and all(
        now_s - beat.changed_s > (start_timeout_s if beat.progress.phase in SLOW_PHASES else timeout_s)
        for beat in beats.values())
    if not stuck:
        return ()
    outside = tuple(w for w, beat in beats.items() if not beat.progress.waiting)
    if outside:
        return outside if len(outside) < len(beats) or len(beats) == 1 else ()
    entered = {w: beat.progress.inside for w, beat in beats.items()}
    last = min(entered, key=lambda w: entered[w])
    return (last,) if entered[last] < max(entered.values()) else ()
