"""What the controller asks of whoever starts and ends the workers' processes: `RayFleet` has them on Ray, `ThreadFleet` as threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from elastic.chaos import Fault
from elastic.messages import Order, Ready


class Fleet(Protocol):
    """The workers' processes. Calls return at once; what comes of them arrives as events."""

    def want(self, workers: int, avoid: Sequence[str], near: Sequence[str] = ()) -> None:
        """Keep this many workers alive or asked for, none of them on a node of `avoid`; the first new ones on those of
        `near`, if there is room."""

    def send(self, worker: str, order: Order) -> None: ...

    def release(self, worker: str) -> None:
        """Let it go; its end is no loss."""

    def kill(self, worker: str) -> None:
        """Give it up: from now on nothing that it reports counts."""

    def transport(self, ready: Sequence[Ready]) -> str:
        """Which collective group serves these members best."""

    def inject(self, fault: Fault, stopped: Ready | None = None) -> None:
        """Carries out a fault that is not a worker's own: it continues who was `stopped`, or ends the controller
        itself, at once."""

    def adopt(self, known: Iterable[str]) -> Sequence[str]:
        """Takes charge of the workers that an earlier controller of this run has left alive, and returns their names.

        `known` are all names that there ever were: none is given again. The end of each of them is an event from now
        on.
        """

    def resync(self, worker: str) -> None:
        """Have it report again what only a controller's memory held."""

    def close(self) -> None:
        """Ends every worker and waits for it."""
