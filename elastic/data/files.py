"""The files that a recipe's data paths mean: local or remote, one, a folder, a glob, or many, each with its size and date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from elastic.checkpoint.remote import open_s3, shown
from elastic.errors import RecipeError
from elastic.recipe import resolve_paths

MAGIC = "*["
GCS_RETRY_S = 20  # its own default is a quarter of an hour before it says that nobody is there


@dataclass(frozen=True)
class File:
    """One file. `where` is its absolute path or URI; size in bytes, mtime_ns in nanoseconds (0 where the storage does not say)."""

    where: str
    size: int
    mtime_ns: int

    @property
    def is_local(self) -> bool:
        return "://" not in self.where

    @property
    def name(self) -> str:
        """For messages: without a URI's keys."""
        return shown(self.where)

    def open(self) -> pa.NativeFile:
        """For random access, not mapped: a file that shrinks is an error, not the end of the process."""
        if self.is_local:
            return pa.OSFile(self.where)
        system, inner = open_system(self.where)
        return system.open_input_file(inner)

    def stream(self) -> pa.NativeFile:
        """For reading from the beginning to the end."""
        system, inner = (fs.LocalFileSystem(), self.where) if self.is_local else open_system(self.where)
        return system.open_input_stream(inner, compression=None)


def open_system(uri: str) -> tuple[fs.FileSystem, str]:
    """The storage behind a URI and the path in it. A bucket is connected to once."""
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GCS_RETRY_S}"
    if not uri.startswith("s3://"):
        return fs.FileSystem.from_uri(uri)
    parts = urlsplit(uri)
    system, bucket = _bucket(parts.netloc, parts.query)
    return system, f"{bucket}{unquote(parts.path)}".rstrip("/")


@lru_cache(16)
def _bucket(netloc: str, query: str) -> tuple[fs.FileSystem, str]:
    system, bucket = open_s3(f"s3://{netloc}/?{query}")
    return system, bucket.rstrip("/")


def find(key: str, paths: str | Sequence[str]) -> list[File]:
    """Every file that `paths` mean; of folders all files below but hidden ones ("." or "_"), in the order of their paths.

    RecipeError names `key`, the path, and what is missing or forbids.
    """
    if not paths:
        raise RecipeError(f"{key} names no file; give a file, a folder, a glob or a list.")
    found: list[File] = []
    for path in [paths] if isinstance(paths, str) else paths:
        found += _remote(key, path) if "://" in path else _local(key, path)
    return found


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith((".", "_")) for part in parts)


def _local(key: str, path: str) -> list[File]:
    found = []
    for one in map(Path, resolve_paths(path, key=key)):
        inside = [one]
        if one.is_dir():
            inside = sorted(p for p in one.rglob("*") if not _is_hidden(p.relative_to(one).parts) and p.is_file())
            if not inside:
                raise RecipeError(f"{key}: the folder {one} holds no file; give one with files.")
        for file in inside:
            stat = file.stat()
            found.append(File(str(file), stat.st_size, stat.st_mtime_ns))
    return found


def _remote(key: str, uri: str) -> list[File]:
    """A "?" begins the URI's options; "*" and "[" in its path are a glob, each for one name."""
    path, mark, query = uri.partition("?")
    places = [place for sign in MAGIC if (place := path.find(sign)) >= 0]
    base = path[:min(places)].rpartition("/")[0] if places else path
    try:
        system, inner = open_system(base + mark + query)
        info = system.get_file_info(inner)
        listed = [info] if info.type == fs.FileType.File else []
        if info.type == fs.FileType.Directory:
            listed = system.get_file_info(fs.FileSelector(inner, recursive=True))
    except (OSError, ValueError, TypeError, NotImplementedError, pa.ArrowException) as error:
        raise RecipeError(f'{key} = "{shown(uri)}" cannot be reached ({describe(error)}); '
                          "mend the URI, its credentials or the connection.") from error
    parts, pattern = urlsplit(base), inner.rstrip("/") + unquote(path[len(base):])
    user = parts.netloc.rpartition("@")
    prefix = f"{parts.scheme}://" + (parts.netloc if inner.startswith("/") else user[0] + user[1])
    found = []
    for entry in sorted((entry for entry in listed if entry.type == fs.FileType.File), key=lambda entry: entry.path):
        below = entry.path[len(inner.rstrip("/")):].strip("/")
        if PurePosixPath(entry.path).match(pattern) if places else not _is_hidden(below.split("/")):
            found.append(File(prefix + quote(entry.path) + mark + query, entry.size, entry.mtime_ns or 0))
    if not found:
        raise RecipeError(f'{key} = "{shown(uri)}" does not exist or holds no file; write the URI of a file or folder.')
    return found


def describe(error: BaseException) -> str:
    """An operating system's error without its path; Arrow's own first sentence, on one line."""
    text = str(getattr(error, "strerror", None) or error).split(". Detail", 1)[0]
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()).rstrip(".")[:300])
