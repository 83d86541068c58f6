"""The kernels a model is written in: a protocol owned here and implemented once per framework in `backends/*/ops.py`.

An array is the framework's own. Shapes are written (rows, time, d_model); "..." stands for any leading dims. Kernels
have no side effects, are differentiable in every floating-point argument unless the text says otherwise, and raise the
framework's own error on shapes that do not fit. Batch columns arrive as integer (int64) or floating-point arrays of the
run's precision.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from elastic.errors import UserError

Array = Any

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
DROPOUT_LEVELS = 65_536  # a dropout rate is rounded to this many levels: four decisions come out of one 64-bit number


class Kernels:
    """What the implementations inherit: a kernel that a framework lacks is one sentence to whoever wrote the model; and
    the collectives of dims that are split over an axis of the mesh (`elastic.parallel.axis`), forward and backward,
    with sums in rank order. A dim that is not split, or not known, has degree 1, and they return `x` as it is. `across`
    is each framework's own: (kind, x, dim, length of the whole dim, for "collect").
    """

    name: str
    axes: Mapping[str, Any] = {}  # `elastic.parallel.axis.Axis` by dim, of this generation
    across: Callable[[str, Array, str, int], Array]

    # where an array's own operators are the framework's kernels
    add = staticmethod(operator.add)
    subtract = staticmethod(operator.sub)
    multiply = staticmethod(operator.mul)
    divide = staticmethod(operator.truediv)

    def degree(self, dim: str) -> int:
        """In how many parts `dim` is split."""
        return self.axes[dim].size if dim in self.axes else 1

    def part(self, dim: str) -> int:
        """Which of them is this worker's."""
        return self.axes[dim].rank if dim in self.axes else 0

    def enter(self, x: Array, dim: str) -> Array:
        """`x`, the same on all workers, on its way into what is split along `dim`; the gradients that come back are
        summed. (...) -> (...)"""
        return x if self.degree(dim) == 1 else self.across("enter", x, dim, 0)

    def leave(self, x: Array, dim: str) -> Array:
        """The sum over the axis of what each worker's part along `dim` gave, the same on all; the gradient passes as it
        is. (...) -> (...)"""
        return x if self.degree(dim) == 1 else self.across("leave", x, dim, 0)

    def collect(self, x: Array, dim: str, length: int = 0) -> Array:
        """The workers' parts of the last dim, side by side, the same on all; each part gets its own range of the
        gradient.

        `length` is that of the whole, needed where the parts are the spans of a dim that does not divide.
        """
        return x if self.degree(dim) == 1 else self.across("collect", x, dim, length or x.shape[-1] * self.degree(dim))

    def exchange(self, x: Array, dim: str) -> Array:
        """x (parts, ...): slice i goes to the worker of part i, slice i of the result has come from it. So do the
        gradients, back."""
        return x if self.degree(dim) == 1 else self.across("exchange", x, dim, 0)

    if not TYPE_CHECKING:  # for whom a missing kernel is an error already

        def __getattr__(self, kernel: str) -> Any:
            if kernel.startswith("_"):
                raise AttributeError(kernel)
            raise UserError(f"model.kind calls ops.{kernel}, which the {self.name} backend lacks; elastic/model/ops.py "
                            "lists what there is.")


class Ops(Protocol):
    """One framework's kernels, beside those of `Kernels`."""

    name: str

    # shapes
    def constant(self, values: Any) -> Array:
        """NumPy values or a number as an array on the device; floats take the run's precision. No gradient."""

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        """The same elements in C order; one length may be -1."""

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        """Dim i of the result is dim axes[i] of `x`."""

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array:
        """Arrays one after the other along `axis`; the other dims agree."""

    def unbind(self, x: Array, axis: int) -> tuple[Array, ...]:
        """The slices of `x` along `axis`, without that dim."""

    def narrow(self, x: Array, axis: int, start: int, length: int) -> Array:
        """`length` places of `axis` from `start`."""

    def gather(self, table: Array, indices: Array, dim: str = "", length: int = 0) -> Array:
        """Rows of `table` (rows, ...) at integer `indices` (any shape): shape indices.shape + table.shape[1:]. An
        embedding.

        Where `dim`, that of the rows, is split, `table` is this worker's span of the `length` rows that there are
        (`Axis.span`: parts may differ by one, so the part alone does not tell) and `indices` count all; every worker
        gets all rows asked for.
        """

    # arithmetic, with NumPy's broadcasting; numbers are allowed for one argument
    def add(self, x: Array, y: Array) -> Array:
        """x + y, shapes broadcast together."""

    def subtract(self, x: Array, y: Array) -> Array:
        """x - y, shapes broadcast together."""

    def multiply(self, x: Array, y: Array) -> Array:
        """x * y, shapes broadcast together."""

    def divide(self, x: Array, y: Array) -> Array:
        """x / y, shapes broadcast together."""

    def exp(self, x: Array) -> Array:
        """Elementwise (...) -> (...)."""

    def log(self, x: Array) -> Array:
        """Elementwise (...) -> (...)."""

    def sqrt(self, x: Array) -> Array:
        """Elementwise (...) -> (...)."""

    def sum(self, x: Array, axes: Sequence[int] | None = None, keep: bool = False) -> Array:
        """Sum over `axes` (all of them when None); `keep` leaves dims of length 1."""

    def mean(self, x: Array, axes: Sequence[int] | None = None, keep: bool = False) -> Array:
        """Mean over `axes`, like `sum`."""

    def contract(self, equation: str, x: Array, y: Array, bias: Array | None = None) -> Array:
        """An einsum of two arrays, "btd,df->btf"; `bias` is added to the last dims.

        Letters are dims; none repeats inside an array, and each stands in at least two of the three arrays.
        """

    # activations, elementwise
    def relu(self, x: Array) -> Array:
        """max(x, 0), (...) -> (...)."""

    def gelu(self, x: Array) -> Array:
        """x * Phi(x), exact (erf). Hendrycks and Gimpel 2016."""

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + exp(-x)), (...) -> (...)."""

    def tanh(self, x: Array) -> Array:
        """Hyperbolic tangent, (...) -> (...)."""

    def softmax(self, x: Array, axis: int = -1) -> Array:
        """exp(x) over its sum along `axis`, (...) -> (...)."""

    def log_softmax(self, x: Array, axis: int = -1) -> Array:
        """log of `softmax`, without overflow, (...) -> (...)."""

    # choices: integers, without a gradient
    def one_hot(self, indices: Array, num: int) -> Array:
        """1.0 at each index and 0.0 elsewhere: integers (...) -> (..., num). No gradient."""

    def top_k(self, x: Array, k: int) -> Array:
        """The places of the `k` highest of the last dim, the highest first, of equals the earlier: (..., n) -> (...,
        k). No gradient."""

    def queue(self, chosen: Array, num: int, capacity: int) -> tuple[Array, Array]:
        """Rows stand in `num` queues of `capacity` places, integers `chosen` (rows, k) say in which; first all first
        choices, by row.

        For each choice its place, queue * capacity + position, or num * capacity where the queue is full, (rows, k);
        for each place the row that stands there, or `rows` where none does, (num * capacity,). No gradient.
        """

    # blocks of networks
    def layer_norm(self, x: Array, weight: Array, bias: Array | None = None, eps: float = 1e-5) -> Array:
        """(..., d) -> (..., d), normalised over the last dim; weight and bias (d,). Ba et al. 2016."""

    def rms_norm(self, x: Array, weight: Array, eps: float = 1e-6) -> Array:
        """(..., d) -> (..., d), divided by the root mean square of the last dim; weight (d,). Zhang and Sennrich 2019.
        """

    def attention(self, query: Array, key: Array, value: Array, causal: bool, rate: float = 0.0, seed: int = 0,
                  tag: str = "") -> Array:
        """softmax(query key^T / sqrt(d_head)) value; (rows, time, heads, d_head) each and in return.

        `causal` hides later places. `rate` drops attention weights as `dropout` does, on their (rows, heads, time,
        time).
        """

    def dropout(self, x: Array, rate: float, seed: int, tag: str) -> Array:
        """Zeroes elements and scales the rest; which ones is a pure function of (shape, rate, seed, tag), see
        `keep_mask`."""

    def recompute(self, function: Callable[..., Array], *arrays: Array) -> Array:
        """function(*arrays), of which no result but the last is kept: the others are computed again for the gradient.

        A gradient reaches `arrays` alone, not what else `function` may read.
        """

    # images: (rows, height, width, channels), the channels last in every framework
    def conv2d(self, x: Array, weight: Array, bias: Array | None = None, stride: int = 1, padding: int = 0) -> Array:
        """(rows, h, w, c_in) with weight (kernel_h, kernel_w, c_in, c_out) and bias (c_out,) -> (rows, h', w', c_out).

        A cross-correlation, both sides of both dims first padded with `padding` zeros: h' = (h + 2 padding - kernel_h)
        // stride + 1.
        """

    def max_pool(self, x: Array, size: int, stride: int, padding: int = 0) -> Array:
        """The largest of each size x size window, (rows, h, w, c) -> (rows, h', w', c) with h' as in `conv2d`.

        The padding, at most half of `size`, never wins. Of several largest values one gets the gradient, whichever.
        """

    def batch_norm(self, x: Array, weight: Array, bias: Array, mean: Array, var: Array, training: bool,
                   momentum: float = 0.1,
                   eps: float = 1e-5) -> tuple[Array, Array, Array]:
        """(..., c) normalised per channel, times weight plus bias (c,); the new running mean and variance. Ioffe and
        Szegedy 2015.

        In training by the mean and the biased variance over all other dims, of which `momentum` parts go into the
        running ones: new = (1 - momentum) old + momentum batch, the variance unbiased there (n / (n - 1)). Else by
        `mean` and `var` (c,), which are returned as they are. Gradient for x, weight and bias alone; the arguments are
        not written to.
        """

    def group_norm(self, x: Array, groups: int, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
        """(rows, ..., c) normalised per row and run of c / groups channels, times weight plus bias (c,). Wu and He
        2018."""

    def attach(self, x: Array, penalty: Array) -> Array:
        """`x`, with which the scalar `penalty` is added to the loss's gradient, though not to the loss: a term that a
        piece in the middle of a model has to say. (...), () -> (...)
        """

    # losses: sums, never means, so that shards of any size add up
    def cross_entropy(self, logits: Array, targets: Array, weights: Array, dim: str = "", length: int = 0) -> Array:
        """Weighted sum of -log softmax(logits)[targets]: logits (..., classes), targets (...) integer, weights (...) ->
        ().

        Gradient for logits alone. Where `dim`, that of the classes, is split, `logits` are this worker's span of the
        `length` that there are: nothing but one maximum, one sum and one logit a place is exchanged (Shoeybi et al.
        2019, section 3).
        """

    def binary_cross_entropy(self, logits: Array, targets: Array, weights: Array) -> Array:
        """Weighted sum of the logistic loss: logits, targets (0 to 1) and weights (...) -> (). Gradient for logits
        alone."""

    def squared_error(self, x: Array, targets: Array, weights: Array) -> Array:
        """Weighted sum of (x - targets)^2: all (...) -> (). Gradient for x alone."""

    def correct(self, logits: Array, targets: Array, weights: Array, top: int = 1) -> Array:
        """Weighted count of the targets that are among the `top` highest logits, shapes as in `cross_entropy`. No
        gradient.

        Of equal logits the earlier class is the higher one, so that top = 1 is argmax(logits) == targets.
        """


def dropout_levels(rate: float) -> int:
    """How many of DROPOUT_LEVELS equally likely values mean "drop". ValueError unless 0 <= rate < 1."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"a dropout rate must be at least 0 and below 1, not {rate!r}")
    return min(round(rate * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)


def tag_key(tag: str) -> int:
    """A tag as an integer, the same in every process: FNV-1a, in plain Python so that tracing compilers can follow it.
    """
    key = 0xCBF29CE484222325
    for letter in tag:
        key = ((key ^ ord(letter)) * 0x100000001B3) & _MASK
    return key


def keep_mask(shape: Sequence[int], rate: float, seed: int, tag: str) -> np.ndarray:
    """Which elements `dropout` keeps, bool of `shape`: SplitMix64 (Steele et al. 2014) over element numbers.

    Element 4i+j is kept if 16-bit part j (little-endian, signed) of number i is at least levels - 32768.
    """
    size = int(np.prod(shape, dtype=np.int64))
    start = (mix((seed & _MASK) + GOLDEN * (tag_key(tag) + 1))) & _MASK
    numbers = np.arange(1, -(-size // 4) + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(start)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(MIX1)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(MIX2)
    numbers ^= numbers >> np.uint64(31)
    parts = numbers.astype("<u8").view("<i2")[:size]
    return (parts >= dropout_levels(rate) - DROPOUT_LEVELS // 2).reshape(tuple(shape))


def mix(number: int) -> int:
    """SplitMix64's finaliser on a Python integer modulo 2^64."""
    number &= _MASK
    number = ((number ^ (number >> 30)) * MIX1) & _MASK
    number = ((number ^ (number >> 27)) * MIX2) & _MASK
    return number ^ (number >> 31)
