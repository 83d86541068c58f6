"""A file being written on a local disk, its large part past the page cache.

A checkpoint is not read again soon: the cache would cost a second copy of every byte, and memory and cores that
training needs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import sys
from typing import Any

import numpy as np

WRITE = 16 * 1024 * 1024  # bytes handed to the system in one call
PAGE = 4096  # what goes past the cache begins and ends at multiples of it, in memory as in the file
LARGE_PAGE = 2 * 1024 * 1024
DIRECT = os.O_DIRECT if sys.platform == "linux" else 0
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # by file systems that cannot, or whose blocks are larger than a page


class LocalSink:
    """A descriptor. Buffers that were given to `write` need not be kept."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self.bytes = 0
        self.may_pass, self.passes = bool(DIRECT), False

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        whole = len(view) // PAGE * PAGE
        while whole and self.may_pass and self.bytes % PAGE == 0 and address(view) % PAGE == 0:
            if not (done := self._write_past(view[:min(whole, WRITE)])):
                break
            view, whole = view[done:], (len(view) - done) // PAGE * PAGE
        self._pass(False)
        while view:
            done = os.write(self.descriptor, view[:WRITE])
            self.bytes, view = self.bytes + done, view[done:]

    def _write_past(self, view: memoryview) -> int:
        """Bytes written; 0 where the file system does not do it."""
        try:
            self._pass(True)
            done = os.write(self.descriptor, view)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            self.may_pass = False
            return 0
        self.bytes += done
        return done

    def _pass(self, on: bool) -> None:
        if self.passes != on:
            flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | DIRECT if on else flags & ~DIRECT)
            self.passes = on

    def close(self) -> None:
        os.fsync(self.descriptor)
        self.abort()

    def abort(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if len(view) else 0


def aligned(size: int) -> np.ndarray:
    """Bytes that begin at a page, all of them present: who fills them first does not wait for the system to find pages.

    Large pages, where the system has them, are found and held down for the disk many times faster.
    """
    room = mmap.mmap(-1, size + LARGE_PAGE)
    with contextlib.suppress(OSError, AttributeError):
        room.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(room, np.uint8)
    start = -whole.ctypes.data % LARGE_PAGE
    whole[::PAGE] = 0
    return whole[start:start + size]
