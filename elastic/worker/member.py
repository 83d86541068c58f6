"""One member of the group as its training loop knows it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from elastic.collective.group import CollectiveGroup
from elastic.messages import Generation, Line, Save
from elastic.worker.loop_control import Control
from elastic.worker.training import Held, Placement, Training

MAX_LINES = 50_000  # that a manifest carries; those before are on the disk itself long since


class Member:
    """It outlives generations. This much trains without checkpoints on the coordinate that it has; `elastic.worker.worker.Worker` does the rest.

    `post` sends a message to the controller, in order, and returns at once.
    """

    def __init__(self, training: Training, place: Placement, control: Control, post: Callable[[Any], None]):
        self.training, self.place, self.control, self.post = training, place, control, post
        self.held = Held()
        self.evaluation: dict[str, float] = {}  # the last one
        self.unwritten: deque[dict[str, Any]] = deque()  # lines of metrics.jsonl that may not be on disk
        self.unsaved: deque[dict[str, Any]] = deque(maxlen=MAX_LINES)  # those since the newest checkpoint known to be committed

    def settle(self, generation: Generation, group: CollectiveGroup) -> None:
        """Takes the coordinate that the generation gives it, and loads the checkpoint that it names, if any, all members together."""

    def save(self, order: Save) -> None:
        """Writes this member's share of a checkpoint."""

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
