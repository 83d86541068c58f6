"""What the controller knows of its workers: one record each, from the start of a process to long after its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from elastic.controller.events import Lost, Starting
from elastic.controller.failure_detector import Heartbeat
from elastic.messages import Ready


@dataclass
class WorkerRecord:
    """One worker. `starting_s` and `heartbeat` go by this controller's clock; the journal has all the rest."""

    node: str = ""
    starting_s: float | None = None  # since when; None: it is ready, or gone
    ready: Ready | None = None  # its report, which stays when it is gone
    heartbeat: Heartbeat | None = None
    released: bool = False  # let go: what it still reports counts, but it is in no group
    given_up: bool = False  # fenced: nothing that it reports counts
    lost: bool = False  # its end is known, and it is given up
    stopped_as: int = -1  # the rank that a fault has stopped

    def kept(self, is_member: bool) -> WorkerRecord:
        """What a journal keeps: of one that is gone, and that nobody asks for any more, that it was there."""
        ready = self.ready if is_member or self.is_live or self.stopped_as >= 0 else None
        return replace(self, starting_s=None, heartbeat=None, ready=ready)

    @property
    def is_live(self) -> bool:
        """Whether it may be in a group."""
        return self.ready is not None and not self.released and not self.lost


class Workers(defaultdict[str, WorkerRecord]):
    """The records by name. The controller's thread alone changes them; `is_given_up` may be asked from any."""

    def __init__(self) -> None:
        super().__init__(WorkerRecord)

    def is_given_up(self, worker: str) -> bool:
        return worker in self and self[worker].given_up

    def note(self, event: Any) -> None:
        """What an event says of a worker, as it comes or as the journal has it."""
        if isinstance(event, Starting):
            self[event.worker].node = event.node
        elif isinstance(event, Ready):
            self[event.worker].node, self[event.worker].ready = event.node, event
        elif isinstance(event, Lost):
            self[event.worker].given_up = self[event.worker].lost = True

    def live(self) -> list[Ready]:
        return [record.ready for record in self.values() if record.ready is not None and record.is_live]

    def reports(self, names: Iterable[str]) -> list[Ready]:
        """Of workers that have been ready."""
        return [ready for name in names if (ready := self[name].ready) is not None]

    def stop(self, worker: str, rank: int) -> None:
        """A fault has stopped it; whoever was stopped at this rank before is continued no more."""
        for record in self.values():
            record.stopped_as = -1 if record.stopped_as == rank else record.stopped_as
        self[worker].stopped_as = rank

    def stopped(self, rank: int) -> Ready | None:
        return next((record.ready for record in self.values() if record.stopped_as == rank), None)
