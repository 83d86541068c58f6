"""Files in a folder, on a local disk or on anything `pyarrow.fs` knows. A file appears whole or not at all.

Where a file can be seen half written it is written under another name, synced and renamed. What a crash leaves behind
is dealt with by `manager.clean`.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from elastic.storage.files import Files
from elastic.storage.remote import open_files

TEMPORARY = ".tmp"
T = TypeVar("T")
AGAIN_S = (0.5, 1.0, 2.0, 4.0)  # before the next try to read from a storage that may only be away for a moment


def patiently(read: Callable[[], T]) -> T:
    """What `read` gives, tried again while the storage does not answer. What is not there is not waited for."""
    for wait_s in AGAIN_S:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(wait_s)
    return read()


class Store:
    """A folder. Names are relative and use "/". Errors of the storage are OSError."""

    def __init__(self, files: Files, root: str):
        self.files, self.root = files, root

    @classmethod
    def open(cls, location: str | os.PathLike[str]) -> Store:
        """A path or a URI (s3://, gs://, hdfs://, file://). Nothing is created yet."""
        return cls(*open_files(location))

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def write(self, name: str, pieces: Iterable[Any]) -> None:
        """Writes `pieces` (contiguous buffers) one after the other; durable when it returns. They must not change
        before that.

        Of a write that fails nothing is left, so that a full disk does not stay full.
        """
        path, files = self.path(name), self.files
        parent = path.rpartition("/")[0]
        files.make_folder(parent)
        target = f"{path}.{uuid.uuid4().hex}{TEMPORARY}" if files.renames else path
        sink = files.create(target)
        try:
            for piece in pieces:
                sink.write(piece)
            sink.close()
            if files.renames:
                files.rename(target, path)
        except Exception:
            sink.abort()
            if files.renames:
                with contextlib.suppress(OSError):
                    files.remove(target)
            raise
        if files.renames:
            files.sync(parent)
            files.sync(parent.rpartition("/")[0] or "/")

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        found = self.files.info(self.path(name))
        return None if found is None or found.is_folder else found.bytes

    def read_range(self, name: str, low: int, high: int) -> bytes:
        """Bytes low..high-1 of a file; fewer where it ends before."""
        return self.files.read(self.path(name), low, high)

    def names(self, folder: str = "") -> list[str]:
        """Names of files and folders directly in a folder, sorted; none where there is no such folder."""
        return sorted(self.files.names(self.path(folder).rstrip("/") or "/"))

    def is_link(self, name: str) -> bool:
        found = self.files.info(self.path(name))
        return found is not None and found.is_link

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it. Of a link only itself: what it points to is somebody else's."""
        found = self.files.info(self.path(name))
        if found is not None and found.is_folder and not found.is_link:
            for inside in self.names(name):
                self.remove(f"{name}/{inside}")
            if self.files.info(self.path(name)) is None:
                return  # an object store's folder may go with the last that is in it
        self.files.remove(self.path(name))
