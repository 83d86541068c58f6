"""Memory that one process writes and others read: an anonymous file that has no name, so nothing outlives its users.

A segment is a memfd, which peers open through /proc/PID/fd and map read-only. Its first page holds one 64-bit counter
per reader; a reader sleeps on its own counter with a futex. x86-64 keeps stores in order, so a counter's new value
means that all data written before it is there; other processors would need fences that Python lacks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import sys
import weakref
from typing import Any

import numpy as np

PAGE = 4096
LINE = 8  # words of 64 bits in a cache line: readers' counters do not share one
GONE = 1  # word that says whether the writer gave up; word 0 is free
POSTS = 8  # words that say where the writer's last two payloads lie: (offset, bytes) twice
COUNTERS = 16
MOST_READERS = (PAGE // 8 - COUNTERS) // LINE

_FUTEX, _WAIT, _WAKE = 202, 0, 1  # x86-64's system call number, and operations across processes
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p,
                          ctypes.c_void_p,
                          ctypes.c_uint32]


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def usable() -> bool:
    """Whether this machine can share memory in this way."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        for descriptor in (os.memfd_create("elastic"), os.pidfd_open(os.getpid())):
            os.close(descriptor)
    except (AttributeError, OSError):  # an older system or Python, or a container that forbids it
        return False
    return True


def started_at(pid: int) -> str:
    """When a process started, in clock ticks since boot: with the pid, it names the process for ever."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def address_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


class Segment:
    """This process's own memory in a group. Sparse: what is not touched costs nothing."""

    def __init__(self, name: str, num_readers: int):
        if num_readers > MOST_READERS:
            raise ValueError(f"{num_readers} members are too many for shared memory; at most {MOST_READERS}.")
        self.capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // PAGE * PAGE
        fd = os.memfd_create(name)
        self.close = weakref.finalize(self, os.close, fd)  # once the peers have opened it, or when dropped
        os.ftruncate(fd, self.capacity)
        self.words, self.bytes = mapped(fd, self.capacity, mmap.PROT_READ | mmap.PROT_WRITE)
        self.base, self._used = address_of(self.bytes), PAGE
        self.card = f"{os.getpid()} {fd} {started_at(os.getpid())} {self.capacity}"

    def allocate(self, size: int, dtype: Any = np.float32) -> np.ndarray:
        """A zeroed array inside the segment, at the start of a page. There is no freeing but with the group."""
        num_bytes = size * np.dtype(dtype).itemsize
        low, self._used = self._used, self._used + -(-num_bytes // PAGE) * PAGE
        if self._used > self.capacity:
            raise MemoryError(f"{num_bytes} more bytes exceed the {self.capacity} of this machine.")
        return self.bytes[low:low + num_bytes].view(dtype)

    def offset(self, array: np.ndarray) -> int | None:
        """Where an array lies in the segment, in bytes; None if it is no part of it."""
        at = address_of(array) - self.base
        return at if 0 <= at < self.capacity else None

    def count(self, reader: int, value: int) -> None:
        """Sets a reader's counter, after everything it is to see was written, and wakes it."""
        self.words[COUNTERS + LINE * reader] = value
        self.wake(reader)

    def wake(self, reader: int) -> None:
        _libc.syscall(_FUTEX, self.base + 8 * (COUNTERS + LINE * reader), _WAKE, 1, None, None, 0)


class Peer:
    """Another process's segment, read-only, as reader number `reader` of it; and whether that process lives."""

    def __init__(self, card: str, reader: int):
        pid, fd, started, capacity = card.split()
        self._pidfd = os.pidfd_open(int(pid))
        weakref.finalize(self, os.close, self._pidfd)
        if started_at(int(pid)) != started:
            raise ProcessLookupError(f"process {pid} is gone.")
        theirs = os.open(f"/proc/{int(pid)}/fd/{int(fd)}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not PAGE <= int(capacity) <= os.fstat(theirs).st_size:
                raise ValueError(f"process {pid} has no segment of {capacity} bytes.")
            self.words, self.bytes = mapped(theirs, int(capacity), mmap.PROT_READ)
        finally:
            os.close(theirs)
        self._word = COUNTERS + LINE * reader
        self._address = address_of(self.bytes) + 8 * self._word
        self._poll = select.poll()
        self._poll.register(self._pidfd, select.POLLIN)

    def counter(self) -> int:
        return self.words[self._word]

    def sleep(self, seen: int, timeout_s: float) -> None:
        """Until the counter is no longer `seen`, or the time is up."""
        time = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
        _libc.syscall(_FUTEX, self._address, _WAIT, seen & 0xFFFFFFFF, ctypes.addressof(time), None, 0)

    def lost(self) -> bool:
        """Whether the process has ended or given the group up."""
        return bool(self.words[GONE]) or bool(self._poll.poll(0))


def mapped(fd: int, capacity: int, protection: int) -> tuple[memoryview, np.ndarray]:
    """The file as 64-bit words of the first page, and as bytes. Unmapped when the last view of it is gone."""
    memory = mmap.mmap(fd, capacity, mmap.MAP_SHARED, protection)
    return memoryview(memory)[:PAGE].cast("q"), np.frombuffer(memory, np.uint8)
