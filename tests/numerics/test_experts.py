"""A mixture of experts against one token after the other in NumPy, on every framework in float64, and its balance against the formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import RecipeError
from nlp import gpt
from nlp.experts import Experts
from tests.support.axes import split_ops
from tests.support.frameworks import assert_close, differentiate, load, names
from tests.support.models import rig_of
from tests.support.sampling import sometimes

ROWS, TIME, WIDTH, WIDE = 3, 5, 4, 6


def arrays(rng: np.random.Generator, num: int) -> dict[str, np.ndarray]:
    return {"x": rng.standard_normal((ROWS, TIME, WIDTH)), "h0.moe.gate.weight": rng.standard_normal((WIDTH, num)),
            "h0.moe.up.weight": rng.standard_normal((num, WIDTH, WIDE)),
            "h0.moe.down.weight": rng.standard_normal((num, WIDE, WIDTH))}


def odds_of(values: dict[str, np.ndarray]) -> np.ndarray:
    scores = np.exp(values["x"].reshape(-1, WIDTH) @ values["h0.moe.gate.weight"])
    return scores / scores.sum(1, keepdims=True)


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def plain(values: dict[str, np.ndarray], top: int, capacity: float) -> tuple[np.ndarray, int]:
    """Every token through its experts, first choices of all tokens first; and how many choices found no place."""
    tokens, odds = values["x"].reshape(-1, WIDTH), odds_of(values)
    num = odds.shape[1]
    most, taken, left_out, out = math.ceil(capacity * len(tokens) * top / num), [0] * num, 0, np.zeros_like(tokens)
    orders = [sorted(range(num), key=lambda e: (-row[e], e))[:top] for row in odds]
    for choice in range(top):
        for t, token in enumerate(tokens):
            expert = orders[t][choice]
            if taken[expert] == most:
                left_out += 1
                continue
            taken[expert] += 1
            gate = odds[t, expert] / (sum(odds[t, e] for e in orders[t]) if top > 1 else 1.0)
            hidden = np.array([gelu(v) for v in token @ values["h0.moe.up.weight"][expert]])
            out[t] += gate * (hidden @ values["h0.moe.down.weight"][expert])
    return out.reshape(values["x"].shape), left_out


def mixture(top: int, capacity: float, balance: float = 0.0, weights: np.ndarray | None = None) -> Any:
    def function(ops: Any, *leaves: Any) -> Any:
        given_weights = None if weights is None else ops.constant(weights)
        layers = Experts(ops, True, 0.0, 7, top=top, capacity=capacity, balance=balance, weights=given_weights)
        params = dict(zip(arrays(np.random.default_rng(0), 1), leaves))
        return layers.mlp(params, params["x"], "h0")

    return function


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("name", names())
def test_tokens_go_through_their_experts(name: str, top: int) -> None:
    load(name, "ops")
    left_out = []

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.sampled_from([0.5, 1.0, 1.25, 5.0]))
    def check(seed: int, num: int, capacity: float) -> None:
        rng = np.random.default_rng(seed)
        values = arrays(rng, num)
        wanted, without = plain(values, top, capacity)
        left_out.append(without)
        weights = [rng.standard_normal(wanted.shape)]
        (found,), gradients = differentiate(name, mixture(top, capacity), list(values.values()), "float64",
                                            cotangents=weights)
        assert_close(found, wanted, 1e-12)
        if name == "reference":
            for key, gradient in zip(values, gradients):  # central differences of the plain one, in one direction
                direction = rng.standard_normal(values[key].shape)
                up, down = (plain({**values, key: values[key] + step * direction}, top, capacity)[0]
                            for step in (1e-6, -1e-6))
                assert np.sum(gradient * direction) == pytest.approx(np.sum((up - down) * weights[0]) / 2e-6, rel=1e-5,
                                                                     abs=1e-6), key
        else:
            _, right = differentiate("reference", mixture(top, capacity), list(values.values()), "float64",
                                     cotangents=weights)
            for key, gradient, slope in zip(values, gradients, right):
                assert_close(gradient, slope, 1e-11, key)

    check()
    assert any(left_out) and not all(left_out)


@pytest.mark.parametrize("name", names())
def test_the_balance_is_the_formula_s(name: str) -> None:
    """In the gradient alone: that of balance * experts * sum of f P * tokens, of which filler rows are none."""
    split_ops(name)
    rng, num, real = np.random.default_rng(1), 3, np.array([1.0, 0.0, 1.0])
    values = arrays(rng, num)

    def penalty(gate: np.ndarray) -> float:
        odds = odds_of({**values, "h0.moe.gate.weight": gate}).reshape(ROWS, TIME, num)[real > 0].reshape(-1, num)
        share = np.bincount(odds.argmax(1), minlength=num) / len(odds)
        return 0.3 * num * float(share @ odds.mean(0)) * len(odds)

    results = [differentiate(name, mixture(2, 2.0, balance, real), list(values.values()), "float64",
                             cotangents=[np.zeros(values["x"].shape)])
               for balance in (0.3, 0.0)]
    (found, with_it), (plainly, without) = results
    assert np.array_equal(found[0], plainly[0]) and not np.any(without[1])
    gate = values["h0.moe.gate.weight"]
    for _ in range(3):
        direction = rng.standard_normal(gate.shape)
        slope = (penalty(gate + 1e-6 * direction) - penalty(gate - 1e-6 * direction)) / 2e-6
        assert abs(slope) > 1e-3 and np.sum(with_it[1] * direction) == pytest.approx(slope, rel=1e-6)
    assert not np.any(with_it[2]) and np.any(with_it[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", names("reference"))
def test_a_model_with_experts_is_the_reference_s(name: str, recompute: bool) -> None:
    split_ops(name)
    config = {"layers": 2, "heads": 2, "width": 8, "context": 6, "experts": 3, "top": 2, "balance": 0.1,
              "capacity": 1.0, "recompute": recompute}
    batch = {"tokens": np.random.default_rng(2).integers(0, 11, (3, 7)), "row_weight": np.float32([1, 1, 0])}
    found, wanted = (rig_of(which, gpt.build(config, {"vocab_size": 11})) for which in (name, "reference"))
    for rig in (found, wanted):
        rig.param *= 5.0  # so that choices are clear
    for seed in (1, 2):
        (gradient, result), (slope, right) = (rig.gradient(batch, seed) for rig in (found, wanted))
        assert result.loss_sum == pytest.approx(right.loss_sum, rel=1e-5)
        assert_close(gradient, slope, 1e-5)
    assert found.backend.metrics(batch)["loss"] == pytest.approx(wanted.backend.metrics(batch)["loss"], rel=1e-5)
    assert_close(found.backend.logits(batch["tokens"][:1, :3]), wanted.backend.logits(batch["tokens"][:1, :3]), 1e-5)


@sometimes("experts", 0.3)
def test_a_model_with_experts_compiles_once() -> None:
    load("torch", "backend")
    config = {"layers": 1, "expert_every": 1, "heads": 2, "width": 8, "context": 6, "experts": 3, "top": 2,
              "recompute": True}
    batch = {"tokens": np.random.default_rng(2).integers(0, 11, (3, 7)), "row_weight": np.ones(3, np.float32)}
    eager, compiled = (rig_of("torch", gpt.build(config, {"vocab_size": 11}), compile=compile)
                       for compile in (False, True))
    for seed in (1, 2):
        assert_close(compiled.gradient(batch, seed)[0], eager.gradient(batch, seed)[0], 1e-5)
    assert compiled.backend.compilations() == 1


@pytest.mark.parametrize(("config", "words"), [
    ({"experts": 2, "top": 3}, "model.top = 3 must be 1 or 2"),
    ({"experts": 1, "top": 2}, "no more than model.experts = 1"),
    ({"experts": 4, "layers": 1}, "model.expert_every = 2 must be at most model.layers = 1"),
    ({"capacity": 0.0}, "model.capacity = 0.0"),
    ({"balance": -1.0}, "model.balance = -1.0"),
    ({"experts": -1}, "model.experts = -1 must be a whole number of at least 0")])
def test_wrong_keys_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        gpt.build(config, {"vocab_size": 11})
