"""Kernels of dims that are split over an axis of the mesh: what they exchange, forward and backward.

Whatever crosses workers goes through `_between`: at once where kernels run one by one, else noted in the recording of a program. The
axis is looked up when data is there, so a generation's new groups change no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from backends.common import largest, side_by_side, summed, swapped
from elastic.model import ops as neutral

if TYPE_CHECKING:
    from backends.tensorflow.tracing import Recording

Tensor = Any  # tf.Tensor
Pull = Callable[[Tensor], Any]


class SplitKernels(neutral.Kernels):
    """`recording` is that of the program that is being traced, if one is."""

    recording: Recording | None = None

    def part(self, dim: str) -> int:
        part = super().part(dim)
        if self.recording is not None and self.degree(dim) > 1:
            self.recording.parts[dim] = part
        return part

    def _enter(self, x: Tensor, dim: str) -> Tensor:
        @tf.custom_gradient
        def kernel(x: Tensor) -> tuple[Tensor, Pull]:
            return tf.identity(x), lambda g: self._sum(g, dim)

        return kernel(x)

    def _leave(self, x: Tensor, dim: str) -> Tensor:
        @tf.custom_gradient
        def kernel(x: Tensor) -> tuple[Tensor, Pull]:
            return self._sum(x, dim), lambda g: g

        return kernel(x)

    def _collect(self, x: Tensor, dim: str, length: int) -> Tensor:
        lead = tuple(x.shape)[:-1]

        def host(own: np.ndarray) -> np.ndarray:
            return side_by_side(self.axes[dim], own, length)

        @tf.custom_gradient
        def kernel(x: Tensor) -> tuple[Tensor, Pull]:
            begin = tf.concat([tf.zeros(len(lead), tf.int64), self._start(dim, length)[None]], 0)
            return self._between(x, (*lead, length), host), lambda g: tf.slice(g, begin, tf.constant(tuple(x.shape), tf.int64))

        return kernel(x)

    def _exchange(self, x: Tensor, dim: str) -> Tensor:
        shape = tuple(x.shape)

        def host(own: np.ndarray) -> np.ndarray:
            return swapped(self.axes[dim], np.array(own))  # a copy, as below

        @tf.custom_gradient
        def kernel(x: Tensor) -> tuple[Tensor, Pull]:
            return self._between(x, shape, host), lambda g: self._between(g, shape, host)

        return kernel(x)

    def attach(self, x: Tensor, penalty: Tensor) -> Tensor:
        @tf.custom_gradient
        def kernel(x: Tensor, penalty: Tensor) -> tuple[Tensor, Pull]:
            return tf.identity(x), lambda g: (g, tf.ones_like(penalty))

        return kernel(x, penalty)

    def _rows(self, table: Tensor, indices: Tensor, dim: str, length: int) -> Tensor:
        """Of the rows asked for those that are here, zeros for the others."""
        local, here = self._local(indices, dim, length, table.shape[0])
        return tf.where(tf.reshape(here, (*here.shape, *[1] * (len(table.shape) - 1))), tf.gather(table, local), tf.zeros((), table.dtype))

    def _split_cross_entropy(self, logits: Tensor, targets: Tensor, weights: Tensor, dim: str, length: int) -> Tensor:
        """Shoeybi et al. 2019, section 3; logits (n, classes here), targets and weights (n,)."""
        num_rows, num_here = logits.shape
        local, here = self._local(targets, dim, length, num_here)

        @tf.custom_gradient
        def kernel(logits: Tensor) -> tuple[Tensor, Pull]:
            # a copy: TensorFlow's own memory may not be written to, and libraries warn of what may not
            highest = self._between(tf.reduce_max(logits, 1), (num_rows,), lambda own: largest(self.axes[dim], np.array(own)))
            shifted = logits - highest[:, None]
            each = tf.exp(shifted)
            own = tf.where(here, tf.gather(shifted, local, batch_dims=1), tf.zeros((), logits.dtype))
            both = self._sum(tf.stack([tf.reduce_sum(each, 1), own]), dim)

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

    def _sum(self, x: Tensor, dim: str) -> Tensor:
        x = tf.convert_to_tensor(x)
        return self._between(x, tuple(x.shape), lambda own: summed(self.axes[dim], own))

    def _between(self, x: Tensor, shape: Sequence[int], host: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        if tf.executing_eagerly():
            return tf.constant(host(np.asarray(x)))
        assert self.recording is not None, "a collective in a graph that is no program"
        return self.recording.cut(x, shape, host)
