"""Files in a folder, on a local disk or on anything `pyarrow.fs` knows. A file appears whole or not at all.

Locally a file is written under another name, synced and renamed; an object store puts it in one go. Nothing is cleaned up when
a write fails: what a crash leaves behind looks the same and is dealt with by `manager.clean`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from typing import Any

from pyarrow import fs

from elastic.errors import BadCheckpoint

TEMPORARY = ".tmp"


class Store:
    """A folder. Names are relative and use "/". Errors of the storage are OSError."""

    def __init__(self, filesystem: fs.FileSystem, root: str):
        self.filesystem, self.root = filesystem, root
        self.local = isinstance(filesystem, fs.LocalFileSystem)

    @classmethod
    def open(cls, location: str | os.PathLike[str]) -> Store:
        """A path or a URI (s3://, gs://, hdfs://, file://). Nothing is created yet."""
        location = os.fspath(location)
        if "://" in location:
            filesystem, root = fs.FileSystem.from_uri(location)
        else:
            filesystem, root = fs.LocalFileSystem(), os.path.abspath(location)
        return cls(filesystem, root.rstrip("/"))

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def write(self, name: str, pieces: Iterable[Any]) -> None:
        """Writes `pieces` (contiguous buffers) one after the other; durable when it returns."""
        path = self.path(name)
        parent = path.rpartition("/")[0]
        self.filesystem.create_dir(parent, recursive=True)
        target = f"{path}.{uuid.uuid4().hex}{TEMPORARY}" if self.local else path
        if not self.local:
            pieces = [b"".join(bytes(piece) for piece in pieces)]  # a stream that is given up half-way may still be put as it is
        with self.filesystem.open_output_stream(target, compression=None) as stream:
            for piece in pieces:
                stream.write(piece)
        if self.local:
            sync(target)
            self.rename(target, path)
            sync(parent)
            sync(os.path.dirname(parent))

    def rename(self, source: str, target: str) -> None:
        os.replace(source, target)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        info = self.filesystem.get_file_info(self.path(name))
        return info.size if info.type == fs.FileType.File else None

    def read(self, name: str, num_bytes: int) -> bytes:
        """A whole file, whose size must be `num_bytes`: nothing larger is ever read into memory."""
        found = self.size(name)
        if found is None:
            raise BadCheckpoint(f"{name} is missing.")
        if found != num_bytes:
            raise BadCheckpoint(f"{name} has {found} bytes instead of {num_bytes}.")
        with self.filesystem.open_input_stream(self.path(name), compression=None) as stream:
            return stream.read(num_bytes)

    def names(self, folder: str = "") -> list[str]:
        """Names of files and folders directly in a folder, sorted; none where there is no such folder."""
        selector = fs.FileSelector(self.path(folder).rstrip("/"), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it."""
        path = self.path(name)
        if self.filesystem.get_file_info(path).type == fs.FileType.Directory:
            self.filesystem.delete_dir(path)
        else:
            self.filesystem.delete_file(path)


def sync(path: str) -> None:
    """A file's bytes, or a folder's names, are on the disk when it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
