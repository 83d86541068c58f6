"""File systems of machines that go down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elastic.storage import store as stores
from elastic.storage.faulty import Crashed, FaultyFiles
from elastic.storage.files import Files, Sink
from elastic.storage.remote import open_files


class Torn(FaultyFiles):
    """A crash in the middle of a write: half of what it was given is there."""

    def create(self, path: str) -> Sink:
        return TornSink(self, super().create(path))


class TornSink:
    def __init__(self, files: FaultyFiles, sink: Any):
        self.files, self.sink = files, sink

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        if self.files.fired.is_set():
            raise Crashed
        try:
            self.sink.write(view)
        except Crashed:
            self.sink.sink.write(view[:len(view) // 2])
            raise

    def close(self) -> None:
        self.sink.close()

    def abort(self) -> None:
        self.sink.abort()


def crashing(monkeypatch: pytest.MonkeyPatch, location: str, kind: Callable[..., FaultyFiles], at: int) -> FaultyFiles:
    """Every store of this location fails at the same call."""
    files: Files
    files, root = open_files(location)
    faulty = kind(files, "crash", at)
    monkeypatch.setattr(stores, "open_files", lambda asked: (faulty, root))
    return faulty
