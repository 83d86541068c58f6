"""The learning rate, against nanoGPT's formula, PyTorch's schedulers and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from elastic.recipe.sections import Optimizer
from elastic.worker.lr_schedule import learning_rate, scaled

BASE: dict[str, Any] = {"schedule": "cosine", "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 100}


def nanogpt(iteration: int) -> float:
    """train.py, get_lr, whose iterations count from 0."""
    if iteration < 100:
        return 1e-3 * (iteration + 1) / (100 + 1)
    if iteration > 2000:
        return 1e-4
    return 1e-4 + 0.5 * (1.0 + math.cos(math.pi * (iteration - 100) / (2000 - 100))) * (1e-3 - 1e-4)


@pytest.mark.parametrize("step", [1, 2, 50, 99, 100])
def test_the_warm_up_is_nanogpt_s(step: int) -> None:
    assert learning_rate(step, 2000, BASE) == pytest.approx(nanogpt(step - 1), rel=1e-12)


@pytest.mark.parametrize("step", [101, 500, 1999, 2000])
def test_the_cosine_is_nanogpt_s(step: int) -> None:
    assert learning_rate(step, 2000, BASE) == pytest.approx(nanogpt(step), rel=1e-12)


def test_ends_and_middles() -> None:
    assert learning_rate(2000, 2000, BASE) == pytest.approx(1e-4)
    assert learning_rate(1050, 2000, BASE) == pytest.approx((1e-3 + 1e-4) / 2)
    linear = {**BASE, "schedule": "linear"}
    assert learning_rate(1050, 2000, linear) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(2000, 2000, linear) == pytest.approx(1e-4)
    assert {learning_rate(step, 2000, {**BASE, "schedule": "constant"}) for step in range(101, 2001, 7)} == {1e-3}


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_it_rises_and_then_never_rises_again(kind: str) -> None:
    rates = [learning_rate(step, 2000, {**BASE, "schedule": kind}) for step in range(1, 2001)]
    assert all(a < b for a, b in zip(rates[:100], rates[1:100]))
    assert all(a >= b for a, b in zip(rates[100:], rates[101:]))
    assert max(rates) <= 1e-3 and min(rates[100:]) >= 1e-4


def test_a_warm_up_longer_than_the_run() -> None:
    assert learning_rate(5, 5, {"schedule": "cosine", "lr": 1.0, "min_lr": 0.0, "warmup_steps": 9}) == 0.5


def by_torch(num_steps: int, lr: float, make: Callable[[Any, Any], Any]) -> list[float]:
    """The rate that each step of an optimizer sees, a scheduler stepping after it."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, rates = make(torch.optim.lr_scheduler, sgd), []
    for _ in range(num_steps):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step() if len(rates) < num_steps else None
    return rates


def rates(num_steps: int, **options: Any) -> list[float]:
    return [learning_rate(step, num_steps, Optimizer(**options).model_dump()) for step in range(1, num_steps + 1)]


def test_steps_are_torch_s_multi_step() -> None:
    wanted = by_torch(30, 0.4, lambda kinds, sgd: kinds.MultiStepLR(sgd, [10, 17, 25], 0.2))
    assert rates(30, schedule="step", lr=0.4, milestones=(10, 17, 25), gamma=0.2) == pytest.approx(wanted, rel=1e-12)
    assert len({round(rate, 9) for rate in wanted}) == 4
    low = rates(30, schedule="step", lr=0.4, milestones=(10, 17, 25), gamma=0.2, min_lr=0.05, warmup_steps=3)
    assert low == pytest.approx([0.1, 0.2, 0.3, *wanted[3:17], *[0.05] * 13], rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"pct_start": 0.1, "div_factor": 10.0, "final_div_factor": 100.0},
                                     {"pct_start": 0.0},
                                     {"pct_start": 0.55}], ids=str)
@pytest.mark.parametrize("num_steps", [2, 7, 40])
def test_one_cycle_is_torch_s(num_steps: int, options: dict[str, float]) -> None:
    wanted = by_torch(num_steps, 0.1, lambda kinds,
                      sgd: kinds.OneCycleLR(sgd, 0.3, total_steps=num_steps, cycle_momentum=False, **options))
    assert rates(num_steps, schedule="one-cycle", lr=0.3, **options) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("num_steps", [1, 10])
def test_one_cycle_that_begins_at_its_peak(num_steps: int) -> None:
    """Here torch divides by zero."""
    found = rates(num_steps, schedule="one-cycle", lr=0.3, pct_start=1 / num_steps if num_steps > 1 else 0.0)
    assert found[0] == pytest.approx(0.3 if num_steps > 1 else 0.3 / 25e4) and found == sorted(found, reverse=True)


def test_the_rate_grows_with_the_batch() -> None:
    options = {**BASE, "base_batch": 256}
    larger, plain = scaled(options, 1024), scaled({**BASE, "base_batch": 0}, 1024)
    for step in (1, 50, 300, 2000):
        assert learning_rate(step, 2000, larger) == pytest.approx(4 * learning_rate(step, 2000, BASE), rel=1e-12)
        assert learning_rate(step, 2000, plain) == learning_rate(step, 2000, BASE)
    assert scaled(options, 64)["lr"] == BASE["lr"] / 4
