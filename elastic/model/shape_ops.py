"""What a neutral model computes and keeps, found by running it without values: `elastic.model.ops.Ops` over shapes alone.

Floating-point operations are those of matrix products, convolutions and attention, as utilisation counts them
(Chowdhery et al. 2022, appendix B): a multiplication and an addition each, the gradients of both factors where they are
wanted. Kept is what the backward pass still needs after the forward pass, parameters and batch left out, each piece of
memory once. Where dims are split, shapes are one worker's, and what its collectives carry is counted as
`elastic.parallel.axis.Axis` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from elastic.model.ops import Kernels

FLOAT = 4  # bytes
INDEX = 8
MOVES = {"enter": ("", "all_reduce"), "leave": ("all_reduce", ""), "collect": ("all_gather", ""),
         "exchange": ("all_to_all", "all_to_all")}


class Shape:
    """An array without values. `root` is the array whose memory it shares; `owned`: it comes into being in the forward
    pass."""

    def __init__(self, shape: Sequence[int], grad: bool, owned: bool = True, itemsize: int = FLOAT, root: Shape
                 | None = None):
        self.shape, self.grad, self.owned, self.itemsize = tuple(shape), grad, owned, itemsize
        self.root = root or self

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Move:
    """One collective: "AXIS.KIND", and the bytes that a worker gives to it."""

    key: str
    bytes: int
    is_forward: bool


class MeterOps(Kernels):
    """Counts while the model runs. `moves`: this worker's collectives, forward and backward."""

    name = "meter"

    def __init__(self, axes: Mapping[str, Any] | None = None) -> None:
        self.axes = axes or {}
        self.flops = self.forward = self.again_bytes = 0
        self.moves: list[Move] = []
        self._kept: dict[int, Shape] = {}

    @property
    def kept_bytes(self) -> int:
        return sum(root.size * root.itemsize for root in self._kept.values())

    def _keep(self, *arrays: Any) -> None:
        for array in arrays:
            if isinstance(array, Shape) and array.root.owned:
                self._kept[id(array.root)] = array.root

    def _new(self, shape: Sequence[int], *inputs: Any) -> Shape:
        return Shape(shape, any(map(wanted, inputs)))

    def _view(self, x: Shape, shape: Sequence[int]) -> Shape:
        return Shape(shape, x.grad, root=x.root)

    def _product(self, flops: int, x: Shape, y: Shape) -> None:
        """A product of two arrays: itself, and one more for the gradient of each factor."""
        self.forward += flops
        self.flops += flops * (1 + x.grad + y.grad)
        if y.grad:
            self._keep(x)
        if x.grad:
            self._keep(y)

    def _move(self, dim: str, kind: str, size: int, is_forward: bool = True) -> None:
        self.moves.append(Move(f"{self.axes[dim].name}.{kind}", size * FLOAT, is_forward))

    def across(self, kind: str, x: Shape, dim: str, length: int) -> Shape:
        """Parts travel as long as the longest."""
        (there, back), whole = MOVES[kind], (*x.shape[:-1], length) if kind == "collect" else x.shape
        size = math.prod(x.shape[:-1]) * -(-length // self.degree(dim)) if kind == "collect" else x.size
        if there:
            self._move(dim, there, size)
        if back and x.grad:
            self._move(dim, back, size, False)
        return self._new(whole, x) if there else self._view(x, whole)

    def constant(self, values: Any) -> Shape:
        return Shape(np.shape(values), False, owned=False)

    def reshape(self, x: Shape, shape: Sequence[int]) -> Shape:
        known = math.prod(length for length in shape if length != -1)
        return self._view(x, [x.size // known if length == -1 else length for length in shape])

    def transpose(self, x: Shape, axes: Sequence[int]) -> Shape:
        return self._view(x, [x.shape[axis] for axis in axes])

    def concatenate(self, arrays: Sequence[Shape], axis: int) -> Shape:
        shape = list(arrays[0].shape)
        shape[axis] = sum(array.shape[axis] for array in arrays)
        return self._new(shape, *arrays)

    def unbind(self, x: Shape, axis: int) -> tuple[Shape, ...]:
        axis %= len(x.shape)
        return tuple(self._view(x, x.shape[:axis] + x.shape[axis + 1:]) for _ in range(x.shape[axis]))

    def narrow(self, x: Shape, axis: int, start: int, length: int) -> Shape:
        shape = list(x.shape)
        shape[axis] = length
        return self._view(x, shape)

    def gather(self, table: Shape, indices: Shape, dim: str = "", length: int = 0) -> Shape:
        out = self._new(indices.shape + table.shape[1:], table)
        return self.leave(out, dim)

    def _elementwise(self, x: Any, y: Any) -> Shape:
        shapes = [value.shape if isinstance(value, Shape) else () for value in (x, y)]
        return self._new(np.broadcast_shapes(*shapes), x, y)

    add = subtract = _elementwise

    def multiply(self, x: Any, y: Any) -> Shape:
        self._keep(x if wanted(y) else None, y if wanted(x) else None)
        return self._elementwise(x, y)

    def divide(self, x: Any, y: Any) -> Shape:
        self._keep(x if wanted(y) else None, y if wanted(x) or wanted(y) else None)
        return self._elementwise(x, y)

    def _by_input(self, x: Shape) -> Shape:
        if x.grad:
            self._keep(x)
        return self._new(x.shape, x)

    def _by_output(self, x: Shape, axis: int = -1) -> Shape:
        out = self._new(x.shape, x)
        if x.grad:
            self._keep(out)
        return out

    log = gelu = _by_input
    exp = sqrt = relu = sigmoid = tanh = softmax = log_softmax = _by_output

    def sum(self, x: Shape, axes: Sequence[int] | None = None, keep: bool = False) -> Shape:
        over = set(range(len(x.shape))) if axes is None else {axis % len(x.shape) for axis in axes}
        return self._new([1 if i in over else n for i, n in enumerate(x.shape) if keep or i not in over], x)

    mean = sum

    def contract(self, equation: str, x: Shape, y: Shape, bias: Shape | None = None) -> Shape:
        inputs, out = equation.replace(" ", "").split("->")
        left, right = inputs.split(",")
        lengths = dict(zip(left + right, x.shape + y.shape, strict=True))
        self._product(2 * math.prod(lengths.values()), x, y)
        return self._new([lengths[letter] for letter in out], x, y, bias)

    def attach(self, x: Shape, penalty: Shape) -> Shape:
        return self._view(x, x.shape)

    def one_hot(self, indices: Shape, num: int) -> Shape:
        return Shape((*indices.shape, num), False)

    def top_k(self, x: Shape, k: int) -> Shape:
        return Shape((*x.shape[:-1], k), False, itemsize=INDEX)

    def queue(self, chosen: Shape, num: int, capacity: int) -> tuple[Shape, Shape]:
        return Shape(chosen.shape, False, itemsize=INDEX), Shape((num * capacity,), False, itemsize=INDEX)

    def _normed(self, x: Shape, num_statistics: int, *parameters: Any) -> Shape:
        """The input, and the statistics by which it was normalised."""
        out = self._new(x.shape, x, *parameters)
        if out.grad:
            self._keep(x, self._new((num_statistics,)))
        return out

    def layer_norm(self, x: Shape, weight: Shape, bias: Shape | None = None, eps: float = 1e-5) -> Shape:
        return self._normed(x, 2 * x.size // x.shape[-1], weight, bias)

    def rms_norm(self, x: Shape, weight: Shape, eps: float = 1e-6) -> Shape:
        return self._normed(x, x.size // x.shape[-1], weight)

    def group_norm(self, x: Shape, groups: int, weight: Shape, bias: Shape, eps: float = 1e-5) -> Shape:
        return self._normed(x, 2 * x.shape[0] * groups, weight, bias)

    def batch_norm(self, x: Shape, weight: Shape, bias: Shape, mean: Shape, var: Shape, training: bool,
                   momentum: float = 0.1,
                   eps: float = 1e-5) -> tuple[Shape, Shape, Shape]:
        return self._normed(x, 2 * x.shape[-1], weight, bias), self._new(mean.shape), self._new(var.shape)

    def attention(self, query: Shape, key: Shape, value: Shape, causal: bool, rate: float = 0.0, seed: int = 0,
                  tag: str = "") -> Shape:
        """Two products for each query and key, hidden or not. The scores are kept only where weights are dropped."""
        rows, time, heads, d_head = query.shape
        flops = 4 * rows * heads * time * key.shape[1] * d_head
        self.forward, self.flops = self.forward + flops, self.flops + 3 * flops
        scores = (rows, heads, time, key.shape[1])
        out = self._new(query.shape, query, key, value)
        self._keep(query, key, value)
        if rate:
            self.dropout(self._by_output(self._new(scores, query)), rate, seed, tag)
            self._keep(self._new(scores))
        else:
            self._keep(out, self._new(scores[:3]))
        return out

    def dropout(self, x: Shape, rate: float, seed: int, tag: str) -> Shape:
        if rate and x.grad:
            self._keep(Shape(x.shape, False, itemsize=1))
        return self._new(x.shape, x)

    def recompute(self, function: Callable[..., Shape], *arrays: Shape) -> Shape:
        before, forward, self._kept = self._kept, self.forward, {}
        first = len(self.moves)
        out = function(*arrays)
        self.flops += self.forward - forward
        self.moves += [replace(move, is_forward=False) for move in self.moves[first:] if move.is_forward]
        self.again_bytes, self._kept = max(self.again_bytes, self.kept_bytes), before
        self._keep(*arrays)
        return out

    def conv2d(self, x: Shape, weight: Shape, bias: Shape | None = None, stride: int = 1, padding: int = 0) -> Shape:
        rows, height, width, _ = x.shape
        kernel_h, kernel_w, num_in, num_out = weight.shape
        out = rows, places(height, kernel_h, stride, padding), places(width, kernel_w, stride, padding), num_out
        self._product(2 * math.prod(out) * kernel_h * kernel_w * num_in, x, weight)
        return self._new(out, x, weight, bias)

    def max_pool(self, x: Shape, size: int, stride: int, padding: int = 0) -> Shape:
        rows, height, width, channels = x.shape
        out = self._new((rows, places(height, size, stride, padding), places(width, size, stride, padding), channels),
                        x)
        if x.grad:
            self._keep(x, Shape(out.shape, False, itemsize=INDEX))
        return out

    def cross_entropy(self, logits: Shape, targets: Shape, weights: Shape, dim: str = "", length: int = 0) -> Shape:
        """Split, it exchanges a maximum, and then a sum and a logit, of every place."""
        if self.degree(dim) > 1:
            self._move(dim, "all_reduce", math.prod(logits.shape[:-1]))
            self._move(dim, "all_reduce", 2 * math.prod(logits.shape[:-1]))
        self._by_output(logits)
        self._keep(weights)
        return self._new((), logits)

    def binary_cross_entropy(self, logits: Shape, targets: Shape, weights: Shape) -> Shape:
        self._keep(logits, targets, weights)
        return self._new((), logits)

    def squared_error(self, x: Shape, targets: Shape, weights: Shape) -> Shape:
        self._by_output(x)
        self._keep(weights)
        return self._new((), x)

    def correct(self, logits: Shape, targets: Shape, weights: Shape, top: int = 1) -> Shape:
        return self._new(())


def wanted(x: Any) -> bool:
    """Whether a gradient of it is."""
    return isinstance(x, Shape) and x.grad


def places(length: int, kernel: int, stride: int, padding: int) -> int:
    return (length + 2 * padding - kernel) // stride + 1
