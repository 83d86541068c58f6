"""The controller's side of checkpoints: it alone makes them count, chooses among them and clears away."""

from __future__ import annotations

import logging

from elastic.checkpoint.manager import check_sizes, clean, commit, folder_of, newest_good, prune
from elastic.checkpoint.manifest import parse
from elastic.checkpoint.store import Store
from elastic.errors import BadCheckpoint

log = logging.getLogger(__name__)


class Commits:
    """The checkpoints of one run, at a local path or URI."""

    def __init__(self, location: str, keep: int, best: str, newest: int = 0):
        self.location, self.keep, self.best, self.newest = location, keep, best, newest
        self.store = Store.open(location)

    def path(self, name: str) -> str:
        return f"{self.location.rstrip('/')}/{name}"

    def commit(self, text: str) -> tuple[str, int]:
        """Commits a manifest whose files are durable; its path and size in bytes. Older checkpoints beyond `keep` go.

        BadCheckpoint where the files are not to be seen from here.
        """
        manifest = parse(text)
        try:
            check_sizes(self.store, folder_of(manifest.step), manifest)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{str(error).rstrip('.')} where the controller looks, in {self.location}; a worker has written it, so put the run "
                                "directory where all nodes share it.") from error
        name = commit(self.store, manifest)
        self.newest = max(self.newest, manifest.step)
        self.clear(manifest.generation)
        return self.path(name), manifest.bytes

    def clear(self, live_generation: int) -> None:
        """Removes what is not to be kept. What resists stays until the next commit: the checkpoint counts all the same."""
        try:
            prune(self.store, self.keep, self.best or None)
            clean(self.store, live_generation)
        except OSError as error:
            log.warning("Old checkpoints in %s could not be removed: %s", self.location, error)

    def newest_good(self) -> tuple[str, int, list[tuple[str, str]]]:
        """(path, step, [(path, reason)] of the newer ones that are not whole); ("", 0, ...) if there is none."""
        name, rejected = newest_good(self.store)
        bad = [(self.path(n), reason) for n, reason in rejected]
        return (self.path(name), int(name.removeprefix("step-")), bad) if name else ("", 0, bad)

    def flip_a_byte(self) -> None:
        """For fault injection: damages the newest checkpoint in the middle of its first file."""
        name, _ = newest_good(self.store)
        if name is None:
            return
        file = next(f for f in self.store.names(name) if f.endswith(".safetensors"))
        size = self.store.size(f"{name}/{file}") or 0
        content = bytearray(self.store.read(f"{name}/{file}", size))
        content[size // 2] ^= 1
        self.store.write(f"{name}/{file}", [bytes(content)])
