"""The controller's side of checkpoints: it alone makes them count, chooses among them and clears away."""

from __future__ import annotations

from elastic.checkpoint.manager import clean, commit, newest_good, prune
from elastic.checkpoint.manifest import parse
from elastic.checkpoint.store import Store


class Commits:
    """The checkpoints of one run, at a local path or URI."""

    def __init__(self, location: str, keep: int, best: str, newest: int = 0):
        self.location, self.keep, self.best, self.newest = location, keep, best, newest
        self.store = Store.open(location)

    def path(self, name: str) -> str:
        return f"{self.location.rstrip('/')}/{name}"

    def commit(self, text: str) -> tuple[str, int]:
        """Commits a manifest whose files are durable; its path and size in bytes. Older checkpoints beyond `keep` go."""
        manifest = parse(text)
        name = commit(self.store, manifest)
        self.newest = max(self.newest, manifest.step)
        prune(self.store, self.keep, self.best or None)
        clean(self.store, manifest.generation)
        return self.path(name), manifest.bytes

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
