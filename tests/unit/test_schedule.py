"""The learning rate, against nanoGPT's formula and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from elastic.schedule import learning_rate

BASE: dict[str, Any] = {"kind": "cosine", "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 100, "num_steps": 2000}


def nanogpt(iteration: int) -> float:
    """train.py, get_lr, whose iterations count from 0."""
    if iteration < 100:
        return 1e-3 * (iteration + 1) / (100 + 1)
    if iteration > 2000:
        return 1e-4
    return 1e-4 + 0.5 * (1.0 + math.cos(math.pi * (iteration - 100) / (2000 - 100))) * (1e-3 - 1e-4)


@pytest.mark.parametrize("step", [1, 2, 50, 99, 100])
def test_the_warm_up_is_nanogpt_s(step: int) -> None:
    assert learning_rate(step, **BASE) == pytest.approx(nanogpt(step - 1), rel=1e-12)


@pytest.mark.parametrize("step", [101, 500, 1999, 2000])
def test_the_cosine_is_nanogpt_s(step: int) -> None:
    assert learning_rate(step, **BASE) == pytest.approx(nanogpt(step), rel=1e-12)


def test_ends_and_middles() -> None:
    assert learning_rate(2000, **BASE) == pytest.approx(1e-4)
    assert learning_rate(1050, **BASE) == pytest.approx((1e-3 + 1e-4) / 2)
    linear = {**BASE, "kind": "linear"}
    assert learning_rate(1050, **linear) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(2000, **linear) == pytest.approx(1e-4)
    assert {learning_rate(step, **{**BASE, "kind": "constant"}) for step in range(101, 2001, 7)} == {1e-3}


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_it_rises_and_then_never_rises_again(kind: str) -> None:
    rates = [learning_rate(step, **{**BASE, "kind": kind}) for step in range(1, 2001)]
    assert all(a < b for a, b in zip(rates[:100], rates[1:100]))
    assert all(a >= b for a, b in zip(rates[100:], rates[101:]))
    assert max(rates) <= 1e-3 and min(rates[100:]) >= 1e-4


def test_a_warm_up_longer_than_the_run() -> None:
    assert learning_rate(5, kind="cosine", lr=1.0, min_lr=0.0, warmup_steps=9, num_steps=5) == 0.5
