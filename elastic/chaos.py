"""The fault injector behind --chaos: faults that fire once, at a named step and phase.

    kill:RANK@STEP[/PHASE]   SIGKILL of that rank's process        stop:RANK@STEP[/PHASE]   SIGSTOP
    node:RANK@STEP           its node dies                         cont:RANK@STEP           SIGCONT of the rank stopped
    before scale:N@STEP             a request to scale to N workers       corrupt@STEP             flips a byte of the
    newest checkpoint controller@STEP          SIGKILL of the controller disk:RANK@STEP/HOW       the next checkpoint of
    that rank meets an error, a short write, a full disk, a delay or a crash

A fault fires at the first chance at or after its step. It is announced to the controller before it fires, so that it
fires once however often the step is redone and whoever has the rank by then.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.errors import RecipeError

PHASES = ("rows", "forward", "backward", "reduction", "push", "vote", "update", "gather", "heal", "move", "checkpoint")
SELF = ("kill", "stop", "node")  # a worker does these to itself; rank 0 asks the controller for the others
DISK = ("error", "short", "full", "delay", "crash")  # what a file system can do
PATTERN = re.compile(r"(?:(kill|stop|cont|node|scale|disk):(\d+)|(controller|corrupt))@(\d+)(?:/([a-z]+))?")


@dataclass(frozen=True)
class Fault:
    """One fault: `number` is a rank, or the workers wanted for scale."""

    kind: str
    number: int
    step: int
    phase: str
    spec: str


def parse(spec: str) -> Fault:
    """A fault from its text; `RecipeError` in one sentence if it is none."""
    match = PATTERN.fullmatch(spec)
    if not match:
        raise RecipeError(f"--chaos {spec!r} is no fault; write kill:RANK@STEP[/PHASE], stop:RANK@STEP, "
                          "cont:RANK@STEP, node:RANK@STEP, scale:N@STEP, controller@STEP, corrupt@STEP or "
                          f"disk:RANK@STEP/{'|'.join(DISK)}.")
    kind, phase = match[1] or match[3], match[5] or "forward"
    if kind == "disk":
        if phase not in DISK:
            raise RecipeError(f"--chaos {spec!r}: a disk's fault is one of {', '.join(DISK)}; write "
                              f"disk:{match[2]}@{match[4]}/{DISK[0]}.")
    elif phase not in PHASES or (match[5] and kind not in SELF):
        raise RecipeError(f"--chaos {spec!r}: the phase of a kill or stop is one of {', '.join(PHASES)}; other faults "
                          "have none.")
    return Fault(kind, int(match[2] or 0), int(match[4]), phase, spec)


class Injector:
    """The faults of one rank in one generation. `announce(spec)` returns once the controller knows; `strike(fault)`
    does it.

    `cut_short(fault, group)` gives a group in whose next collective the fault strikes, when some peers may have
    received and others have not.
    """

    def __init__(self, specs: Sequence[str], rank: int, announce: Callable[[str], None],
                 strike: Callable[[Fault], None],
                 cut_short: Callable[[Fault, Any], Any]):
        faults = [parse(spec) for spec in specs]
        self.pending = [f for f in faults if (f.number == rank if f.kind in (*SELF, "disk") else rank == 0)]
        self.announce, self.strike, self._cut_short = announce, strike, cut_short

    def at(self, step: int, phase: str) -> None:
        """Fires what is due."""
        for fault in self._due(step, lambda fault: fault.phase == phase):
            if fault.kind in SELF:
                self.strike(fault)

    def disk(self, step: int) -> str:
        """What the file system is to do to the checkpoint of this step; "" for nothing."""
        return next((fault.phase for fault in self._due(step, lambda fault: fault.kind == "disk")), "")

    def cut(self, group: Any, step: int, phase: str) -> Any:
        """The group to use for this phase's collective: the same one, unless a kill or stop is due within it."""
        due = self._due(step, lambda fault: fault.phase == phase and fault.kind in SELF)
        return next((self._cut_short(fault, group) for fault in due), group)

    def _due(self, step: int, is_meant: Callable[[Fault], bool]) -> Iterator[Fault]:
        """Each is announced when it is asked for, and never comes again."""
        for fault in [fault for fault in self.pending if fault.step <= step and is_meant(fault)]:
            self.pending.remove(fault)
            self.announce(fault.spec)
            yield fault


def strike_process(fault: Fault) -> None:
    """The real thing: SIGKILL, SIGSTOP, or SIGKILL of the node's raylet (every Ray worker's parent)."""
    if fault.kind == "node":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGSTOP if fault.kind == "stop" else signal.SIGKILL)
