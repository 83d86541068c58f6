"""`elastic.model.ops.Ops` on TensorFlow's native kernels, eager or traced. The shapes are documented there.

Shapes must be known when a function is traced. A seed may be a Python number or a scalar uint64 tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from backends.common import matrix_product
from backends.tensorflow.collectives import SplitKernels

# isort: split
import tensorflow as tf

from elastic.model import ops as neutral

Tensor = Any  # tf.Tensor

U64 = (1 << 64) - 1


class TensorFlowOps(SplitKernels):
    """Kernels on the CPU. `dtype` is what constants of floating point become."""

    name = "tensorflow"
    concatenate = staticmethod(tf.concat)
    exp = staticmethod(tf.exp)
    log = staticmethod(tf.math.log)
    sqrt = staticmethod(tf.sqrt)
    relu = staticmethod(tf.nn.relu)
    sigmoid = staticmethod(tf.sigmoid)
    tanh = staticmethod(tf.tanh)
    softmax = staticmethod(tf.nn.softmax)
    log_softmax = staticmethod(tf.nn.log_softmax)

    def __init__(self, dtype: Any = np.float32):
        self.dtype = np.dtype(dtype)

    def constant(self, values: Any) -> Tensor:
        array = np.asarray(values)
        return tf.constant(array.astype(self.dtype) if array.dtype.kind == "f" else array)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return tf.reshape(x, tuple(shape))

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return tf.transpose(x, tuple(axes))

    def unbind(self, x: Tensor, axis: int) -> tuple[Tensor, ...]:
        return tuple(tf.unstack(x, axis=axis))

    def narrow(self, x: Tensor, axis: int, start: int, length: int) -> Tensor:
        begin, size = [0] * len(x.shape), list(x.shape)
        begin[axis], size[axis] = start, length
        return tf.slice(x, begin, size)

    def gather(self, table: Tensor, indices: Tensor, dim: str = "", length: int = 0) -> Tensor:
        if self.degree(dim) == 1:
            return tf.gather(table, indices)
        return self.leave(self._rows(table, indices, dim, length), dim)

    def sum(self, x: Tensor, axes: Sequence[int] | None = None, keep: bool = False) -> Tensor:
        return tf.reduce_sum(x, None if axes is None else tuple(axes), keepdims=keep)

    def mean(self, x: Tensor, axes: Sequence[int] | None = None, keep: bool = False) -> Tensor:
        return tf.reduce_mean(x, None if axes is None else tuple(axes), keepdims=keep)

    def contract(self, equation: str, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
        lead, trail, turned = matrix_product(equation) or (0, 0, False)
        if not trail:
            out = tf.einsum(equation, x, y)
            return out if bias is None else out + bias
        left = tuple(x.shape)[:lead]
        right = tuple(y.shape)[:trail] if turned else tuple(y.shape)[len(y.shape) - trail:]
        rows, columns = math.prod(left), math.prod(right)
        inner = math.prod(tuple(x.shape)[lead:])
        flat_y = tf.reshape(y, (columns, inner) if turned else (inner, columns))
        out = tf.linalg.matmul(tf.reshape(x, (rows, inner)), flat_y, transpose_b=turned)
        if bias is not None:
            out = tf.nn.bias_add(out, tf.reshape(bias, (columns,)))
        return tf.reshape(out, left + right)

    @staticmethod
    @tf.custom_gradient
    def gelu(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """x Phi(x); Phi is kept for the gradient Phi(x) + x phi(x)."""
        below = 0.5 + 0.5 * tf.math.erf(x * math.sqrt(0.5))

        def pull(g: Tensor) -> Tensor:
            return g * (below + x * tf.exp(tf.square(x) * -0.5) * (1 / math.sqrt(2 * math.pi)))

        return x * below, pull

    def one_hot(self, indices: Tensor, num: int) -> Tensor:
        return tf.one_hot(indices, num, dtype=self.dtype)

    def top_k(self, x: Tensor, k: int) -> Tensor:
        return tf.cast(tf.math.top_k(tf.stop_gradient(x), k).indices, tf.int64)

    def queue(self, chosen: Tensor, num: int, capacity: int) -> tuple[Tensor, Tensor]:
        (rows, choices), full = chosen.shape, num * capacity
        queues = tf.reshape(tf.transpose(chosen), (-1,))
        hot = tf.one_hot(queues, num, dtype=tf.int64)
        position = tf.reduce_sum(tf.cumsum(hot) * hot, 1) - 1
        places = tf.where(position < capacity, queues * capacity + position, full)
        row = tf.tile(tf.range(rows, dtype=tf.int64), (choices,))
        # those without a place fall behind the last
        sources = tf.tensor_scatter_nd_update(tf.fill((full + 1,), tf.constant(rows, tf.int64)), places[:, None], row)
        return tf.transpose(tf.reshape(places, (choices, rows))), sources[:full]

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        out = normalised(x, (-1,), eps) * weight
        return out if bias is None else out + bias

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        return x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + eps) * weight

    def attention(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, rate: float = 0.0, seed: Any = 0,
                  tag: str = "") -> Tensor:
        query, key, value = (tf.transpose(x, (0, 2, 1, 3)) for x in (query * (1 / math.sqrt(query.shape[-1])), key,
                                                                     value))
        scores = tf.linalg.matmul(query, key, transpose_b=True)
        if causal:
            scores += np.triu(np.full(tuple(scores.shape)[-2:], -np.inf, self.dtype), 1)
        weights = self.dropout(tf.nn.softmax(scores), rate, seed, tag)
        return tf.transpose(tf.linalg.matmul(weights, value), (0, 2, 1, 3))

    def dropout(self, x: Tensor, rate: float, seed: Any, tag: str) -> Tensor:
        levels = neutral.dropout_levels(rate)
        if not levels:
            return x
        keep = tf.cast(keep_mask(tuple(x.shape), levels, seed, tag), x.dtype)
        return x * (keep * (neutral.DROPOUT_LEVELS / (neutral.DROPOUT_LEVELS - levels)))

    def recompute(self, function: Callable[..., Tensor], *arrays: Tensor) -> Tensor:
        return tf.recompute_grad(function)(*arrays)

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1,
               padding: int = 0) -> Tensor:
        # by kernels twice as fast at times
        same = stride == 1 and tuple(weight.shape)[:2] == (2 * padding + 1, 2 * padding + 1)
        out = tf.nn.conv2d(x, weight, stride, "SAME" if same else around(padding) if padding else "VALID")
        return out if bias is None else tf.nn.bias_add(out, bias)

    def max_pool(self, x: Tensor, size: int, stride: int, padding: int = 0) -> Tensor:
        return tf.nn.max_pool2d(x, size, stride, around(padding))

    def batch_norm(self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, training: bool,
                   momentum: float = 0.1,
                   eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
        axes = tuple(range(len(x.shape) - 1))
        if not training:
            factor = weight * tf.math.rsqrt(var + eps)
            return x * factor + (bias - mean * factor), mean, var
        num = math.prod(tuple(x.shape)[:-1])
        if x.dtype == tf.float32:  # the fused kernel knows no other
            flat = tf.reshape(x, (num, 1, 1, x.shape[-1]))
            y, batch_mean, batch_var, *_ = tf.raw_ops.FusedBatchNormV3(
                x=flat, scale=weight, offset=bias, mean=(), variance=(), epsilon=eps, exponential_avg_factor=1.0,
                is_training=True)
            y = tf.reshape(y, x.shape)
        else:
            batch_mean = tf.reduce_mean(x, axes)
            batch_var = tf.reduce_mean(tf.square(x - batch_mean), axes) * (num / max(num - 1, 1))
            y = normalised(x, axes, eps) * weight + bias
        return (y, (1 - momentum) * mean + momentum * tf.stop_gradient(batch_mean),
                (1 - momentum) * var + momentum * tf.stop_gradient(batch_var))

    def group_norm(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        rows, channels = x.shape[0], x.shape[-1]
        apart = tf.reshape(x, (rows, math.prod(tuple(x.shape)[1:-1]), groups, channels // groups))
        return tf.reshape(normalised(apart, (1, 3), eps), x.shape) * weight + bias

    def cross_entropy(self, logits: Tensor, targets: Tensor, weights: Tensor, dim: str = "", length: int = 0) -> Tensor:
        logits, targets = tf.reshape(logits, (-1, logits.shape[-1])), tf.reshape(targets, (-1,))
        weights = tf.stop_gradient(tf.reshape(weights, (-1,)))
        if self.degree(dim) > 1:
            return self._split_cross_entropy(logits, targets, weights, dim, length)
        # the public function takes a detour of four kernels where op determinism is on, for the sake of a GPU's
        each, _ = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(features=logits, labels=targets)
        return tf.reduce_sum(each * weights)

    def binary_cross_entropy(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        each = tf.nn.sigmoid_cross_entropy_with_logits(tf.stop_gradient(targets), logits)
        return tf.reduce_sum(each * tf.stop_gradient(weights))

    def squared_error(self, x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return tf.reduce_sum(tf.square(x - tf.stop_gradient(targets)) * tf.stop_gradient(weights))

    def correct(self, logits: Tensor, targets: Tensor, weights: Tensor, top: int = 1) -> Tensor:
        targets = tf.cast(targets, tf.int64)[..., None]
        own = tf.gather(logits, targets, axis=-1, batch_dims=len(logits.shape) - 1)
        earlier = tf.range(logits.shape[-1], dtype=tf.int64) < targets
        rank = tf.math.count_nonzero((logits > own) | ((logits == own) & earlier), -1)
        return tf.stop_gradient(tf.reduce_sum(tf.cast(rank < top, weights.dtype) * weights))


def around(padding: int) -> list[list[int]]:
    both = [padding, padding]
    return [[0, 0], both, both, [0, 0]]


def normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over `axes`, the variance biased. Ba et al. 2016."""
    @tf.custom_gradient
    def kernel(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        centred = x - tf.reduce_mean(x, axes, keepdims=True)
        factor = tf.math.rsqrt(tf.reduce_mean(tf.square(centred), axes, keepdims=True) + eps)
        y = centred * factor

        def pull(g: Tensor) -> Tensor:
            return factor * (g - tf.reduce_mean(g, axes,
                                                keepdims=True) - y * tf.reduce_mean(g * y, axes, keepdims=True))

        return y, pull

    return kernel(x)


def keep_mask(shape: tuple[int, ...], levels: int, seed: Any, tag: str) -> Tensor:
    """`elastic.model.ops.keep_mask` in tensor arithmetic, so that the seed may be a tensor."""
    size = math.prod(shape)
    if isinstance(seed, int):
        seed = tf.constant(np.uint64(seed & U64))
    start = mixed(seed + np.uint64(neutral.GOLDEN * (neutral.tag_key(tag) + 1) & U64))
    steps = np.arange(1, -(-size // 4) + 1, dtype=np.uint64) * np.uint64(neutral.GOLDEN)
    parts = tf.reshape(tf.bitcast(mixed(start + steps), tf.int16), (-1,))[:size]
    return tf.reshape(parts >= levels - neutral.DROPOUT_LEVELS // 2, shape)


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on uint64."""
    for by, factor in ((30, neutral.MIX1), (27, neutral.MIX2)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, np.uint64(by))) * np.uint64(factor)
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, np.uint64(31)))
