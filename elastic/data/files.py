"""The files that a recipe's data paths mean: local or remote, one, a folder, a glob, or many, each with its size and date."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from elastic.errors import RecipeError
from elastic.recipe import resolve_paths

MAGIC = "*?["


@dataclass(frozen=True)
class File:
    """One file. `where` is its absolute path or URI; size in bytes, mtime_ns in nanoseconds (0 where the storage does not say)."""

    where: str
    size: int
    mtime_ns: int

    @property
    def is_local(self) -> bool:
        return "://" not in self.where

    def open(self) -> pa.NativeFile:
        """For random access, not mapped: a file that shrinks is an error, not the end of the process."""
        if self.is_local:
            return pa.OSFile(self.where)
        system, inner = fs.FileSystem.from_uri(self.where)
        return system.open_input_file(inner)

    def stream(self) -> pa.NativeFile:
        """For reading from the beginning to the end."""
        system, inner = (fs.LocalFileSystem(), self.where) if self.is_local else fs.FileSystem.from_uri(self.where)
        return system.open_input_stream(inner, compression=None)


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


def _remote(key: str, path: str) -> list[File]:
    pattern = path if any(sign in path for sign in MAGIC) else ""
    base = path if not pattern else path[:min(path.find(sign) for sign in MAGIC if sign in path)].rpartition("/")[0]
    try:
        system, inner = fs.FileSystem.from_uri(base)
        info = system.get_file_info(inner)
        listed = [info] if info.type == fs.FileType.File else []
        if info.type == fs.FileType.Directory:
            listed = system.get_file_info(fs.FileSelector(inner, recursive=True))
    except (OSError, ValueError, NotImplementedError, pa.ArrowException) as error:
        raise RecipeError(f'{key} = "{path}" cannot be reached ({describe(error)}); mend the URI, its credentials or the connection.') from error
    prefix = base[:len(base) - len(inner.rstrip("/"))] if base.rstrip("/").endswith(inner.rstrip("/")) else base.partition("://")[0] + "://"
    found = []
    for entry in sorted((e for e in listed if e.type == fs.FileType.File), key=lambda e: e.path):
        below = entry.path[len(inner):].strip("/")
        if (not pattern or fnmatch.fnmatchcase(prefix + entry.path, pattern)) and not _is_hidden(below.split("/")[:-1] + [Path(entry.path).name]):
            found.append(File(prefix + entry.path, entry.size, entry.mtime_ns or 0))
    if not found:
        raise RecipeError(f'{key} = "{path}" does not exist or holds no file; write the URI of a file or folder.')
    return found


def describe(error: BaseException) -> str:
    """An operating system's error without its path; Arrow's own first sentence, on one line."""
    text = str(getattr(error, "strerror", None) or error).split(". Detail", 1)[0]
    return " ".join(text.split()).rstrip(".")[:300]
