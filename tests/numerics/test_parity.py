"""One model, one seed, every framework: 20 steps in float64 and 3 in float32 against the NumPy reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nlp import bert, gpt
from recommender import dlrm
from tests.support.descent import CLICKS, IMAGES, LR, ROWS, clicks, hidden, images, start, tokens
from tests.support.frameworks import differentiate, load, names
from vision import resnet, vit

STEPS = 20
Batch = Callable[[np.random.Generator], dict[str, np.ndarray]]


MODELS: dict[str, tuple[Any, Batch]] = {
    "nlp.gpt": (gpt.build({"layers": 2, "heads": 2, "width": 8, "context": 8, "bias": True, "dropout": 0.1},
                          {"vocab_size": 11}), tokens),
    "nlp.bert": (bert.build({"layers": 2, "heads": 2, "width": 8, "context": 8, "dropout": 0.1}, {"vocab_size": 11}),
                 hidden),
    "recommender.dlrm": (dlrm.build({"bottom": [8], "top": [9, 5], "dropout": 0.1}, CLICKS), clicks),
    "vision.resnet": (resnet.build({"blocks": [1, 1], "width": 4, "stem": "large"}, IMAGES), images),
    "vision.vit": (vit.build({"layers": 2, "heads": 2, "width": 8, "patch": 4, "dropout": 0.1}, IMAGES), images),
}


@dataclass
class Trained:
    """Losses per row of each step, and the first step's gradients as one vector."""

    losses: np.ndarray
    gradient: np.ndarray
    state: dict[str, np.ndarray]


def train(name: str, kind: str, precision: str, steps: int, ops: Any = None) -> Trained:
    """Plain gradient descent in NumPy; a framework gives loss, gradients and statistics."""
    model, make = MODELS[kind]
    params, state, rng = start(model.parameters), start(model.buffers), np.random.default_rng(5)
    losses, first = [], np.zeros(0)
    for step in range(steps):
        batch = make(rng)

        def function(ops: Any, *leaves: Any, batch: Mapping[str, np.ndarray] = batch,
                     step: int = step) -> tuple[Any, ...]:
            def constants(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
                return {key: ops.constant(value) for key, value in values.items()}

            total, _, new = model.loss(ops, dict(zip(params, leaves)), constants(state), constants(batch), 100 + step)
            return total, *(new[key] for key in state)

        weights = [np.array(1.0 / ROWS), *(np.zeros(value.shape) for value in state.values())]
        outputs, gradients = differentiate(name, function, list(params.values()), precision, ops, weights)
        losses.append(float(outputs[0]) / ROWS)
        state = {key: np.asarray(value, np.float64) for key, value in zip(state, outputs[1:])}
        first = first if step else np.concatenate([np.asarray(g, np.float64).ravel() for g in gradients])
        params = {key: value - LR * np.asarray(g, np.float64) for (key, value), g in zip(params.items(), gradients)}
    return Trained(np.array(losses), first, state)


def assert_parity(name: str, kind: str, ops: Any = None) -> None:
    found, wanted = (train(which, kind, "float64", STEPS, own) for which, own in ((name, ops), ("reference", None)))
    assert wanted.losses[-1] != wanted.losses[0] and np.linalg.norm(wanted.gradient) > 1e-2
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=0, atol=1e-8)
    assert np.linalg.norm(found.gradient - wanted.gradient) <= 1e-9 * np.linalg.norm(wanted.gradient)
    for key, value in wanted.state.items():
        np.testing.assert_allclose(found.state[key], value, rtol=1e-7, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", names("reference"))
def test_float64(name: str, kind: str) -> None:
    load(name, "ops")
    assert_parity(name, kind)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", names("reference"))
def test_float32(name: str, kind: str) -> None:
    load(name, "ops")
    found, wanted = train(name, kind, "float32", 3), train("reference", kind, "float64", 3)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "kernel"),
                         [("nlp.gpt", "gelu"), ("nlp.bert", "layer_norm"), ("recommender.dlrm", "binary_cross_entropy"),
                                               ("vision.resnet", "batch_norm"), ("vision.vit", "mean")])
def test_a_wrong_kernel_is_caught(kind: str, kernel: str) -> None:
    """The usual mistakes: gelu's tanh form, another epsilon, the biased variance in the running one, results off by a
    part in a million."""
    ops = load("torch", "ops").TorchOps("cpu", __import__("torch").float64)
    right = getattr(ops, kernel)

    def biased(*arguments: Any) -> tuple[Any, Any, Any]:
        y, mean, var = right(*arguments)
        return y, mean, var * 0.999

    wrong = {"gelu": lambda x: __import__("torch").nn.functional.gelu(x, approximate="tanh"), "batch_norm": biased,
             "layer_norm": lambda x, weight, bias, eps: right(x, weight, bias, 1e-5)}
    setattr(ops, kernel, wrong.get(kernel, lambda *arguments: right(*arguments) * 1.000001))
    with pytest.raises(AssertionError):
        assert_parity("torch", kind, ops)
