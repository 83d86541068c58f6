"""One case per kernel: random inputs and a call. Inputs are kept where a kernel is well conditioned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Case = tuple[list[np.ndarray], Callable[..., Any]]  # differentiable inputs, function of (ops, *inputs)
Make = Callable[[np.random.Generator], Case]

CASES: dict[str, Make] = {}


def case(make: Make) -> Make:
    CASES[make.__name__.removeprefix("make_")] = make
    return make


def shape(rng: np.random.Generator, ndim: int, least: int = 1) -> tuple[int, ...]:
    return tuple(int(n) for n in rng.integers(least, 6, ndim))


def normal(rng: np.random.Generator, *lengths: int) -> np.ndarray:
    return rng.standard_normal(lengths).astype(np.float32)


def positive(rng: np.random.Generator, *lengths: int) -> np.ndarray:
    return rng.uniform(0.5, 2.0, lengths).astype(np.float32)


def away_from_zero(rng: np.random.Generator, *lengths: int) -> np.ndarray:
    return positive(rng, *lengths) * rng.choice(np.float32([-1, 1]), lengths)


def elementwise(name: str, inputs: Callable[..., np.ndarray] = normal) -> None:
    CASES[name] = lambda rng: ([inputs(rng, *shape(rng, int(rng.integers(1, 4))))], lambda ops,
                               x: getattr(ops, name)(x))


def binary(name: str, second: Callable[..., np.ndarray] = normal) -> None:
    def make(rng: np.random.Generator) -> Case:
        a, b, c = shape(rng, 3)
        pairs = [((a, b, c), (a, b, c)), ((a, b, c), (c,)), ((a, 1, c), (b, 1)), ((a, b), (1, 1)), ((a, b), ())]
        left, right = pairs[int(rng.integers(len(pairs)))]
        return [normal(rng, *left), second(rng, *right)], lambda ops, x, y: getattr(ops, name)(x, y)

    CASES[name] = make


def along(name: str) -> None:
    def make(rng: np.random.Generator) -> Case:
        axis = int(rng.integers(-3, 3))
        return [normal(rng, *shape(rng, 3, 2))], lambda ops, x: getattr(ops, name)(x, axis)

    CASES[name] = make


def reduction(name: str) -> None:
    def make(rng: np.random.Generator) -> Case:
        axes = [None, (0,), (-1,), (0, 2), (1, -1)][int(rng.integers(5))]
        keep = bool(rng.integers(2))
        return [normal(rng, *shape(rng, 3))], lambda ops, x: getattr(ops, name)(x, axes, keep)

    CASES[name] = make


for _name in ("exp", "gelu", "sigmoid", "tanh"):
    elementwise(_name)
for _name in ("log", "sqrt"):
    elementwise(_name, positive)
elementwise("relu", away_from_zero)
for _name in ("add", "subtract", "multiply"):
    binary(_name)
binary("divide", away_from_zero)
for _name in ("softmax", "log_softmax"):
    along(_name)
for _name in ("sum", "mean"):
    reduction(_name)


@case
def make_constant(rng: np.random.Generator) -> Case:
    values = normal(rng, *shape(rng, 2))
    return [normal(rng, *values.shape)], lambda ops, x: ops.multiply(x, ops.constant(values))


@case
def make_reshape(rng: np.random.Generator) -> Case:
    a, b, c = shape(rng, 3)
    return [normal(rng, a, b, c)], lambda ops, x: ops.reshape(x, (c, -1, b))


@case
def make_transpose(rng: np.random.Generator) -> Case:
    axes = tuple(int(i) for i in rng.permutation(4))
    return [normal(rng, *shape(rng, 4))], lambda ops, x: ops.transpose(x, axes)


@case
def make_concatenate(rng: np.random.Generator) -> Case:
    a, b, c, d = shape(rng, 4)
    return [normal(rng, a, b, d), normal(rng, a, c, d)], lambda ops, x, y: ops.concatenate((x, y), 1)


@case
def make_unbind(rng: np.random.Generator) -> Case:
    axis = int(rng.integers(3))
    return [normal(rng, *shape(rng, 3))], lambda ops, x: ops.unbind(x, axis)


@case
def make_narrow(rng: np.random.Generator) -> Case:
    a, b, c = shape(rng, 3)
    start = int(rng.integers(b))
    return [normal(rng, a, b, c)], lambda ops, x: ops.narrow(x, 1, start, b - start)


@case
def make_gather(rng: np.random.Generator) -> Case:
    rows = int(rng.integers(1, 6))
    table = normal(rng, rows, *shape(rng, int(rng.integers(1, 3))))
    indices = rng.integers(0, rows, shape(rng, 2))
    return [table], lambda ops, t: ops.gather(t, ops.constant(indices))


@case
def make_contract(rng: np.random.Generator) -> Case:
    equations = ["btd,df->btf", "btd,dqhe->btqhe", "bthe,hed->btd", "btd,vd->btv", "bqhe,bkhe->bhqk", "bhqk,bkhe->bqhe",
                 "bt,bt->b", "b,d->bd", "db,df->bf", "bd,d->b", "btd,bdf->btf"]
    equation = equations[int(rng.integers(len(equations)))]
    left, right, out = equation.replace("->", ",").split(",")
    sizes = dict(zip("btdfqhevk", shape(rng, 9)))
    inputs = [normal(rng, *(sizes[i] for i in letters)) for letters in (left, right)]
    if rng.integers(2) and out and out[-1] in right:
        trail = [i for i in out if i in right and i not in left]
        if trail and out.endswith("".join(trail)):
            bias = normal(rng, *(sizes[i] for i in trail))
            return [*inputs, bias], lambda ops, x, y, z: ops.contract(equation, x, y, z)
    return inputs, lambda ops, x, y: ops.contract(equation, x, y)


@case
def make_one_hot(rng: np.random.Generator) -> Case:
    num, indices = int(rng.integers(1, 6)), shape(rng, 2)
    places = rng.integers(0, num, indices)
    return [normal(rng, *indices, num)], lambda ops, x: ops.multiply(x, ops.one_hot(ops.constant(places), num))


@case
def make_top_k(rng: np.random.Generator) -> Case:
    """As what is chosen with them: a table's rows."""
    lengths = shape(rng, 3)
    scores = rng.integers(0, 3, lengths) + normal(rng, 1) * 0  # many are equal
    k = int(rng.integers(1, lengths[-1] + 1))
    return [normal(rng, lengths[-1], 2)], lambda ops, t: ops.gather(t, ops.top_k(ops.constant(scores), k))


@case
def make_queue(rng: np.random.Generator) -> Case:
    """As what stands in its places, and what the rows find there again."""
    rows, num, capacity = (int(n) for n in rng.integers(1, 6, 3))
    chosen = rng.permuted(np.tile(np.arange(num), (rows, 1)), axis=1)[:, :int(rng.integers(1, num + 1))]

    def function(ops: Any, x: Any, y: Any) -> Any:
        places, sources = ops.queue(ops.constant(chosen), num, capacity)
        return ops.gather(x, sources), ops.gather(y, places)

    return [normal(rng, rows + 1, 2), normal(rng, num * capacity + 1, 2)], function


@case
def make_layer_norm(rng: np.random.Generator) -> Case:
    d = int(rng.integers(4, 9))
    inputs = [normal(rng, *shape(rng, 2), d) * 2, normal(rng, d)]
    if rng.integers(2):
        return [*inputs, normal(rng, d)], lambda ops, x, w, b: ops.layer_norm(x, w, b)
    return inputs, lambda ops, x, w: ops.layer_norm(x, w)


@case
def make_rms_norm(rng: np.random.Generator) -> Case:
    d = int(rng.integers(4, 9))
    return [normal(rng, *shape(rng, 2), d), normal(rng, d)], lambda ops, x, w: ops.rms_norm(x, w)


@case
def make_attention(rng: np.random.Generator) -> Case:
    b, t, h, e = shape(rng, 4)
    causal, rate = bool(rng.integers(2)), float(rng.choice([0.0, 0.0, 0.3]))
    inputs = [normal(rng, b, t, h, e) for _ in range(3)]
    return inputs, lambda ops, q, k, v: ops.attention(q, k, v, causal, rate, 5, "weights")


@case
def make_dropout(rng: np.random.Generator) -> Case:
    rate, seed = float(rng.choice([0.0, 0.1, 0.5])), int(rng.integers(1 << 63))
    return [normal(rng, *shape(rng, 3))], lambda ops, x: ops.dropout(x, rate, seed, "tag")


@case
def make_recompute(rng: np.random.Generator) -> Case:
    a, b, c = shape(rng, 3)
    inputs = [normal(rng, a, b), normal(rng, b, c), normal(rng, c)]
    return inputs, lambda ops, x, w, v: ops.recompute(lambda x, w, v: ops.tanh(ops.contract("ab,bc->ac", x, w, v)), x,
                                                      w, v)


def image(rng: np.random.Generator, channels: int) -> np.ndarray:
    return normal(rng, *shape(rng, 3, 3), channels)


@case
def make_conv2d(rng: np.random.Generator) -> Case:
    channels, filters, tall, wide = shape(rng, 4)
    stride, padding = int(rng.integers(1, 4)), int(rng.integers(3))
    inputs = [image(rng, channels), normal(rng, min(tall, 3), min(wide, 3), channels, filters)]
    if rng.integers(2):
        return [*inputs, normal(rng, filters)], lambda ops, x, w, b: ops.conv2d(x, w, b, stride, padding)
    return inputs, lambda ops, x, w: ops.conv2d(x, w, stride=stride, padding=padding)


@case
def make_max_pool(rng: np.random.Generator) -> Case:
    size, stride = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    padding = int(rng.integers(size // 2 + 1))
    lengths = shape(rng, 4, 3)
    apart = (rng.permutation(int(np.prod(lengths))) / 7).astype(np.float32).reshape(lengths)  # no two alike
    return [apart], lambda ops, x: ops.max_pool(x, size, stride, padding)


@case
def make_batch_norm(rng: np.random.Generator) -> Case:
    channels, training = int(rng.integers(1, 6)), bool(rng.integers(4))
    momentum, eps = float(rng.choice([0.1, 0.3])), float(rng.choice([1e-5, 1e-3]))
    x = image(rng, channels) if rng.integers(3) else normal(rng, int(rng.integers(5, 9)), channels)
    mean, var = normal(rng, channels), positive(rng, channels)
    inputs = [x * 2 + 1, normal(rng, channels), normal(rng, channels)]
    return inputs, lambda ops, x, w, b: ops.batch_norm(x, w, b, ops.constant(mean), ops.constant(var), training,
                                                       momentum, eps)


@case
def make_group_norm(rng: np.random.Generator) -> Case:
    groups, channels = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    x = image(rng, groups * channels)
    return [x, normal(rng, x.shape[-1]), normal(rng, x.shape[-1])], lambda ops, x, w, b: ops.group_norm(x, groups, w, b)


def classes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b, c = shape(rng, 3, 2)
    return normal(rng, a, b, c) * 3, rng.integers(0, c, (a, b)), rng.integers(0, 2, (a, b)).astype(np.float32) + 0.5


@case
def make_cross_entropy(rng: np.random.Generator) -> Case:
    logits, targets, weights = classes(rng)
    return [logits], lambda ops, x: ops.cross_entropy(x, ops.constant(targets), ops.constant(weights))


@case
def make_correct(rng: np.random.Generator) -> Case:
    logits, targets, weights = classes(rng)
    logits[..., -1] = logits[..., 0]  # a tie
    top = int(rng.integers(1, 4))
    return [logits], lambda ops, x: ops.correct(x, ops.constant(targets), ops.constant(weights), top)


@case
def make_binary_cross_entropy(rng: np.random.Generator) -> Case:
    lengths = shape(rng, 2)
    targets, weights = rng.integers(0, 2, lengths).astype(np.float32), positive(rng, *lengths)
    return [normal(rng, *lengths) * 3], lambda ops, x: ops.binary_cross_entropy(x, ops.constant(targets), ops.constant(weights))


@case
def make_squared_error(rng: np.random.Generator) -> Case:
    lengths = shape(rng, 2)
    targets, weights = normal(rng, *lengths), positive(rng, *lengths)
    return [normal(rng, *lengths)], lambda ops, x: ops.squared_error(x, ops.constant(targets), ops.constant(weights))
