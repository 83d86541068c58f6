"""One case per kernel that works across a split dim: the undivided function, and what each worker computes of it with its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.parallel.axis import span

DIM, VOCAB = "split", 7  # over two workers 4 and 3, over three 3, 2 and 2
Function = Callable[..., Any]


@dataclass(frozen=True)
class Split:
    """`cuts[i]` is the dim of array i of which each worker holds a span, None where all hold all of it; `result` the
    same of the result."""

    arrays: Sequence[np.ndarray]
    cuts: Sequence[int | None]
    whole: Function
    part: Function
    result: int | None = None

    def inputs(self, size: int, rank: int) -> list[np.ndarray]:
        return [cut(array, dim, size, rank) for array, dim in zip(self.arrays, self.cuts)]


def cut(array: np.ndarray, dim: int | None, size: int, rank: int) -> np.ndarray:
    if dim is None:
        return array
    start, count = span(array.shape[dim], size, rank)
    return np.take(array, range(start, start + count), dim)


Make = Callable[[np.random.Generator, int], Split]
CASES: dict[str, Make] = {}


def case(make: Make) -> Make:
    CASES[make.__name__.removeprefix("make_")] = make
    return make


@case
def make_enter(rng: np.random.Generator, size: int) -> Split:
    x, w = rng.standard_normal((3, 4)), rng.standard_normal((4, VOCAB))
    return Split([x, w], [None, 1], lambda ops, x, w: ops.contract("bd,df->bf", x, w),
                 lambda ops, x, w: ops.contract("bd,df->bf", ops.enter(x, DIM), w), 1)


@case
def make_leave(rng: np.random.Generator, size: int) -> Split:
    x, w = rng.standard_normal((3, VOCAB)), rng.standard_normal((VOCAB, 4))
    return Split([x, w], [1, 0], lambda ops, x, w: ops.tanh(ops.contract("bf,fd->bd", x, w)),
                 lambda ops, x, w: ops.tanh(ops.leave(ops.contract("bf,fd->bd", x, w), DIM)))


@case
def make_collect(rng: np.random.Generator, size: int) -> Split:
    x = rng.standard_normal((2, 3, 2 * size))
    return Split([x], [2], lambda ops, x: ops.tanh(x), lambda ops, x: ops.tanh(ops.collect(x, DIM)))


@case
def make_collect_uneven(rng: np.random.Generator, size: int) -> Split:
    x = rng.standard_normal((2, 3, VOCAB))
    return Split([x], [2], lambda ops, x: ops.tanh(x), lambda ops, x: ops.tanh(ops.collect(x, DIM, VOCAB)))


@case
def make_exchange(rng: np.random.Generator, size: int) -> Split:
    x = rng.standard_normal((size, size, 2, 3))
    return Split([x], [0], lambda ops, x: ops.tanh(ops.transpose(x, (1, 0, 2, 3))),
                 lambda ops, x: ops.reshape(ops.tanh(ops.exchange(ops.reshape(x, (size, 2, 3)), DIM)), (1, size, 2, 3)),
                 0)


@case
def make_gather(rng: np.random.Generator, size: int) -> Split:
    table, indices = rng.standard_normal((VOCAB, 2, 3)), np.append(rng.integers(0, VOCAB, 5),
                                                                   range(VOCAB)).reshape(2, 6)
    return Split([table], [0], lambda ops, t: ops.tanh(ops.gather(t, ops.constant(indices))),
                 lambda ops, t: ops.tanh(ops.gather(t, ops.constant(indices), DIM, VOCAB)))


@case
def make_cross_entropy(rng: np.random.Generator, size: int) -> Split:
    logits = rng.standard_normal((2, 5, VOCAB)) * 3
    logits[0, :3] += [[1000.0], [-1000.0], [30.0]]  # exp of the first two leaves every precision
    targets, weights = np.append(rng.integers(0, VOCAB, 3),
                                 range(VOCAB)).reshape(2, 5), rng.integers(0, 2, (2, 5)) + 0.5
    weights[1, 1] = 0
    return Split([logits], [2], lambda ops, x: ops.cross_entropy(x, ops.constant(targets), ops.constant(weights)),
                 lambda ops, x: ops.cross_entropy(x, ops.constant(targets), ops.constant(weights), DIM, VOCAB))


@case
def make_attention(rng: np.random.Generator, size: int) -> Split:
    """Heads apart, as a transformer splits them."""
    x, w, out = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 3, 6, 2)), rng.standard_normal((6, 2, 4))

    def mixed(ops: Any, x: Any, w: Any, out: Any) -> Any:
        query, key, value = ops.unbind(ops.contract("btd,dqhe->btqhe", x, w), 2)
        return ops.contract("bthe,hed->btd", ops.attention(query, key, value, True), out)

    return Split([x, w, out], [None, 2, 0], mixed, lambda ops, x, w,
                 out: ops.leave(mixed(ops, ops.enter(x, DIM), w, out), DIM))


@case
def make_recompute(rng: np.random.Generator, size: int) -> Split:
    """The collectives of what is computed again are called again, in the same order on all workers."""
    x, up, down = rng.standard_normal((3, 4)), rng.standard_normal((4, VOCAB)), rng.standard_normal((VOCAB, 4))

    def block(ops: Any, x: Any, up: Any, down: Any) -> Any:
        hidden = ops.tanh(ops.contract("bd,df->bf", ops.enter(x, DIM), up))
        return ops.tanh(ops.leave(ops.contract("bf,fd->bd", hidden, down), DIM))

    def twice(ops: Any, x: Any, up: Any, down: Any) -> Any:
        for _ in range(2):
            x = ops.recompute(lambda x, up, down: block(ops, x, up, down), x, up, down)
        return x

    return Split([x, up, down], [None, 1, 0], twice, twice)
