"""Kernels of dims that are split over an axis of the mesh: what they exchange, forward and backward.

Whatever crosses workers goes through `_between`: at once where kernels run one by one, else noted in the recording of a
program. The axis is looked up when data is there, so a generation's new groups change no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from backends.common import MOVES, as_it_is, largest, summed
from elastic.model import ops as neutral

if TYPE_CHECKING:
    from backends.tensorflow.tracing import Recording

Tensor = Any  # tf.Tensor
Pull = Callable[[Tensor], Any]
Move = Callable[[Any, np.ndarray, int], np.ndarray]


class SplitKernels(neutral.Kernels):
    """`recording` is that of the program that is being traced, if one is."""

    recording: Recording | None = None

    def part(self, dim: str) -> int:
        part = super().part(dim)
        if self.recording is not None and self.degree(dim) > 1:
            self.recording.parts[dim] = part
        return part

    def across(self, kind: str, x: Tensor, dim: str, length: int) -> Tensor:
        (there, back), shape = MOVES[kind], tuple(x.shape)

        @tf.custom_gradient
        def kernel(x: Tensor) -> tuple[Tensor, Pull]:
            if kind != "collect":
                return self._moved(there, x, dim), lambda g: self._moved(back, g, dim)
            begin = tf.concat([tf.zeros(len(shape) - 1, tf.int64), self._start(dim, length)[None]], 0)
            found = self._between(x, (*shape[:-1], length), lambda own: there(self.axes[dim], own, length))
            return found, lambda g: tf.slice(g, begin, tf.constant(shape, tf.int64))

        return kernel(x)

    def attach(self, x: Tensor, penalty: Tensor) -> Tensor:
        @tf.custom_gradient
        def kernel(x: Tensor, penalty: Tensor) -> tuple[Tensor, Pull]:
            return tf.identity(x), lambda g: (g, tf.ones_like(penalty))

        return kernel(x, penalty)

    def _rows(self, table: Tensor, indices: Tensor, dim: str, length: int) -> Tensor:
        """Of the rows asked for those that are here, zeros for the others."""
        local, here = self._local(indices, dim, length, table.shape[0])
        return tf.where(tf.reshape(here, (*here.shape, *[1] * (len(table.shape) - 1))), tf.gather(table, local),
                        tf.zeros((), table.dtype))

    def _split_cross_entropy(self, logits: Tensor, targets: Tensor, weights: Tensor, dim: str, length: int) -> Tensor:
        """Shoeybi et al. 2019, section 3; logits (n, classes here), targets and weights (n,)."""
        num_here = logits.shape[1]
        local, here = self._local(targets, dim, length, num_here)

        @tf.custom_gradient
        def kernel(logits: Tensor) -> tuple[Tensor, Pull]:
            highest = self._moved(largest, tf.reduce_max(logits, 1), dim)
            shifted = logits - highest[:, None]
            each = tf.exp(shifted)
            own = tf.where(here, tf.gather(shifted, local, batch_dims=1), tf.zeros((), logits.dtype))
            both = self._moved(summed, tf.stack([tf.reduce_sum(each, 1), own]), dim)

            def pull(g: Tensor) -> Tensor:
                hit = tf.cast(here, logits.dtype)[:, None] * tf.one_hot(local, num_here, dtype=logits.dtype)
                return (each / both[0][:, None] - hit) * (weights * g)[:, None]

            return tf.reduce_sum((tf.math.log(both[0]) - both[1]) * weights), pull

        return kernel(logits)

    def _local(self, indices: Tensor, dim: str, length: int, count: int) -> tuple[Tensor, Tensor]:
        """Places within this worker's span, any place for those outside, and which are inside."""
        local = tf.cast(indices, tf.int64) - self._start(dim, length)
        here = (local >= 0) & (local < count)
        return tf.where(here, local, tf.zeros((), tf.int64)), here

    def _start(self, dim: str, length: int) -> Tensor:
        """Where this worker's span of a dim begins, as `elastic.parallel.axis.span` has it."""
        each, more = divmod(length, self.degree(dim))
        place = tf.constant(self.axes[dim].rank, tf.int64) if self.recording is None else self.recording.place(dim)
        return place * each + tf.minimum(place, more)

    def _moved(self, move: Move, x: Tensor, dim: str) -> Tensor:
        x = tf.convert_to_tensor(x)
        if move is as_it_is:
            return tf.identity(x)
        # a copy: TensorFlow's own memory may not be written to, and libraries warn of what may not
        return self._between(x, tuple(x.shape), lambda own: move(self.axes[dim], own if move is summed
                                                                 else np.array(own), 0))

    def _between(self, x: Tensor, shape: Sequence[int], host: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        if tf.executing_eagerly():
            return tf.constant(host(np.asarray(x)))
        assert self.recording is not None, "a collective in a graph that is no program"
        return self.recording.cut(x, shape, host)
