"""Whose turn it is: MXNet's kernels and generators are the process's own, so one thread computes at a time.

A thread that waits for other workers steps aside: they may be threads of the same process.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mxnet as mx

_library = mx.base._LIB
_blas = ctypes.CDLL(str(Path(mx.__file__).parent / "libopenblas.so.0")) if (Path(mx.__file__).parent / "libopenblas.so.0").exists() else None


class Turn:
    """A lock that its holder may take again, and lend out whole."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0  # how often the holder has taken it
        self._holder: int | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1
        self._holder = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
        self._lock.release()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, others may have it; afterwards all is as it was. Does nothing for who does not hold it."""
        depth = self._depth if self._holder == threading.get_ident() else 0
        threads = _blas.openblas_get_num_threads() if depth and _blas is not None else 0
        for _ in range(depth):
            self.__exit__()
        try:
            yield
        finally:
            for _ in range(depth):
                self.__enter__()
            if threads:
                set_blas_threads(threads)


turn = Turn()


@contextmanager
def computing(threads: int, numpy_shapes: bool = True) -> Iterator[None]:
    """This thread's turn, with the thread count on which bits depend: OpenMP's is a thread's own setting, BLAS has one for all."""
    with turn:
        _library.MXSetNumOMPThreads(threads)
        set_blas_threads(threads)
        with mx.util.np_shape(numpy_shapes):
            yield


def set_blas_threads(threads: int) -> None:
    if _blas is not None and _blas.openblas_get_num_threads() != threads:
        _blas.openblas_set_num_threads(threads)
