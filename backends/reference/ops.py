"""`elastic.model.ops.Ops` in NumPy, each kernel as its formula says. The shapes are documented there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from backends.common import MOVES, largest, summed
from backends.reference.tape import record, value_of
from elastic.model import ops as neutral

Array = Any  # a Variable or a NumPy array

_erf = np.frompyfunc(math.erf, 1, 1)


class ReferenceOps(neutral.Kernels):
    """Kernels in one precision."""

    name = "reference"

    def __init__(self, dtype: Any = np.float32):
        self.dtype = np.dtype(dtype)

    def constant(self, values: Any) -> Array:
        array = np.asarray(values)
        return array.astype(self.dtype) if array.dtype.kind == "f" else array

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        value = value_of(x)
        return record(value.reshape(tuple(shape)), (x,), lambda g: (g.reshape(value.shape),))

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return record(value_of(x).transpose(axes), (x,), lambda g: (g.transpose(np.argsort(axes)),))

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array:
        values = [value_of(a) for a in arrays]
        cuts = np.cumsum([v.shape[axis] for v in values])[:-1]
        return record(np.concatenate(values, axis), tuple(arrays), lambda g: np.split(g, cuts, axis))

    def unbind(self, x: Array, axis: int) -> tuple[Array, ...]:
        shape = list(x.shape)
        length = shape.pop(axis)
        return tuple(self.reshape(self.narrow(x, axis, i, 1), shape) for i in range(length))

    def narrow(self, x: Array, axis: int, start: int, length: int) -> Array:
        value = value_of(x)
        where = [slice(None)] * value.ndim
        where[axis] = slice(start, start + length)

        def pull(g: np.ndarray) -> tuple[np.ndarray]:
            whole = np.zeros_like(value)
            whole[tuple(where)] = g
            return (whole,)

        return record(value[tuple(where)], (x,), pull)

    def gather(self, table: Array, indices: Array, dim: str = "", length: int = 0) -> Array:
        value = value_of(table)
        own, start = np.ones(indices.shape, bool), 0
        if self.degree(dim) > 1:
            start, count = self.axes[dim].span(length)
            own = (indices >= start) & (indices < start + count)
        rows = indices[own] - start
        found = np.zeros(indices.shape + value.shape[1:], value.dtype)
        found[own] = value[rows]

        def pull(g: np.ndarray) -> tuple[np.ndarray]:
            whole = np.zeros_like(value)
            np.add.at(whole, rows, g[own])
            return (whole,)

        return self.leave(record(found, (table,), pull), dim)

    def add(self, x: Array, y: Array) -> Array:
        return record(value_of(x) + value_of(y), (x, y), lambda g: (g, g))

    def subtract(self, x: Array, y: Array) -> Array:
        return record(value_of(x) - value_of(y), (x, y), lambda g: (g, -g))

    def multiply(self, x: Array, y: Array) -> Array:
        a, b = value_of(x), value_of(y)
        return record(a * b, (x, y), lambda g: (g * b, g * a))

    def divide(self, x: Array, y: Array) -> Array:
        a, b = value_of(x), value_of(y)
        return record(a / b, (x, y), lambda g: (g / b, -g * a / (b * b)))

    def exp(self, x: Array) -> Array:
        out = np.exp(value_of(x))
        return record(out, (x,), lambda g: (g * out,))

    def log(self, x: Array) -> Array:
        return record(np.log(value_of(x)), (x,), lambda g: (g / value_of(x),))

    def sqrt(self, x: Array) -> Array:
        out = np.sqrt(value_of(x))
        return record(out, (x,), lambda g: (g / (2 * out),))

    def sum(self, x: Array, axes: Sequence[int] | None = None, keep: bool = False) -> Array:
        value = value_of(x)
        every = tuple(range(value.ndim)) if axes is None else tuple(axis % value.ndim for axis in axes)
        kept = tuple(1 if i in every else length for i, length in enumerate(value.shape))
        return record(value.sum(axis=every, keepdims=keep), (x,),
                      lambda g: (np.broadcast_to(g.reshape(kept), value.shape),))

    def mean(self, x: Array, axes: Sequence[int] | None = None, keep: bool = False) -> Array:
        every = range(len(x.shape)) if axes is None else axes
        return self.divide(self.sum(x, axes, keep), self._number(math.prod(x.shape[axis] for axis in every)))

    def contract(self, equation: str, x: Array, y: Array, bias: Array | None = None) -> Array:
        inputs, out = equation.replace(" ", "").split("->")
        left, right = inputs.split(",")
        a, b = value_of(x), value_of(y)
        product = record(np.einsum(equation, a, b, optimize=True), (x, y), lambda g: (
            np.einsum(f"{out},{right}->{left}", g, b, optimize=True),
            np.einsum(f"{left},{out}->{right}", a, g, optimize=True)))
        return product if bias is None else self.add(product, bias)

    def relu(self, x: Array) -> Array:
        value = value_of(x)
        return record(np.maximum(value, 0), (x,), lambda g: (g * (value > 0),))

    def gelu(self, x: Array) -> Array:
        value = value_of(x)
        below = 0.5 * (1 + _erf(value / math.sqrt(2)).astype(value.dtype))
        density = np.exp(-0.5 * value * value) / math.sqrt(2 * math.pi)
        return record((value * below).astype(value.dtype), (x,), lambda g: (g * (below + value * density),))

    def sigmoid(self, x: Array) -> Array:
        value = value_of(x)
        out = np.exp(-np.logaddexp(0, -value))
        return record(out, (x,), lambda g: (g * out * (1 - out),))

    def tanh(self, x: Array) -> Array:
        out = np.tanh(value_of(x))
        return record(out, (x,), lambda g: (g * (1 - out * out),))

    def softmax(self, x: Array, axis: int = -1) -> Array:
        value = value_of(x)
        out = np.exp(value - value.max(axis=axis, keepdims=True))
        out = out / out.sum(axis=axis, keepdims=True)
        return record(out, (x,), lambda g: (out * (g - (g * out).sum(axis=axis, keepdims=True)),))

    def log_softmax(self, x: Array, axis: int = -1) -> Array:
        value = value_of(x)
        shifted = value - value.max(axis=axis, keepdims=True)
        out = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
        return record(out, (x,), lambda g: (g - np.exp(out) * g.sum(axis=axis, keepdims=True),))

    def one_hot(self, indices: Array, num: int) -> Array:
        return np.eye(num, dtype=self.dtype)[indices]

    def top_k(self, x: Array, k: int) -> Array:
        return np.argsort(-value_of(x), axis=-1, kind="stable")[..., :k]

    def queue(self, chosen: Array, num: int, capacity: int) -> tuple[Array, Array]:
        rows = chosen.shape[0]
        length, places, sources = [0] * num, np.full(chosen.shape, num * capacity), np.full(num * capacity, rows)
        for choice in range(chosen.shape[1]):
            for row in range(rows):
                queue = chosen[row, choice]
                if length[queue] < capacity:
                    places[row, choice] = queue * capacity + length[queue]
                    sources[places[row, choice]] = row
                length[queue] += 1
        return places, sources

    def layer_norm(self, x: Array, weight: Array, bias: Array | None = None, eps: float = 1e-5) -> Array:
        centred = self.subtract(x, self.mean(x, (-1,), keep=True))
        out = self.rms_norm(centred, weight, eps)  # the root mean square of what is centred is its deviation
        return out if bias is None else self.add(out, bias)

    def rms_norm(self, x: Array, weight: Array, eps: float = 1e-6) -> Array:
        square = self.mean(self.multiply(x, x), (-1,), keep=True)
        return self.multiply(self.divide(x, self.sqrt(self.add(square, self._number(eps)))), weight)

    def attention(self, query: Array, key: Array, value: Array, causal: bool, rate: float = 0.0, seed: int = 0,
                  tag: str = "") -> Array:
        scores = self.contract("bqhe,bkhe->bhqk", query, key)
        scores = self.multiply(scores, self._number(1 / math.sqrt(query.shape[-1])))
        if causal:
            scores = self.add(scores, np.triu(np.full(scores.shape[-2:], -np.inf, self.dtype), 1))
        return self.contract("bhqk,bkhe->bqhe", self.dropout(self.softmax(scores), rate, seed, tag), value)

    def dropout(self, x: Array, rate: float, seed: int, tag: str) -> Array:
        levels = neutral.dropout_levels(rate)
        if not levels:
            return x
        scale = self._number(neutral.DROPOUT_LEVELS / (neutral.DROPOUT_LEVELS - levels))
        return self.multiply(x, neutral.keep_mask(x.shape, rate, seed, tag) * scale)

    def recompute(self, function: Callable[..., Array], *arrays: Array) -> Array:
        return function(*arrays)  # an oracle may keep everything

    def across(self, kind: str, x: Array, dim: str, length: int) -> Array:
        (there, back), axis = MOVES[kind], self.axes[dim]
        return record(there(axis, value_of(x), length), (x,), lambda g: (back(axis, g, length),))

    def attach(self, x: Array, penalty: Array) -> Array:
        return record(value_of(x), (x, penalty), lambda g: (g, np.ones_like(value_of(penalty))))

    def conv2d(self, x: Array, weight: Array, bias: Array | None = None, stride: int = 1, padding: int = 0) -> Array:
        a, w = padded(value_of(x), padding, 0.0), value_of(weight)
        where = windows(a.shape, w.shape[:2], stride)
        product = sum(a[cut] @ w[i, j] for (i, j), cut in where.items())

        def pull(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            back, slope = np.zeros_like(a), np.zeros_like(w)
            for (i, j), cut in where.items():
                back[cut] += g @ w[i, j].T
                slope[i, j] = np.tensordot(a[cut], g, ((0, 1, 2), (0, 1, 2)))
            return trimmed(back, padding), slope

        out = record(product, (x, weight), pull)
        return out if bias is None else self.add(out, bias)

    def max_pool(self, x: Array, size: int, stride: int, padding: int = 0) -> Array:
        a = padded(value_of(x), padding, -np.inf)
        cuts = list(windows(a.shape, (size, size), stride).values())
        stacked = np.stack([a[cut] for cut in cuts])
        best = stacked.argmax(axis=0)

        def pull(g: np.ndarray) -> tuple[np.ndarray]:
            back = np.zeros_like(a)
            for place, cut in enumerate(cuts):
                back[cut] += g * (best == place)
            return (trimmed(back, padding),)

        return record(stacked.max(axis=0), (x,), pull)

    def batch_norm(self, x: Array, weight: Array, bias: Array, mean: Array, var: Array, training: bool,
                   momentum: float = 0.1,
                   eps: float = 1e-5) -> tuple[Array, Array, Array]:
        mean, var = np.asarray(value_of(mean), self.dtype), np.asarray(value_of(var), self.dtype)
        if not training:
            scaled = self.divide(self.subtract(x, mean), np.sqrt(var + self._number(eps)))
            return self.add(self.multiply(scaled, weight), bias), mean, var
        axes, value = tuple(range(len(x.shape) - 1)), value_of(x)
        centred = self.subtract(x, self.mean(x, axes, keep=True))
        square = self.mean(self.multiply(centred, centred), axes, keep=True)
        scaled = self.divide(centred, self.sqrt(self.add(square, self._number(eps))))
        keep, take = self._number(1 - momentum), self._number(momentum)
        return (self.add(self.multiply(scaled, weight), bias), keep * mean + take * value.mean(axis=axes),
                keep * var + take * value.var(axis=axes, ddof=1))

    def group_norm(self, x: Array, groups: int, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
        rows, channels = x.shape[0], x.shape[-1]
        apart = self.reshape(x, (rows, -1, groups, channels // groups))
        centred = self.subtract(apart, self.mean(apart, (1, 3), keep=True))
        square = self.mean(self.multiply(centred, centred), (1, 3), keep=True)
        scaled = self.reshape(self.divide(centred, self.sqrt(self.add(square, self._number(eps)))), x.shape)
        return self.add(self.multiply(scaled, weight), bias)

    def cross_entropy(self, logits: Array, targets: Array, weights: Array, dim: str = "", length: int = 0) -> Array:
        if self.degree(dim) > 1:
            return self._split_cross_entropy(logits, targets, weights, self.axes[dim], length)
        scores = self.log_softmax(logits)
        chosen = np.eye(logits.shape[-1], dtype=self.dtype)[targets]
        each = self.sum(self.multiply(scores, chosen), (-1,))
        return self.multiply(self.sum(self.multiply(each, weights)), self._number(-1.0))

    def _split_cross_entropy(self, logits: Array, targets: Array, weights: Array, axis: Any, length: int) -> Array:
        start, count = axis.span(length)
        value, classes = value_of(logits), np.arange(start, start + count)
        highest = largest(axis, value.max(axis=-1, initial=-np.inf))[..., None]
        shifted = np.exp(value - highest)
        chosen = targets[..., None] == classes
        mine = np.stack((shifted.sum(axis=-1), np.where(chosen, value, 0).sum(axis=-1)))
        total, logit = summed(axis, mine)
        each = np.log(total) + highest[..., 0] - logit
        slope = value_of(weights)[..., None] * (shifted / total[..., None] - chosen)
        return record((each * value_of(weights)).sum(), (logits,), lambda g: (g * slope,))

    def binary_cross_entropy(self, logits: Array, targets: Array, weights: Array) -> Array:
        z, y, w = value_of(logits), value_of(targets), value_of(weights)
        each = np.logaddexp(0, z) - z * y  # -y log s - (1 - y) log(1 - s), s = 1 / (1 + exp(-z))
        return record((w * each).sum(), (logits,), lambda g: (g * w * (np.exp(-np.logaddexp(0, -z)) - y),))

    def squared_error(self, x: Array, targets: Array, weights: Array) -> Array:
        difference = self.subtract(x, targets)
        return self.sum(self.multiply(self.multiply(difference, difference), weights))

    def correct(self, logits: Array, targets: Array, weights: Array, top: int = 1) -> Array:
        order = np.argsort(-value_of(logits), axis=-1, kind="stable")[..., :top]
        return ((order == targets[..., None]).any(-1) * value_of(weights)).sum()

    def _number(self, number: float) -> np.ndarray:
        return np.asarray(number, self.dtype)  # a bare float64 scalar array would widen float32 ones


def padded(x: np.ndarray, padding: int, value: float) -> np.ndarray:
    around = (padding, padding)
    return np.pad(x, ((0, 0), around, around, (0, 0)), constant_values=value)


def trimmed(x: np.ndarray, padding: int) -> np.ndarray:
    return x[:, padding:x.shape[1] - padding, padding:x.shape[2] - padding]


def windows(shape: Sequence[int], kernel: Sequence[int], stride: int) -> dict[tuple[int, int], tuple[slice, ...]]:
    """For each place of a kernel, where in (rows, h, w, c) it meets the image, over all positions of the kernel."""
    tall, wide = ((shape[1 + axis] - kernel[axis]) // stride * stride + 1 for axis in (0, 1))
    return {(i, j): (slice(None), slice(i, i + tall, stride), slice(j, j + wide, stride))
            for i in range(kernel[0]) for j in range(kernel[1])}
