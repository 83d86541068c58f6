"""JSON lines on disk: one object a line, flushed at once; a last line torn by a crash is no line."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from elastic.errors import UserError
from elastic.storage.atomic import appearing, locked, write_atomically, write_whole

GLANCE_S = 0.2  # who looks whether a lock is free has it for an instant: nobody is refused for that


class JsonLines:
    """Appends to one file. A torn last line, left by a process that died while writing, is cut off before the first is
    written, not earlier: until `claim` it may be another's, who is about to end it. Lines that the disk does not take
    are held, in order, until it does."""

    def __init__(self, path: str | Path, mode: int = 0o666):
        self.path, self._is_whole = Path(path), False
        self._file = open(self.path, "ab", buffering=0, opener=partial(os.open, mode=mode))  # noqa: SIM115 - closed by `close`
        self._held: deque[bytes] = deque()
        self.error: OSError | None = None  # why lines are held

    def hold(self, fields: Mapping[str, Any]) -> None:
        """A line for the next `retry`."""
        self._held.append(line(fields).encode())

    def append(self, fields: Mapping[str, Any]) -> bool:
        """Writes one line and hands it to the operating system; False where it is held."""
        self.hold(fields)
        return self.retry()

    def retry(self) -> bool:
        """Writes what is held; whether that is everything."""
        while self._held:
            try:
                if not self._is_whole:
                    cut_torn(self.path)
                    self._is_whole = True
                write_whole(self._file, self._held[0])
            except OSError as error:
                self.error = error
                return False
            self._held.popleft()
        self.error = None
        return True

    def cut_back(self, step: int) -> None:
        """Drops the lines of later steps; the file is cut or replaced, whole or not at all. Where the others lie before
        them, that needs no room on a full disk."""
        self._held = deque(text for text in self._held if json.loads(text).get("step", 0) <= step)
        stays = [fields.get("step", 0) <= step for fields in read_lines(self.path)]
        lines = self.path.read_bytes().split(b"\n")[:len(stays)] if stays else []
        first = stays.index(False) if False in stays else len(stays)
        if any(stays[first:]):
            write_atomically(self.path, b"".join(text + b"\n" for text in compress(lines, stays)))
        elif self.path.exists():
            os.truncate(self.path, sum(len(text) + 1 for text in lines[:first]))
        self._file.close()
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`

    @property
    def size(self) -> int:
        """In bytes, without what is held."""
        return os.fstat(self._file.fileno()).st_size

    def replace(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """All lines anew, on the disk itself when this returns; OSError where it stays as it was. Who may read the file
        may read the new one."""
        self.sync()
        with appearing(self.path) as file:
            os.fchmod(file.fileno(), os.fstat(self._file.fileno()).st_mode & 0o777)
            for fields in lines:
                file.write(line(fields).encode())
            fresh = open(file.name, "ab", buffering=0)  # noqa: SIM115 - before it takes the other's place, which may not fail
        self._file.close()
        self._file = fresh

    def sync(self) -> None:
        """Returns when every line is on the disk itself; OSError where some are held."""
        if not self.retry() and self.error:
            raise self.error
        os.fsync(self._file.fileno())

    def claim(self, wait_s: float = 0.0) -> bool:
        """Makes this process the file's only writer, for as long as it lives; False if another one still is after
        `wait_s`."""
        return locked(self._file, wait_s)

    def close(self) -> None:
        self._file.close()


def has_writer(path: str | Path) -> bool:
    """Whether a living process has claimed the file."""
    try:
        with open(path, "r+b") as file:
            return not locked(file, GLANCE_S)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be opened for writing ({error.strerror}); only who may write there may go on "
                        "with its run.") from error


def line(fields: Mapping[str, Any]) -> str:
    """One line of JSON; what JSON cannot say (NaN, infinity) becomes null."""
    return json.dumps(_plain(fields), separators=(", ", ": "), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if type(value) in (str, int, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (np.generic, np.ndarray)) and not value.ndim:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Every whole line of a file that may still be written to; empty if there is no file.

    UserError names the line if one that is not the last is no JSON object.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    whole, _, _torn = data.rpartition(b"\n")
    for number, text in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            fields = json.loads(text)
        except ValueError:
            raise UserError(f"{path}, line {number} is not JSON: the file was altered.") from None
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number} is not a JSON object: the file was altered.")
        found.append(fields)
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """A file that holds one JSON object; None if there is no file. UserError if it holds anything else."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object: the file was altered.")
    return found


def cut_torn(path: Path) -> None:
    """Cuts the file after its last whole line."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            file.truncate(end)
