"""Kernels across a split dim, on every framework: workers as threads against the undivided kernel in NumPy, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elastic.parallel.axis import Axis
from tests.support.axes import Watched, split_ops
from tests.support.frameworks import assert_close, differentiate, names
from tests.support.split_cases import CASES, DIM, Split, cut
from tests.support.threads import together

SIZES = (2, 3)
every_framework = pytest.mark.parametrize("name", names())


def assert_parts_agree(name: str, op: str, size: int, seed: int, dropped: int | None = None) -> int:
    """Every worker's result and gradients are its parts of the undivided kernel's; how many collectives a worker
    called."""
    rng = np.random.default_rng(seed)
    split: Split = CASES[op](rng, size)
    shape = differentiate("reference", split.whole, split.arrays, "float64", cotangents=[np.zeros(())])[0][0].shape
    weights = np.asarray(rng.standard_normal(shape))
    (wanted,), slopes = differentiate("reference", split.whole, split.arrays, "float64", cotangents=[weights])
    axes: dict[int, Watched] = {}

    def work(rank: int, group: Any) -> Any:
        ops = split_ops(name)
        axes[rank] = Watched(group, dropped)
        ops.axes = {DIM: axes[rank]}
        return differentiate(name, split.part, split.inputs(size, rank), "float64", ops,
                             [cut(weights, split.result, size, rank)])

    for rank, ((found,), gradients) in enumerate(together(size, work)):
        assert_close(found, cut(wanted, split.result, size, rank), 1e-12, f"{op} result of worker {rank} of {size}")
        for i, (gradient, slope) in enumerate(zip(gradients, slopes, strict=True)):
            assert_close(gradient, cut(slope, split.cuts[i], size, rank), 1e-12,
                         f"{op} gradient {i} of worker {rank} of {size}")
    assert len({axis.calls for axis in axes.values()}) == 1
    return axes[0].calls


@pytest.mark.parametrize("op", CASES)
@every_framework
def test_parts_agree_with_the_undivided_kernel(name: str, op: str) -> None:
    split_ops(name)
    for size in SIZES:
        assert assert_parts_agree(name, op, size, seed=size) > 0


@pytest.mark.parametrize("op", CASES)
@every_framework
def test_a_dropped_collective_is_seen(name: str, op: str) -> None:
    split_ops(name)
    for dropped in range(assert_parts_agree(name, op, 2, seed=1)):
        with pytest.raises(AssertionError, match=f"{op} (result|gradient)"):
            assert_parts_agree(name, op, 2, 1, dropped)


@every_framework
def test_sums_are_the_same_bits_on_all_workers_and_in_every_run(name: str) -> None:
    def work(rank: int, group: Any) -> Any:
        ops = split_ops(name)
        ops.axes = {DIM: Axis("tensor", group)}
        x = np.random.default_rng(rank).standard_normal((5, 7))
        return differentiate(name, lambda ops, x: ops.leave(x, DIM), [x], "float64", ops, [np.ones((5, 7))])[0][0]

    split_ops(name)
    first, *others = [*together(3, work), *together(3, work)]
    in_rank_order = sum((np.random.default_rng(rank).standard_normal((5, 7)) for rank in range(3)), np.zeros((5, 7)))
    for other in [in_rank_order, *others]:
        assert np.array_equal(first, other)


@every_framework
def test_an_undivided_dim_needs_nobody(name: str) -> None:
    ops = split_ops(name)
    ops.axes = {DIM: together(1, lambda rank, group: Axis("tensor", group))[0]}
    assert (ops.degree(DIM), ops.part(DIM), ops.degree("other"), ops.part("other")) == (1, 0, 1, 0)
    x = np.arange(6.0).reshape(1, 6)
    for kernel in ("enter", "leave", "collect", "exchange"):
        for dim in (DIM, "other"):
            found, gradients = differentiate(name, lambda ops, x: getattr(ops, kernel)(x, dim), [x], "float64", ops,
                                             [x])
            assert np.array_equal(found[0], x) and np.array_equal(gradients[0], x)
    assert not ops.axes[DIM].counts


@every_framework
def test_a_part_knows_its_place(name: str) -> None:
    def work(rank: int, group: Any) -> Any:
        ops = split_ops(name)
        ops.axes = {DIM: Axis("tensor", group)}
        return ops.degree(DIM), ops.part(DIM)

    split_ops(name)
    assert together(3, work) == [(3, 0), (3, 1), (3, 2)]


@every_framework
def test_attached_penalty_is_in_the_gradient_alone(name: str) -> None:
    split_ops(name)
    rng = np.random.default_rng(0)
    x, p, weights = rng.standard_normal((2, 3)), rng.standard_normal(4), rng.standard_normal((2, 3))
    (found,), (of_x, of_p) = differentiate(name, lambda ops, x, p: ops.attach(x, ops.sum(ops.multiply(p, p))), [x, p],
                                           "float64",
                                           cotangents=[weights])
    assert np.array_equal(found, x)
    assert_close(of_x, weights, 1e-15)
    assert_close(of_p, 2 * p, 1e-15)
