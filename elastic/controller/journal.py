"""The controller's journal: what the state machine took and what was made public, on disk before anything follows from it.

The machine is a pure function of its events, so a controller that takes over a live run replays them and knows all that
its predecessor knew. Each line is one record: {"event": ...}, {"published": ...} or {"spent": a fault that has fired}.
What has grown long is replaced by what it comes to: {"past": ...}, of which a replay goes on.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from elastic import chaos, messages
from elastic.controller import membership as m
from elastic.controller.persistent_map import PersistentMap
from elastic.controller.policy import Bounds
from elastic.controller.workers import WorkerRecord, Workers
from elastic.messages import Generation, Ready, Standing
from elastic.observe.jsonl import JsonLines, read_lines

KINDS: dict[str, Callable[..., Any]] = {kind.__name__: kind for kind in (WorkerRecord, PersistentMap, frozenset)}
KINDS |= {kind.__name__: kind for module in (messages, m) for kind in vars(module).values() if isinstance(kind, type)
          and is_dataclass(kind)}
KIND, OF = "@", "of"  # the keys that name a dataclass or another kind, and of the latter what is in it
JOURNAL = "journal.jsonl"  # in the run directory
COMPACT_BYTES = 1 << 20  # a journal is worth replacing once it has grown by so much, and to twice of what it would be


def encode(value: Any) -> Any:
    """A message as JSON values; `decode` gives an equal one back. What is as it is by default is left out."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if is_dataclass(value):
        return {KIND: type(value).__name__} | {f.name: encode(found) for f in fields(value)
                                               if (found := getattr(value, f.name)) != f.default}
    if isinstance(value, PersistentMap):
        return {KIND: "PersistentMap", OF: {name: encode(inner) for name, inner in value.items()}}
    if isinstance(value, frozenset):
        return {KIND: "frozenset", OF: sorted(value)}
    if isinstance(value, Mapping):
        return {name: encode(inner) for name, inner in value.items()}
    return [encode(inner) for inner in value]


def decode(value: Any) -> Any:
    """Sequences come back as tuples, as all messages have them."""
    if isinstance(value, Mapping):
        found = {name: decode(inner) for name, inner in value.items()}
        if KIND not in found:
            return found
        kind = KINDS[found.pop(KIND)]
        return kind(found[OF]) if OF in found else kind(**found)
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
        self.head = {"run_id": run_id, "secret": self.secret}
        if not self.is_continued:
            path.unlink(missing_ok=True)
        self.lines = JsonLines(path, mode=0o600)
        self.compact_at = COMPACT_BYTES  # how long it may become
        if not self.is_continued:
            self.append(self.head)
            self.sync()

    def append(self, record: Mapping[str, Any]) -> None:
        self.lines.append(record)

    def event(self, event: Any) -> None:
        self.append({"event": encode(event)})

    def published(self, generation: Generation) -> None:
        self.append({"published": encode(generation)})
        self.sync()

    def spent(self, spec: str, stopped: Ready | None = None) -> None:
        """A fault has fired; `stopped`: whom it has stopped, for the one that is to continue it."""
        self.append({"spent": spec, "stopped": encode(stopped)})
        self.sync()

    def compact(self, past: Past) -> None:
        """Replaces all records by `past`, which they come to, once they have become long: the old ones are there until the
        new one is whole. On a full disk nothing changes, and the next try comes later."""
        size = self.lines.size
        if size < self.compact_at:
            return
        with contextlib.suppress(OSError):
            self.lines.replace([self.head, {"past": past.encoded()}])
        self.compact_at = max(2 * self.lines.size, self.lines.size + COMPACT_BYTES)

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

    def take(self, event: Any) -> tuple[Any, ...]:
        """What the machine has to say to an event, as it comes or as the journal has it."""
        self.workers.note(event)
        self.state, actions = m.advance(self.state, event)
        if isinstance(event, Standing) and event.rejected:
            self.refused.append(event.rejected)
        for action in actions:
            if isinstance(action, m.Form):
                self.actions = [a for a in self.actions if isinstance(a, m.Want)][-1:]
            if isinstance(action, m.Want):  # the newest is what counts
                self.actions = [a for a in self.actions if not isinstance(a, m.Want)]
            if isinstance(action, m.Release):
                self.workers[action.worker].released = True
            self.actions.append(action)
        return actions

    def encoded(self) -> dict[str, Any]:
        """As a record; `decoded` gives the same back, but for clocks."""
        members = set(self.state.group)
        return {"state": encode(self.state), "actions": encode(self.actions), "published": encode(self.published),
                "workers": {name: encode(record.kept(name in members)) for name, record in self.workers.items()},
                "spent": sorted(self.spent), "refused": self.refused}

    @classmethod
    def decoded(cls, record: Mapping[str, Any]) -> Past:
        found = decode(record)
        workers = Workers()
        workers.update(found["workers"])
        return cls(found["state"], list(found["actions"]), workers, found["published"], set(found["spent"]),
                   list(found["refused"]))


def replay(records: Sequence[Mapping[str, Any]], bounds: Bounds, generation: int) -> Past:
    """The machine's state after all events of a journal, from where the run began."""
    state, actions = m.begin(bounds, generation)
    past = Past(state, list(actions))
    for record in records:
        if "past" in record:
            past = Past.decoded(record["past"])
        elif "published" in record:
            past.published = decode(record["published"])
        elif "spent" in record:
            past.spent.add(record["spent"])
            if stopped := decode(record["stopped"]):
                past.workers.stop(stopped.worker, chaos.parse(record["spent"]).number)
        else:
            past.take(decode(record["event"]))
    return past
