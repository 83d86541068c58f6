"""The primitive calls a store is made of: on a local disk, and on whatever `pyarrow.fs` knows.

Everything above this file is written so that a crash between any two of these calls leaves nothing that could be
mistaken for a checkpoint. Paths are absolute and use "/". Errors of the storage are OSError.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Any, Protocol

from pyarrow import fs

from elastic.storage.sink import LocalSink

AT_HEAD = "head"  # the scheme of a path of the head node, for those who do not see it: `elastic.storage.head`


@dataclass(frozen=True)
class Info:
    """What is at a path. A folder has no size."""

    bytes: int
    is_folder: bool
    is_link: bool = False  # then the rest is of what it points to


class Sink(Protocol):
    """A file being written. Buffers that were given to `write` must not change before `close` has returned."""

    def write(self, data: Any) -> None: ...

    def close(self) -> None:
        """The bytes are durable when it returns. After an error of the storage, call `abort`."""

    def abort(self) -> None:
        """Gives the file up; what is left of it is nobody's."""


class Files(Protocol):
    """`renames`: a file may be seen half written, so it is written under another name first. Else it appears whole or
    not at all."""

    renames: bool

    def make_folder(self, path: str) -> None:
        """With those above it."""

    def create(self, path: str) -> Sink: ...

    def rename(self, source: str, target: str) -> None: ...

    def sync(self, folder: str) -> None:
        """The folder's names are durable when it returns."""

    def info(self, path: str) -> Info | None: ...

    def read(self, path: str, low: int, high: int) -> bytes:
        """Bytes low..high-1; fewer where the file ends before."""

    def names(self, folder: str) -> list[str]:
        """Directly in a folder; none where there is none."""

    def remove(self, path: str) -> None:
        """A file, a link, or a folder that is empty."""


class LocalFiles:
    """A local disk, or what is mounted as one."""

    renames = True

    def make_folder(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)

    def create(self, path: str) -> Sink:
        return LocalSink(path)

    def rename(self, source: str, target: str) -> None:
        os.replace(source, target)

    def sync(self, folder: str) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def info(self, path: str) -> Info | None:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Info(0 if stat.S_ISDIR(found.st_mode) else found.st_size, stat.S_ISDIR(found.st_mode),
                    os.path.islink(path))

    def read(self, path: str, low: int, high: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(low)
            return file.read(high - low)

    def names(self, folder: str) -> list[str]:
        try:
            return os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            os.rmdir(path)
        else:
            os.remove(path)


class RemoteFiles:
    """Any `pyarrow.fs.FileSystem`: S3, GCS, HDFS. The last is a file system, so it renames; object stores put a file in
    one go."""

    def __init__(self, filesystem: fs.FileSystem):
        self.filesystem = filesystem
        self.renames = filesystem.type_name not in ("s3", "gcs", "abfs")

    def make_folder(self, path: str) -> None:
        if self.renames:  # an object store needs none
            self.filesystem.create_dir(path, recursive=True)

    def create(self, path: str) -> Sink:
        return RemoteSink(self.filesystem, path)

    def rename(self, source: str, target: str) -> None:
        self.filesystem.move(source, target)

    def sync(self, folder: str) -> None:
        """A closed file of a remote storage is durable, and its name with it; only that the folder is there is left to
        see."""
        if self.info(folder) is None:
            raise FileNotFoundError(2, "No such file or directory", folder)

    def info(self, path: str) -> Info | None:
        found = self.filesystem.get_file_info(path)
        if found.type == fs.FileType.NotFound:
            return None
        return Info(found.size or 0, found.type == fs.FileType.Directory)

    def read(self, path: str, low: int, high: int) -> bytes:
        with self.filesystem.open_input_file(path) as file:
            return file.read_at(high - low, low)

    def names(self, folder: str) -> list[str]:
        found = self.filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        return [info.base_name for info in found]

    def remove(self, path: str) -> None:
        found = self.info(path)
        if found is None:
            raise FileNotFoundError(2, "No such file or directory", path)
        if found.is_folder:
            self.filesystem.delete_dir(path)
        else:
            self.filesystem.delete_file(path)


class RemoteSink:
    """Keeps what it is given and sends it all in `close`: a stream that is given up half-way would still be put as it
    is."""

    def __init__(self, filesystem: fs.FileSystem, path: str):
        self.filesystem, self.path = filesystem, path
        self.pieces: list[Any] = []

    def write(self, data: Any) -> None:
        self.pieces.append(data)

    def close(self) -> None:
        with self.filesystem.open_output_stream(self.path, compression=None) as stream:
            for piece in self.pieces:
                stream.write(piece)

    def abort(self) -> None:
        self.pieces.clear()
