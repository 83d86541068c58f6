"""The controller's side of checkpoints: it alone makes them count, chooses among them and clears away."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elastic.checkpoint.claim import Claim
from elastic.checkpoint.manager import (
    MANIFEST,
    check_sizes,
    clean,
    commit,
    folder_of,
    newest_good,
    prune,
    read_manifest,
)
from elastic.checkpoint.manifest import Manifest, build_file, build_table, check_tables, parse, without
from elastic.checkpoint.part import part_name
from elastic.errors import BadCheckpoint
from elastic.messages import Part
from elastic.storage.remote import join, parted, shown
from elastic.storage.store import Store

log = logging.getLogger(__name__)

NUMBER = re.compile(r"\d+")
Key = tuple[int, int, int]  # generation, step, world size


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint: committed, or not for `error`. Seconds are those of the slowest rank."""

    step: int
    generation: int
    path: str
    bytes: int = 0
    stall_s: float = 0.0
    seconds: float = 0.0
    error: str = ""
    is_lasting: bool = False  # time does not mend it
    is_final: bool = False  # the one before ended for the same reason: so would the next

    @property
    def event(self) -> str:
        return "checkpoint_rejected" if self.error else "checkpoint_committed"

    @property
    def fields(self) -> dict[str, Any]:
        """What the event has."""
        if self.error:
            return {"path": self.path, "reason": self.error}
        return {"path": self.path, "bytes": self.bytes, "stall_s": self.stall_s, "seconds": self.seconds}


def joined(head: Manifest, parts: Sequence[Part]) -> Manifest:
    """The manifest of all parts. A bucket of which several have written the rows, owner and twin, counts once.

    BadCheckpoint where it lacks something.
    """
    found, tables = dict[str, set[int]](), []
    for part in parts:
        for value in json.loads(part.tables):
            entry = build_table(value)
            seen = found.setdefault(entry.table, set())
            tables.append(without(entry, seen))
            seen.update(entry.buckets)
    files = tuple(build_file(json.loads(part.file), head.chunk_bytes) for part in parts)
    manifest = replace(head, files=files, tables=tuple(tables))
    check_tables(manifest)
    return manifest


class Checkpoints:
    """The checkpoints of one run, at a local path or URI."""

    def __init__(self, location: str, keep: int, best: str, newest: int = 0, keep_every: int = 0,
                 best_mode: str = "min"):
        self.best_mode = best_mode
        self.location, self.keep, self.best, self.newest, self.keep_every = location, keep, best, newest, keep_every
        self.store = Store.open(location)
        self.pending: dict[Key, dict[int, Part]] = {}
        self.failed: set[Key] = set()
        self.refused: set[str] = set()  # found bad while they were loaded
        self.known: dict[str, Manifest] = {}  # those there are, by name
        self.error = ""  # why the last one does not count
        self.lasting = ""  # likewise, without its numbers, if time does not mend it
        self.clearing: threading.Thread | None = None
        self.claim: Claim | None = None  # on the place, of the run that commits

    def path(self, name: str) -> str:
        return join(self.location, name)

    def take(self, part: Part, written: int, ready: Callable[[], None] = lambda: None) -> Outcome | None:
        """A rank's part is durable, or failed. What becomes of the checkpoint once that is known; None before, and for
        what is late.

        `written`: steps whose lines are written; a checkpoint beyond them could not be gone on from. `ready()` makes
        them durable.
        """
        key = (part.generation, part.step, part.world_size)
        if part.step <= self.newest:
            return None
        if key in self.failed:
            self.drop(part)
            return None
        parts = self.pending.setdefault(key, {})
        parts[part.rank] = part
        if not part.error and len(parts) < part.world_size:
            return None
        del self.pending[key]
        outcome = self.decide(parts, part, written, ready)
        if outcome.error:
            self.failed.add(key)
            for one in parts.values():
                self.drop(one)
        self.error = outcome.error
        lasting, self.lasting = self.lasting, NUMBER.sub("N", outcome.error) if outcome.is_lasting else ""
        return replace(outcome, is_final=self.lasting != "" and self.lasting == lasting)

    def decide(self, parts: Mapping[int, Part], part: Part, written: int, ready: Callable[[], None]) -> Outcome:
        """All parts are there, or one has failed."""
        path, is_lasting = shown(self.path(folder_of(part.step))), False
        try:
            if part.error:
                raise BadCheckpoint(part.error)
            self.sync_lines(part.step, ready)
            if part.step > written:
                raise BadCheckpoint(f"The steps up to {part.step} are not all on disk.")
            head = parse(parts[0].head)  # rank 0's has what is not an array
            is_lasting = True
            manifest = joined(head, [parts[rank] for rank in sorted(parts)])
            if self.claim is not None:
                self.claim.check()
            self.commit(manifest)
        except (OSError, BadCheckpoint) as error:
            return Outcome(part.step, part.generation, path, error=str(error),
                           is_lasting=is_lasting and isinstance(error, BadCheckpoint))
        return Outcome(part.step, part.generation, path, manifest.bytes, max(p.stall_s for p in parts.values()),
                       max(p.seconds for p in parts.values()))

    def sync_lines(self, step: int, ready: Callable[[], None]) -> None:
        try:
            ready()
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise BadCheckpoint(f"The lines of the steps up to {step} cannot be written to the run directory ({why}), "
                                "and a checkpoint counts with them only; make room there, then resume the run.") from error

    def commit(self, manifest: Manifest) -> None:
        """Commits a manifest whose files are durable. Older checkpoints beyond those to keep go.

        BadCheckpoint where the files are not to be seen from here.
        """
        self.settle()
        try:
            check_sizes(self.store, folder_of(manifest.step), manifest)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{str(error).rstrip('.')} where the controller looks, in {shown(self.location)}; a "
                                "worker has written it, so put the run directory where all nodes share it.") from error
        for base in map(folder_of, manifest.bases):
            if base in self.refused or self.store.size(f"{base}/{MANIFEST}") is None:
                raise BadCheckpoint(f"{folder_of(manifest.step)} builds on {base}, which is not there any more.")
        commit(self.store, manifest)
        self.known[folder_of(manifest.step)] = manifest
        self.newest = max(self.newest, manifest.step)
        self.pending = {key: parts for key, parts in self.pending.items() if key[1] > self.newest}
        self.refused.discard(folder_of(manifest.step))  # written again
        if self.store.files.renames:
            self.clear(manifest.generation)
        else:  # an object store takes its time
            self.clearing = threading.Thread(target=self.clear, args=(manifest.generation,), name="clearing",
                                             daemon=True)
            self.clearing.start()

    def settle(self) -> None:
        """Returns when nothing is being removed any more: what is about to go must not be taken for damaged."""
        if self.clearing is not None:
            self.clearing.join()
            self.clearing = None

    def drop(self, part: Part) -> None:
        """Removes what a rank wrote of a checkpoint that will not be: on a full disk it would be in the way of the
        next."""
        folder = folder_of(part.step)
        with contextlib.suppress(OSError):
            if not part.error and self.store.size(f"{folder}/{MANIFEST}") is None and not self.store.is_link(folder):
                for name in (part_name(part.rank, part.world_size, part.generation),
                             *(entry["name"] for entry in json.loads(part.tables))):
                    self.store.remove(f"{folder}/{name}")

    def clear(self, live_generation: int) -> None:
        """Removes what is not to be kept. What resists stays until the next commit: the checkpoint counts all the same.
        """
        try:
            for name in prune(self.store, self.keep, self.best or None, self.keep_every, self.refused, self.read,
                              self.best_mode):
                self.known.pop(name, None)
            clean(self.store, live_generation, self.read)
        except OSError as error:
            log.warning("Old checkpoints in %s could not be removed: %s", shown(self.location), error)

    def read(self, store: Store, name: str) -> Manifest:
        """A checkpoint's manifest, read once: on an object store each is a call, and each commit looks at all that are
        kept."""
        if name not in self.known:
            self.known[name] = read_manifest(store, name)
        return self.known[name]

    def refuse(self, path: str) -> bool:
        """Never to be chosen again in this run: it was found bad while it was loaded. Whether that is news."""
        name = parted(path)[1]
        is_new = name not in self.refused
        self.refused.add(name)
        return is_new

    def newest_good(self) -> tuple[str, int, list[tuple[str, str]]]:
        """(path, step, [(path, reason)] of the newer ones that are not whole); ("", 0, ...) if there is none."""
        self.settle()
        name, rejected = newest_good(self.store, self.refused)
        bad = [(shown(self.path(n)), reason) for n, reason in rejected]
        return (self.path(name), self.read(self.store, name).step, bad) if name else ("", 0, bad)

    def lines_of(self, path: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that a checkpoint carries, for it was committed with nobody there to write them down.
        """
        return list(read_manifest(self.store, parted(path)[1]).extra.get("lines", ())) if path else []

    def flip_a_byte(self) -> None:
        """For fault injection: damages the newest checkpoint in the middle of its first file."""
        name, _ = newest_good(self.store)
        if name is None:
            return
        file = next(f for f in self.store.names(name) if f.endswith(".safetensors"))
        size = self.store.size(f"{name}/{file}") or 0
        content = bytearray(self.store.read_range(f"{name}/{file}", 0, size))
        content[size // 2] ^= 1
        self.store.write(f"{name}/{file}", [bytes(content)])
