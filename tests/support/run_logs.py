"""The logs of a run whose events are held against their table."""

from __future__ import annotations

from typing import Any

from elastic.controller.run_log import RunLog
from elastic.observe.event_kinds import EVENTS, EVERYWHERE


def mismatch(event: dict[str, Any]) -> str:
    """What an event has that the table does not, or the other way round; "" where they agree."""
    if event["event"] not in EVENTS:
        return f"event {event['event']}: unknown"
    told = EVENTS[event["event"]].fields.split()
    needed = EVERYWHERE | {name for name in told if not name.endswith("?")}
    lacks, strange = sorted(needed - event.keys()), sorted(event.keys() - needed - {name.rstrip("?") for name in told})
    return f"event {event['event']}: lacks {lacks}, has {strange} beside its fields" if lacks or strange else ""


class CheckedRunLog(RunLog):
    """Every event is one of the table's, with its fields."""

    def event(self, name: str, step: int | None = None, generation: int | None = None, **fields: Any) -> None:
        if found := mismatch({"time": 0.0, "event": name, "generation": 0, "step": 0, **fields}):
            raise AssertionError(found)
        super().event(name, step, generation, **fields)
