"""Kernels that choose: integers, without a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from elastic.model import ops as neutral

Array = Any  # mx.np.ndarray


class ChoiceOps(neutral.Kernels):
    """On the spaces `np` and `npx` of `backends.mxnet.ops.MXNetOps`."""

    np: Any
    npx: Any
    dtype: Any
    constant: Any
    stopped: Any

    def one_hot(self, indices: Array, num: int) -> Array:
        return self.npx.one_hot(indices, num, dtype=self.dtype.name)

    def top_k(self, x: Array, k: int) -> Array:
        x, out = self.stopped(x), []
        for _ in range(k):  # argmax takes the earlier of equals, topk whichever
            out.append(self.np.argmax(x, axis=-1))
            x = self.np.add(x, self.np.multiply(self.one_hot(out[-1], x.shape[-1]), float(np.finfo(np.float32).min)))
        return self.np.stack(tuple(out), -1)

    def queue(self, chosen: Array, num: int, capacity: int) -> tuple[Array, Array]:
        """Without scattering, which has no symbol: sorted by queue and turn, the choices of one queue are a run."""
        (rows, choices), np_ = chosen.shape, self.np
        queues, count = np_.reshape(np_.transpose(chosen, (1, 0)), (-1,)), rows * choices
        hot = self.npx.one_hot(queues, num, dtype="int64")
        position = np_.subtract(np_.sum(np_.multiply(np_.cumsum(hot, axis=0), hot), axis=1), 1)
        places = np_.where(np_.less(position, capacity), np_.add(np_.multiply(queues, capacity), position),
                           self.constant(np.full(count, num * capacity)))

        order = np_.argsort(np_.add(np_.multiply(queues, count), self.constant(np.arange(count))), axis=-1)
        in_order = np_.take(self.constant(np.tile(np.arange(rows), choices)), order, axis=0, mode="clip")
        lengths = np_.sum(hot, axis=0)
        starts = np_.subtract(np_.cumsum(lengths, axis=0), lengths)
        nth = self.constant(np.arange(capacity)[None])
        standing = np_.take(in_order, np_.add(np_.reshape(starts, (num, 1)), nth), axis=0, mode="clip")
        sources = np_.where(np_.less(nth, np_.reshape(lengths, (num, 1))), standing,
                            self.constant(np.full((num, capacity), rows)))
        return np_.transpose(np_.reshape(places, (choices, rows)), (1, 0)), np_.reshape(sources, (-1,))
