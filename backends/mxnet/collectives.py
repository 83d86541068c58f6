"""What passes between workers inside a model: collectives as kernels, with what their gradients do on the way back.

The data goes through NumPy, copied both ways: kernels keep arrays in orders of their own, and bits depend on where
operands lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mxnet as mx
import numpy as np

from backends.common import MOVES, as_it_is, largest
from backends.mxnet.arrays import copied_in
from backends.mxnet.turn import aside
from elastic.model import ops as neutral
from elastic.parallel.axis import span

Array = Any  # mx.np.ndarray
Move = Callable[[Any, np.ndarray, int], np.ndarray]  # over an axis, of a dim of this length in all


class AcrossOps(neutral.Kernels):
    """The kernels between workers; a recorder overrides `across` alone."""

    # what went wrong on a way back, where MXNet's own code stands between it and the caller
    lost: BaseException | None = None

    def across(self, kind: str, x: Array, dim: str, length: int) -> Array:
        if kind == "peak":  # the maximum, which has no gradient
            return self.moved(largest, x, dim, length)
        return Across(self, kind, dim, length)(x)

    def moved(self, move: Move, x: Array, dim: str, length: int) -> Array:
        """A new array. The lock of this process's kernels is free while others are waited for."""
        if move is as_it_is:
            return x.detach()
        values = x.asnumpy()
        with aside():
            found = move(self.axes[dim], values, length)
        return copied_in(found)

    def raise_lost(self) -> None:
        """After a backward pass: raises what was lost in it."""
        lost, self.lost = self.lost, None
        if lost is not None:
            raise lost

    def span(self, dim: str, own: int, length: int) -> tuple[int, int]:
        """(start, count) of this worker's part of a dim, `own` long."""
        return span(length or own * self.degree(dim), self.degree(dim), self.part(dim))


class Guarded(mx.autograd.Function):
    """A function of arrays whose way back raises nothing: MXNet would print it, and leave its own state as it is.

    `raise_lost` does it afterwards; what is left of the pass goes on with zeros, which costs little beside a new
    generation. `slopes` gives the gradients of the arguments from that of what `forward` gave.
    """

    slopes: Callable[[Array], tuple[Array, ...]]

    def __init__(self, ops: AcrossOps):
        super().__init__()
        self.ops = ops

    def __call__(self, *arrays: Array) -> Array:
        self.given = [(array.shape, array.dtype) for array in arrays]
        return super().__call__(*arrays)

    def backward(self, slope: Any) -> tuple[Any, ...]:
        found: tuple[Array, ...] = ()
        try:
            if self.ops.lost is None:
                found = self.slopes(slope.as_np_ndarray())
        except BaseException as error:  # noqa: BLE001  (raised again by `raise_lost`)
            self.ops.lost = error
        return tuple(array.as_nd_ndarray() for array in found
                     or [mx.np.zeros(shape, dtype=dtype) for shape, dtype in self.given])


class Across(Guarded):
    """One collective. Axes are looked up when it runs: each generation has its own."""

    def __init__(self, ops: AcrossOps, kind: str, dim: str, length: int):
        super().__init__(ops)
        self.kind, self.dim, self.length = kind, dim, length

    def forward(self, x: Array) -> Array:
        return self.ops.moved(MOVES[self.kind][0], x, self.dim, self.length)

    def slopes(self, slope: Array) -> tuple[Array, ...]:
        return (self.ops.moved(MOVES[self.kind][1], slope, self.dim, self.length),)
