"""The controller's journal: what the state machine took and what was made public, on disk before anything follows from it.

The machine is a pure function of its events, so a controller that takes over a live run replays them and knows all that
its predecessor knew. Each line is one record: {"event": ...}, {"published": ...} or {"spent": a fault that has fired}.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from elastic import chaos, messages
from elastic.controller import membership as m
from elastic.controller.policy import Bounds
from elastic.controller.workers import Workers
from elastic.messages import Generation, Ready, Standing
from elastic.observe.jsonl import JsonLines, read_lines

KINDS = {kind.__name__: kind for module in (messages, m) for kind in vars(module).values() if isinstance(kind, type)
         and is_dataclass(kind)}
KIND = "@"  # the key that names a dataclass


def encode(value: Any) -> Any:
    """A message as JSON values; `decode` gives an equal one back."""
    if is_dataclass(value):
        return {KIND: type(value).__name__} | {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: encode(inner) for name, inner in value.items()}
    return [encode(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def decode(value: Any) -> Any:
    """Sequences come back as tuples, as all messages have them."""
    if isinstance(value, Mapping):
        found = {name: decode(inner) for name, inner in value.items()}
        return KINDS[found.pop(KIND)](**found) if KIND in found else found
    return tuple(decode(inner) for inner in value) if isinstance(value, list) else value


class Journal:
    """The journal of one controller actor, through all its restarts; another run's is replaced.

    `past` is what an earlier controller of this run wrote; `is_continued` says that there was one, which may have
    written nothing.
    `secret` is what the run's workers show to each other: only the run's owner may read the file.
    """

    def __init__(self, path: Path, run_id: str):
        found = read_lines(path)
        self.is_continued = bool(found) and found[0].get("run_id") == run_id
        self.past = found[1:] if self.is_continued else []
        self.secret = found[0].get("secret", "") if self.is_continued else secrets.token_hex(32)
        if not self.is_continued:
            path.unlink(missing_ok=True)
        self.lines = JsonLines(path, mode=0o600)
        if not self.is_continued:
            self.append({"run_id": run_id, "secret": self.secret})
            self.sync()

    def append(self, record: Mapping[str, Any]) -> None:
        self.lines.append(record)

    def event(self, event: Any) -> None:
        """Metric lines are left out: they are in metrics.jsonl by now."""
        self.append({"event": encode(replace(event, lines=()) if isinstance(event, Standing) else event)})

    def published(self, generation: Generation) -> None:
        self.append({"published": encode(generation)})
        self.sync()

    def spent(self, spec: str, stopped: Ready | None = None) -> None:
        """A fault has fired; `stopped`: whom it has stopped, for the one that is to continue it."""
        self.append({"spent": spec, "stopped": encode(stopped)})
        self.sync()

    def sync(self) -> None:
        """While the disk is full its lines wait: a controller that falls meanwhile has no successor, and the run ends
        instead."""
        if self.lines.retry():
            self.lines.sync()


@dataclass
class Past:
    """What a journal says; at a run's start, what there is to begin with."""

    state: m.State
    actions: list[Any]  # since the last group was formed, that included: some of them may not have been carried out
    workers: Workers = field(default_factory=Workers)  # all that there ever were
    published: Generation | None = None
    spent: set[str] = field(default_factory=set)  # faults that have fired
    refused: list[str] = field(default_factory=list)  # checkpoints that turned out bad


def replay(records: Sequence[Mapping[str, Any]], bounds: Bounds, generation: int) -> Past:
    """The machine's state after all events of a journal, from where the run began."""
    state, actions = m.begin(bounds, generation)
    past = Past(state, list(actions))
    for record in records:
        if "published" in record:
            past.published = decode(record["published"])
        elif "spent" in record:
            past.spent.add(record["spent"])
            if stopped := decode(record["stopped"]):
                past.workers.stop(stopped.worker, chaos.parse(record["spent"]).number)
        else:
            take(past, decode(record["event"]))
    return past


def take(past: Past, event: Any) -> None:
    past.state, actions = m.advance(past.state, event)
    past.workers.note(event)
    if isinstance(event, Standing) and event.rejected:
        past.refused.append(event.rejected)
    for action in actions:
        if isinstance(action, m.Form):
            past.actions = [a for a in past.actions if isinstance(a, m.Want)][-1:]
        if isinstance(action, m.Release):
            past.workers[action.worker].released = True
        past.actions.append(action)
