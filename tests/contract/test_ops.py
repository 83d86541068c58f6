"""Every kernel of every framework against the NumPy reference, and the reference against central differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.model.ops import DROPOUT_LEVELS, Kernels, Ops, dropout_levels, keep_mask
from tests.support.frameworks import assert_close, differentiate, load, names
from tests.support.op_cases import CASES

SEEDS = st.integers(0, 2**32 - 1)
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
SPLIT = {"degree", "part", "enter", "leave", "collect", "exchange", "attach"}  # in test_split_ops.py
STATISTICS = {"batch_norm"}  # all results but the first depend on the inputs without a gradient
QUICK = settings(max_examples=6, deadline=None, derandomize=True)


def cotangents(function: Any, arrays: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    outputs, _ = differentiate("reference", function, arrays, "float64", cotangents=[np.zeros(())])
    return [rng.standard_normal(out.shape) for out in outputs]


def assert_same(name: str, op: str, seed: int, precision: str, ops: Any = None) -> None:
    """Outputs and gradients of `op` in framework `name` are the reference's in float64."""
    rng = np.random.default_rng(seed)
    arrays, function = CASES[op](rng)
    weights = cotangents(function, arrays, rng)
    wanted = differentiate("reference", function, arrays, "float64", cotangents=weights)
    found = differentiate(name, function, arrays, precision, ops, weights)
    assert len(found[0]) == len(wanted[0])
    for what, ours, theirs in (("output", found[0], wanted[0]), ("gradient", found[1], wanted[1])):
        for i, (a, b) in enumerate(zip(ours, theirs)):
            assert_close(a, b, TOLERANCE[precision], f"{name} {op} {what} {i}")


def test_every_kernel_has_a_case() -> None:
    kernels = {n for n in (*vars(Kernels), *vars(Ops)) if not n.startswith("_")} - {"name", "axes"}
    assert kernels == set(CASES) | SPLIT
    assert len(kernels) >= 30


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("name", names())
def test_kernel_agrees_with_the_reference(name: str, op: str, precision: str) -> None:
    load(name, "ops")

    @QUICK
    @given(SEEDS)
    def check(seed: int) -> None:
        assert_same(name, op, seed, precision)

    check()


@pytest.mark.parametrize("op", [op for op in CASES if op != "correct"])
def test_reference_gradient_is_the_slope(op: str) -> None:
    @settings(QUICK, max_examples=3)
    @given(SEEDS)
    def check(seed: int) -> None:
        rng = np.random.default_rng(seed)
        arrays, function = CASES[op](rng)
        weights = cotangents(function, arrays, rng)
        weights[1:] = [w * (op not in STATISTICS) for w in weights[1:]]
        _, gradients = differentiate("reference", function, arrays, "float64", cotangents=weights)
        direction = [rng.standard_normal(a.shape) for a in arrays]

        def total(step: float) -> float:
            moved = [a.astype(np.float64) + step * d for a, d in zip(arrays, direction)]
            outputs, _ = differentiate("reference", function, moved, "float64", cotangents=weights)
            return float(sum((out * w).sum() for out, w in zip(outputs, weights)))

        slope = (8 * (total(1e-3) - total(-1e-3)) - (total(2e-3) - total(-2e-3))) / 12e-3  # error of order step^4
        assert_close(np.array(sum((g * d).sum() for g, d in zip(gradients, direction))), np.array(slope), 1e-6, op)

    check()


class Broken:
    """The ops of a framework with one kernel wrong by one part in ten thousand."""

    def __init__(self, ops: Any, op: str):
        self._ops, self._op = ops, op

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._ops, name)
        if name != self._op:
            return kernel

        def wrong(*args: Any, **keywords: Any) -> Any:
            found = kernel(*args, **keywords)
            return tuple(map(spoilt, found)) if isinstance(found, tuple) else spoilt(found)

        return wrong


def spoilt(x: Any) -> Any:
    return x * 1.0001 if x.is_floating_point() else x.flip(0)


@pytest.mark.parametrize("op", CASES)
def test_a_broken_kernel_is_caught(op: str) -> None:
    import torch

    broken = Broken(load("torch", "ops").TorchOps("cpu", torch.float32), op)
    with pytest.raises(AssertionError, match=op):
        for seed in range(5):  # a case may come out as nothing but zeros
            assert_same("torch", op, seed, "float32", broken)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share(rate: float) -> None:
    keep = keep_mask((400, 500), rate, seed=7, tag="a")
    assert abs(keep.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / keep.size)
    assert abs(np.corrcoef(keep[:-1].ravel(), keep[1:].ravel())[0, 1]) < 0.01
    for other in (keep_mask((400, 500), rate, 8, "a"), keep_mask((400, 500), rate, 7, "b")):
        assert abs(np.corrcoef(keep.ravel(), other.ravel())[0, 1]) < 0.01
    assert np.array_equal(keep, keep_mask((400, 500), rate, 7, "a"))


def test_dropout_mask_in_tensor_arithmetic_is_the_same() -> None:
    import torch

    tensors = load("torch", "ops")
    for seed in (0, 1, 2**63 - 1):
        for size in (1, 7, 4096):
            mask = tensors.keep_mask(torch.Size((size,)), dropout_levels(0.3), seed, "h0.mlp", torch.device("cpu"))
            assert np.array_equal(mask.numpy(), keep_mask((size,), 0.3, seed, "h0.mlp"))


def test_dropout_rates() -> None:
    assert dropout_levels(0.5) == DROPOUT_LEVELS // 2
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            dropout_levels(rate)
