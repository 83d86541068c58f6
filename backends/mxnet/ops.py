"""`elastic.model.ops.Ops` on MXNet's native kernels. The shapes are documented there.

Calls must stand inside `mx.util.np_shape(True)`: without it MXNet takes a dim of length 0 and a shape () for "unknown".
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import backends.mxnet  # noqa: F401  (sets what MXNet reads when it loads)

# isort: split
import mxnet as mx

from backends.mxnet.arrays import copied_in
from backends.mxnet.collectives import AcrossOps, Guarded
from backends.mxnet.routing import ChoiceOps
from elastic.model import ops as neutral

Array = Any  # mx.np.ndarray


def kernel(path: str) -> Callable[..., Array]:
    """One of the kernels that ops have at hand, as a method."""
    found = operator.attrgetter(path)
    return lambda ops, *arrays: found(ops)(*arrays)


class MXNetOps(AcrossOps, ChoiceOps):
    """Kernels on the CPU. `dtype` is what constants of floating point become; `apart`: biases are added by a kernel of
    their own, for the product's gives them no gradient where its weight wants none.
    """

    name = "mxnet"
    add = kernel("np.add")
    subtract = kernel("np.subtract")
    multiply = kernel("np.multiply")
    divide = kernel("np.divide")
    exp = kernel("np.exp")
    log = kernel("np.log")
    sqrt = kernel("np.sqrt")
    relu = kernel("npx.relu")
    sigmoid = kernel("npx.sigmoid")
    tanh = kernel("np.tanh")

    def __init__(self, dtype: Any = np.float32, np_space: Any = mx.np, npx_space: Any = mx.npx, apart: bool = False):
        self.dtype, self.apart = np.dtype(dtype), apart
        self.np, self.npx = np_space, npx_space  # the kernels: MXNet's own, or a recorder in front of them

    def constant(self, values: Any) -> Array:
        return to_array(values, self.dtype)

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        return self.np.reshape(x, tuple(shape))

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        axes = tuple(axes)
        # the classic kernel is oneDNN's: on four dims it takes a quarter of the newer one's time
        return x if axes == tuple(range(len(axes))) else self.classic("transpose", x, axes=axes)[0]

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array:
        return self.np.concatenate(tuple(arrays), axis)

    def unbind(self, x: Array, axis: int) -> tuple[Array, ...]:
        return tuple(self.classic("SliceChannel", x, num_outputs=x.shape[axis], axis=axis, squeeze_axis=True))

    def narrow(self, x: Array, axis: int, start: int, length: int) -> Array:
        if start == 0 and length == x.shape[axis]:
            return x
        begin, end = [None] * len(x.shape), [None] * len(x.shape)
        begin[axis], end[axis] = start, start + length  # type: ignore[call-overload]
        return self.npx.slice(x, begin=tuple(begin), end=tuple(end))

    def gather(self, table: Array, indices: Array, dim: str = "", length: int = 0) -> Array:
        rows, *rest = table.shape
        width = math.prod(rest)
        split = self.degree(dim) > 1
        inside = None
        if split:
            indices, inside = self.local(indices, *self.span(dim, rows, length))
        found = self.npx.embedding(indices, self._reshaped(table, (rows, width)), input_dim=rows, output_dim=width)
        if split:
            found = self.leave(self.np.multiply(found, self._reshaped(inside, (*indices.shape, 1))), dim)
        return self._reshaped(found, (*indices.shape, *rest))

    def local(self, indices: Array, start: int, count: int) -> tuple[Array, Array]:
        """Indices of a whole dim as those of the part that begins at `start`, and which of them lie in it: 1 or 0.
        Others are any index of it."""
        moved = self.np.subtract(indices, start)
        within = self.np.clip(moved, 0, count - 1)
        return within, self.np.multiply(self.np.equal(within, moved), self.constant(1.0))

    def sum(self, x: Array, axes: Sequence[int] | None = None, keep: bool = False) -> Array:
        return self.np.sum(x, axis=None if axes is None else tuple(axes), keepdims=keep)

    def mean(self, x: Array, axes: Sequence[int] | None = None, keep: bool = False) -> Array:
        return self.np.mean(x, axis=None if axes is None else tuple(axes), keepdims=keep)

    def contract(self, equation: str, x: Array, y: Array, bias: Array | None = None) -> Array:
        plan = contraction_plan(equation)
        sizes = dict(zip(plan.left + plan.right, (*x.shape, *y.shape)))

        def flat(array: Array, order: tuple[int, ...], *groups: str) -> Array:
            """The array with its dims in order, and each group of them as one."""
            return self._reshaped(self.transpose(array, order), tuple(_numel(sizes, group) for group in groups))

        if plan.batch:
            a = flat(x, plan.left_order, plan.batch, plan.lead, plan.inner)
            b = flat(y, plan.right_order, plan.batch, plan.trail, plan.inner)
            out = self.npx.batch_dot(a, b, transpose_b=True)
        else:
            a, b = flat(x, plan.left_order, plan.lead, plan.inner), flat(y, plan.right_order, plan.trail, plan.inner)
            shift = () if bias is None or plan.turned or self.apart else (self._reshaped(bias, (b.shape[0],)),)
            out = self.npx.fully_connected(a, b, *shift, num_hidden=b.shape[0], no_bias=not shift, flatten=False)
            bias = None if shift else bias
        out = self._reshaped(out, tuple(sizes[i] for i in plan.batch + plan.lead + plan.trail))
        out = self.transpose(out, plan.out_order)
        return out if bias is None else self.np.add(out, bias)

    def gelu(self, x: Array) -> Array:
        if self.dtype == np.float32:
            return self.npx.leaky_relu(x, act_type="gelu")
        # the constant in the slope of the library's erf is a float32: the true slope enters by a term whose value is 0
        v = self.stopped(x)
        below = self.np.multiply(self.np.add(self.npx.erf(self.np.multiply(v, math.sqrt(0.5))), 1.0), 0.5)
        density = self.np.multiply(self.np.exp(self.np.multiply(self.np.multiply(v, v), -0.5)),
                                   1 / math.sqrt(2 * math.pi))
        slope = self.stopped(self.np.add(below, self.np.multiply(v, density)))
        return self.np.add(self.stopped(self.np.multiply(v, below)), self.np.multiply(slope, self.np.subtract(x, v)))

    def softmax(self, x: Array, axis: int = -1) -> Array:
        return self.npx.softmax(x, axis=axis)

    def log_softmax(self, x: Array, axis: int = -1) -> Array:
        return self.npx.log_softmax(x, axis=axis)

    def layer_norm(self, x: Array, weight: Array, bias: Array | None = None, eps: float = 1e-5) -> Array:
        runs = self._reshaped(x, (math.prod(x.shape[:-1]), x.shape[-1]))
        out = self.np.multiply(self.standardised(runs, eps), self.widened(weight, runs.shape[0]))
        if bias is not None:
            out = self.np.add(out, self.widened(bias, runs.shape[0]))
        return self._reshaped(out, x.shape)

    def standardised(self, runs: Array, eps: float) -> Array:
        """(runs, n): each run with mean 0 and variance 1. By the kernel of batch norms, with runs for channels: that of
        layer norms takes twice the time, most of it backwards."""
        one, half = (self.constant(np.full(runs.shape[0], value)) for value in (1.0, 0.5))
        image = self._reshaped(runs, (1, *runs.shape, 1))
        # momentum 1: the kernel leaves the running statistics alone
        found = self.npx.batch_norm(image, one, self.constant(np.zeros(runs.shape[0])), half, half, momentum=1.0,
                                    eps=eps, fix_gamma=False, axis=1)
        return self._reshaped(found, runs.shape)

    def widened(self, x: Array, rows: int) -> Array:
        """(n,) -> (rows, n). A product with ones, whose gradient is a product too: the kernel that sums up after a
        broadcast takes ten times as long."""
        return self.npx.fully_connected(self.constant(np.ones((rows, 1))), self._reshaped(x, (x.shape[0], 1)),
                                        num_hidden=x.shape[0], no_bias=True,
                                        flatten=False)

    def rms_norm(self, x: Array, weight: Array, eps: float = 1e-6) -> Array:
        square = self.np.mean(self.np.multiply(x, x), axis=-1, keepdims=True)
        return self.np.multiply(self.np.divide(x, self.np.sqrt(self.np.add(square, eps))), weight)

    def attention(self, query: Array, key: Array, value: Array, causal: bool, rate: float = 0.0, seed: Any = 0,
                  tag: str = "") -> Array:
        rows, time, heads, d_head = query.shape
        turned = [self._reshaped(self.transpose(x, (0, 2, 1, 3)), (rows * heads, x.shape[1], x.shape[3]))
                  for x in (query, key, value)]
        scores = self.npx.batch_dot(self.np.multiply(turned[0], 1 / math.sqrt(d_head)), turned[1], transpose_b=True)
        # softmax's own lengths take three times as long, and a mask to broadcast costs a sum in its gradient
        if causal:
            later = np.triu(np.full(scores.shape[1:], -1e30), 1)
            scores = self.np.add(scores, self.constant(np.broadcast_to(later, scores.shape)))
        weights = self.npx.softmax(scores, axis=-1)
        if rate:
            whole = (rows, heads, *weights.shape[1:])
            weights = self._reshaped(self.dropout(self._reshaped(weights, whole), rate, seed, tag), weights.shape)
        return self.transpose(self._reshaped(self.npx.batch_dot(weights, turned[2]), (rows, heads, time, d_head)),
                              (0, 2, 1, 3))

    def dropout(self, x: Array, rate: float, seed: Any, tag: str) -> Array:
        if not neutral.dropout_levels(rate):
            return x
        return self.np.multiply(x, self.dropout_factors(x.shape, rate, seed, tag))

    def dropout_factors(self, shape: tuple[int, ...], rate: float, seed: Any, tag: str) -> Array:
        """What `dropout` multiplies by: 0, or the inverse of the share that is kept."""
        return to_array(factors(shape, rate, seed, tag, self.dtype), self.dtype)

    def recompute(self, function: Callable[..., Array], *arrays: Array) -> Array:
        # the library's loop over gradients ends at the first array that wants none: those that surely want one come
        # first
        order = sorted(range(len(arrays)), key=lambda i: arrays[i].grad is None)

        def ordered(*given: Array) -> Array:
            return function(*(array for _, array in sorted(zip(order, given), key=lambda pair: pair[0])))

        return Recomputed(self, ordered)(*(arrays[i] for i in order))

    def conv2d(self, x: Array, weight: Array, bias: Array | None = None, stride: int = 1, padding: int = 0) -> Array:
        tall, wide, _, filters = weight.shape
        inputs = [self.channels_first(x), self.transpose(weight, (3, 2, 0, 1))] + ([] if bias is None else [bias])
        return self.channels_last(self.npx.convolution(
            *inputs, kernel=(tall, wide), stride=(stride, stride), pad=(padding, padding), num_filter=filters,
            no_bias=bias is None))

    def max_pool(self, x: Array, size: int, stride: int, padding: int = 0) -> Array:
        return self.channels_last(self.npx.pooling(
            self.channels_first(x), kernel=(size, size), stride=(stride, stride), pad=(padding, padding),
            pool_type="max"))

    def batch_norm(self, x: Array, weight: Array, bias: Array, mean: Array, var: Array, training: bool,
                   momentum: float = 0.1,
                   eps: float = 1e-5) -> tuple[Array, Array, Array]:
        first, options = self.channels_first(x), {"eps": eps, "fix_gamma": False, "axis": 1}
        if not training:
            y = self.npx.batch_norm(first, weight, bias, mean, var, use_global_stats=True, **options)
            return self.channels_last(y), mean, var
        # the kernel would write to the running statistics: it gets others, and with momentum 1 it leaves them alone
        running = [self.constant(np.full(weight.shape, 0.5))] * 2
        y, batch_mean, inverse = self.npx.batch_norm(first, weight, bias, *running, momentum=1.0, output_mean_var=True,
                                                     **options)
        count = math.prod(x.shape[:-1])
        inverse = self.stopped(inverse)  # 1 / sqrt(variance + eps)
        batch_var = self.np.subtract(self.np.divide(1.0, self.np.multiply(inverse, inverse)), eps)
        found = self.stopped(batch_mean), self.np.multiply(batch_var, count / (count - 1) if count > 1 else math.nan)
        return self.channels_last(y), *(self.np.add(self.np.multiply(old, 1 - momentum),
                                                    self.np.multiply(new, momentum))
                                        for old, new in zip((mean, var), found))

    def group_norm(self, x: Array, groups: int, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
        first = self.channels_first(x)
        runs = self._reshaped(first, (x.shape[0], groups, math.prod(x.shape[1:]) // groups))
        ones = np.ones(runs.shape[-1])
        # not `standardised`: within a graph the kernel of batch norms refuses what a convolution gave, reshaped
        scaled = self.npx.layer_norm(runs, self.constant(ones), self.constant(0 * ones), axis=-1, eps=eps)
        scaled = self.channels_last(self._reshaped(scaled, first.shape))
        return self.np.add(self.np.multiply(scaled, weight), bias)

    def channels_first(self, x: Array) -> Array:
        """(rows, ..., c) -> (rows, c, ...), the only layout that MXNet's kernels for images know on a CPU."""
        return self.transpose(x, (0, len(x.shape) - 1, *range(1, len(x.shape) - 1)))

    def channels_last(self, x: Array) -> Array:
        return self.transpose(x, (0, *range(2, len(x.shape)), 1))

    def stopped(self, x: Array) -> Array:
        """The same values, through which no gradient passes."""
        return self.classic("BlockGrad", x)[0]

    def classic(self, name: str, x: Array, **keywords: Any) -> list[Array]:
        """The outputs of a kernel that MXNet's newer name spaces lack."""
        found = getattr(mx.nd, name)(x.as_nd_ndarray(), **keywords)
        return [out.as_np_ndarray() for out in (found if isinstance(found, list) else [found])]

    def attach(self, x: Array, penalty: Array) -> Array:
        # this kernel's gradient is 1, whatever comes back
        said = self.classic("make_loss", penalty)[0]
        return self.np.add(x, self.np.multiply(said, 0.0))

    def cross_entropy(self, logits: Array, targets: Array, weights: Array, dim: str = "", length: int = 0) -> Array:
        if self.degree(dim) > 1:
            return self.split_cross_entropy(logits, targets, weights, dim, length)
        each = self.npx.pick(self.npx.log_softmax(logits, axis=-1), targets, axis=-1)
        return self.np.negative(self.np.sum(self.np.multiply(each, weights)))

    def split_cross_entropy(self, logits: Array, targets: Array, weights: Array, dim: str, length: int) -> Array:
        """log of the sum of exp(z) over all workers, less the target's z, which one of them has; z are the logits less
        their maximum."""
        peak = self.across("peak", self.stopped(self.np.max(logits, axis=-1)), dim, 0)
        lowered = self.np.subtract(logits, self._reshaped(peak, (*peak.shape, 1)))
        within, inside = self.local(targets, *self.span(dim, logits.shape[-1], length))
        own = self.np.multiply(self.npx.pick(lowered, within, axis=-1), inside)
        both = self.leave(self.np.concatenate([self._reshaped(part, (1, *targets.shape)) for part in (
            self.np.sum(self.np.exp(lowered), axis=-1), own)], 0), dim)
        every, target = self.unbind(both, 0)
        return self.np.sum(self.np.multiply(self.np.subtract(self.np.log(every), target), weights))

    def binary_cross_entropy(self, logits: Array, targets: Array, weights: Array) -> Array:
        # the two classes have the scores 0 and z: stable, and with the right slope at z = 0, where kernels of |z| have
        # none
        pair = self.np.concatenate((self._reshaped(self.np.multiply(logits, 0.0), (*logits.shape, 1)),
                                    self._reshaped(logits, (*logits.shape, 1))), -1)
        both = self._reshaped(targets, (*targets.shape, 1))
        likely = self.np.concatenate((self.np.subtract(1.0, both), both), -1)
        each = self.np.sum(self.np.multiply(self.npx.log_softmax(pair, axis=-1), likely), axis=-1)
        return self.np.negative(self.np.sum(self.np.multiply(each, weights)))

    def squared_error(self, x: Array, targets: Array, weights: Array) -> Array:
        difference = self.np.subtract(x, targets)
        return self.np.sum(self.np.multiply(self.np.multiply(difference, difference), weights))

    def correct(self, logits: Array, targets: Array, weights: Array, top: int = 1) -> Array:
        if top == 1:
            return self.np.sum(self.np.multiply(self.np.equal(self.np.argmax(logits, axis=-1), targets), weights))
        one, places = self.constant(1.0), self.constant(np.arange(logits.shape[-1]))
        own = self.npx.pick(logits, targets, axis=-1, keepdims=True)
        earlier = self.np.multiply(self.np.less(places, self._reshaped(targets, (*targets.shape, 1))), one)
        higher = self.np.multiply(self.np.greater(logits, own), one)
        rank = self.np.sum(self.np.add(higher, self.np.multiply(self.np.equal(logits, own), earlier)), axis=-1)
        return self.np.sum(self.np.multiply(self.np.less(rank, top), weights))

    def _reshaped(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x if tuple(x.shape) == tuple(shape) else self.np.reshape(x, shape)


class Recomputed(Guarded):
    """A function of arrays that keeps nothing but these, and runs a second time for its gradient."""

    def __init__(self, ops: AcrossOps, function: Callable[..., Array]):
        super().__init__(ops)
        self.function = function

    def forward(self, *arrays: Array) -> Array:
        self.arrays = arrays
        return self.function(*arrays)

    def slopes(self, slope: Array) -> tuple[Array, ...]:
        leaves = [array.detach() for array in self.arrays]
        for leaf in leaves:
            leaf.attach_grad()
        with mx.autograd.record():
            out = self.function(*leaves)
        out.backward(slope)
        return tuple(leaf.grad for leaf in leaves)


def to_array(values: Any, dtype: np.dtype) -> Array:
    """NumPy values as an array; floats take `dtype`, everything else int64 or int32 as it is."""
    array = np.asarray(values)
    if array.dtype.kind == "f":
        array = array.astype(dtype, copy=False)
    elif array.dtype != np.int32:
        array = array.astype(np.int64, copy=False)
    return copied_in(array)


def factors(shape: Sequence[int], rate: float, seed: int, tag: str, dtype: np.dtype) -> np.ndarray:
    scale = neutral.DROPOUT_LEVELS / (neutral.DROPOUT_LEVELS - neutral.dropout_levels(rate))
    return neutral.keep_mask(shape, rate, seed, tag).astype(dtype) * dtype.type(scale)


class Plan:
    """An einsum of two arrays as one matrix product (or a batch of them): which letters play which part."""

    def __init__(self, equation: str):
        inputs, out = equation.replace(" ", "").split("->")
        self.left, self.right = inputs.split(",")
        both = [i for i in self.left if i in self.right]
        self.batch = "".join(i for i in both if i in out)
        self.inner = "".join(i for i in both if i not in out)
        self.lead = "".join(i for i in self.left if i not in both)
        self.trail = "".join(i for i in self.right if i not in both)
        self.left_order = tuple(self.left.index(i) for i in self.batch + self.lead + self.inner)
        self.right_order = tuple(self.right.index(i) for i in self.batch + self.trail + self.inner)
        made = self.batch + self.lead + self.trail
        self.out_order = tuple(made.index(i) for i in out)
        self.turned = made != out


contraction_plan = functools.cache(Plan)


def _numel(sizes: dict[str, int], letters: str) -> int:
    return math.prod(sizes[letter] for letter in letters)
