"""Whose turn it is: MXNet's kernels and generators are the process's own, so one thread computes at a time.

A thread that waits for other workers steps aside: they may be threads of the same process.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mxnet as mx

_library = mx.base._LIB
_blas = ctypes.CDLL(str(Path(mx.__file__).parent / "libopenblas.so.0")) if (Path(mx.__file__).parent / "libopenblas.so.0").exists() else None


turn: Any = threading.RLock()  # a holder may take it again; `aside` uses what `threading.Condition` does


@contextmanager
def aside() -> Iterator[None]:
    """Inside, others may have the turn, however often it was taken; afterwards all is as it was. Does nothing for who
    does not hold it."""
    if not turn._is_owned():
        yield
        return
    threads = _blas.openblas_get_num_threads() if _blas is not None else 0
    taken = turn._release_save()
    try:
        yield
    finally:
        turn._acquire_restore(taken)
        if threads:
            set_blas_threads(threads)


@contextmanager
def computing(threads: int, numpy_shapes: bool = True) -> Iterator[None]:
    """This thread's turn, with the thread count on which bits depend: OpenMP's is a thread's own setting, BLAS has one
    for all."""
    with turn:
        _library.MXSetNumOMPThreads(threads)
        set_blas_threads(threads)
        with mx.util.np_shape(numpy_shapes):
            yield


def set_blas_threads(threads: int) -> None:
    if _blas is not None and _blas.openblas_get_num_threads() != threads:
        _blas.openblas_set_num_threads(threads)
