"""The files that a recipe's data paths mean: local or remote, one, a folder, a glob, or many, each with its size and date."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from elastic.data.cache import cache_dir, facts_once
from elastic.errors import RecipeError, UserError
from elastic.recipe import resolve_path
from elastic.recipe.paths import MADE, made_by
from elastic.storage.remote import hurried, open_s3, shown

MAGIC = "*["
# what Spark and its kin put beside a table's files
MARKERS = ("_SUCCESS", "_metadata", "_common_metadata", "_delta_log", "_temporary")
GZIP = "gzip"
PACKED = {b"\x1f\x8b": GZIP, b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}
NAMED = 5  # files that a message names; the rest is counted
GCS_RETRY_S = 20.0


@dataclass(frozen=True)
class File:
    """One file. `where` is its absolute path or URI; size in bytes, mtime_ns in nanoseconds (0 where the storage does
    not say). `below` is its path from the folder that the recipe names, "" where it names the file itself."""

    where: str
    size: int
    mtime_ns: int
    below: str = field(default="", compare=False)

    @property
    def is_local(self) -> bool:
        return "://" not in self.where

    @property
    def name(self) -> str:
        """For messages: without a URI's keys."""
        return shown(self.where)

    @property
    def path(self) -> PurePosixPath:
        """Without scheme, signs for spaces and options."""
        return PurePosixPath(self.where if self.is_local else unquote(urlsplit(self.where).path))

    def open(self) -> pa.NativeFile:
        """For random access, not mapped: a file that shrinks is an error, not the end of the process."""
        if self.is_local:
            return pa.OSFile(self.where)
        system, inner = open_system(self.where)
        return system.open_input_file(inner)

    def stream(self) -> pa.NativeFile:
        """For reading from the beginning to the end; what gzip packed is unpacked. UserError names another packer."""
        system, inner = (fs.LocalFileSystem(), self.where) if self.is_local else open_system(self.where)
        packer = self.packed_by()
        if packer not in ("", GZIP):
            raise self.is_packed(packer)
        return system.open_input_stream(inner, compression=packer or None)

    def packed_by(self) -> str:
        """By its first bytes."""
        system, inner = (fs.LocalFileSystem(), self.where) if self.is_local else open_system(self.where)
        with system.open_input_stream(inner, compression=None) as raw:
            first = raw.read(max(map(len, PACKED)))
        return next((name for sign, name in PACKED.items() if first.startswith(sign)), "")

    def is_packed(self, packer: str) -> UserError:
        return UserError(f"data.path: the file {self.name} is packed by {packer}; unpack it and name what comes out.")


def open_system(uri: str) -> tuple[fs.FileSystem, str]:
    """The storage behind a URI and the path in it. A bucket is connected to once."""
    if not uri.startswith("s3://"):
        return fs.FileSystem.from_uri(hurried(uri, GCS_RETRY_S))
    parts = urlsplit(uri)
    system, bucket = _bucket(parts.netloc, parts.query)
    return system, f"{bucket}{unquote(parts.path)}".rstrip("/")


@lru_cache(16)
def _bucket(netloc: str, query: str) -> tuple[fs.FileSystem, str]:
    system, bucket = open_s3(f"s3://{netloc}/?{query}")
    return system, bucket.rstrip("/")


def find(key: str, paths: str | Sequence[str]) -> list[File]:
    """Every file that `paths` mean; of folders all files below but hidden ones, through links, in the order of their
    paths.

    RecipeError names `key`, the path, and what is missing or forbids.
    """
    return look(key, paths)[0]


def look(key: str, paths: str | Sequence[str]) -> tuple[list[File], list[str]]:
    """The same, and what of the folders is left out: hidden files and folders, broken links and others' markers."""
    if not paths:
        raise RecipeError(f"{key} names no file; give a file, a folder, a glob or a list.")
    found: list[File] = []
    left: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if path.startswith(MADE):
            path = str(made(path, key))
        found += _remote(key, path, left) if "://" in path else _local(key, path, left)
    return found, left


def made(path: str, key: str) -> Path:
    """The folder of the cache with the data that `path` asks for, made once."""
    name, options = made_by(path, key)
    module = importlib.import_module(name)
    unknown = [option for option in options if option not in module.OPTIONS]
    if unknown:
        raise RecipeError(f'{key} = "{path}": {unknown[0]} is nothing that {name} is asked for; it takes '
                          f"{', '.join(module.OPTIONS)}.")
    given = {**module.OPTIONS, **options}
    told = hashlib.sha256(json.dumps([name, sorted(given.items())]).encode()).hexdigest()[:32]
    folder = cache_dir() / f"made-{told}"

    def make() -> dict[str, int]:
        (folder / "data").mkdir(exist_ok=True)
        module.make(folder / "data", given)
        return given

    facts_once(folder, make)
    return folder / "data"


def told(key: str, left: Sequence[str], why: str) -> list[str]:
    """One line, or none, of what is left out."""
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    return [f"{key}: left out, {why}: {', '.join(left[:NAMED])}{more}"] if left else []


HIDDEN = "as hidden (its name begins with a dot), a broken link or a mark of other programs"


def left_out(key: str, paths: str | Sequence[str]) -> list[str]:
    """The line that says what of `paths` is not read, if anything is."""
    return told(key, look(key, paths)[1], HIDDEN) if paths else []


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in MARKERS


def _local(key: str, path: str, left: list[str]) -> list[File]:
    found = []
    for one in map(Path, resolve_path(path, key)):
        inside = sorted(_walk(one, frozenset(), left)) if one.is_dir() else [one]
        if not inside:
            raise RecipeError(f"{key}: the folder {one} holds no file; give one with files.")
        for file in inside:
            stat = file.stat()
            found.append(File(str(file), stat.st_size, stat.st_mtime_ns, file.relative_to(one).as_posix() if file != one
                              else ""))
    return found


def _walk(folder: Path, above: frozenset[str], left: list[str]) -> Iterator[Path]:
    """All files below. A link that leads back to a folder it lies in is left out."""
    above |= {os.path.realpath(folder)}
    for entry in folder.iterdir():
        if _is_hidden(entry.name) or not entry.exists() or os.path.realpath(entry) in above:
            left.append(str(entry))
        elif entry.is_dir():
            yield from _walk(entry, above, left)
        elif entry.is_file():
            yield entry


def _remote(key: str, uri: str, left: list[str]) -> list[File]:
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
        if not places and any(map(_is_hidden, below.split("/"))):
            left.append(shown(prefix + quote(entry.path)))
        elif not places or PurePosixPath(entry.path).match(pattern):
            found.append(File(prefix + quote(entry.path) + mark + query, entry.size, entry.mtime_ns or 0, "" if places
                              else below))
    if not found:
        raise RecipeError(f'{key} = "{shown(uri)}" does not exist or holds no file; write the URI of a file or folder.')
    return found


def describe(error: BaseException) -> str:
    """An operating system's error without its path; Arrow's own first sentence, on one line."""
    text = str(isinstance(error, OSError) and error.strerror or error).split(". Detail", 1)[0]
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()).rstrip(".")[:300])
