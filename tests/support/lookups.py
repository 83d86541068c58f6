"""A small model of what features have looked up, for backends: pooled rows, rows of a list one by one, and rows that it does not read."""

from __future__ import annotations

from typing import Any

import numpy as np

from elastic.model.backend import Spec

WIDTH, LENGTH, HIDDEN, ROWS = 4, 3, 5, 6
SHAPES = {"history": (ROWS, LENGTH, WIDTH), "spare": (ROWS, 2), "user": (ROWS, WIDTH)}
READ = ("history", "user")


def batch(seed: int = 0, rows: int = ROWS) -> dict[str, Any]:
    """Two rows are fillers."""
    rng = np.random.default_rng(seed)
    looked_up = {feature: rng.standard_normal((rows, *shape[1:])).astype(np.float32) for feature, shape in SHAPES.items()}
    return {"label": rng.standard_normal(rows).astype(np.float32),
            "row_weight": (np.arange(rows) < max(rows - 2, 0)).astype(np.float32), "rows": looked_up}


class Lookups:
    """Of a user's row, and of the rows of a list that it attends to: a score, and its squared error."""

    parameters = {"weight": Spec((WIDTH, HIDDEN), scale=0.5), "bias": Spec((HIDDEN,), init="uniform", scale=0.5),
                  "out": Spec((HIDDEN, WIDTH), scale=0.5)}
    buffers: dict[str, Spec] = {}

    def score(self, ops: Any, params: Any) -> Any:
        user, history = params["rows/user"], params["rows/history"]
        attended = ops.softmax(ops.contract("rd,rtd->rt", user, history))
        mixed = ops.contract("rt,rtd->rd", attended, history)
        hidden = ops.tanh(ops.contract("rd,dk->rk", mixed, params["weight"], params["bias"]))
        return ops.sum(ops.multiply(ops.contract("rk,kd->rd", hidden, params["out"]), user), (1,))

    def loss(self, ops: Any, params: Any, state: Any, batch: Any, seed: Any) -> tuple[Any, Any, dict[str, Any]]:
        found = ops.squared_error(self.score(ops, params), batch["label"], batch["row_weight"])
        return found, ops.sum(batch["row_weight"]), {}

    def metrics(self, ops: Any, params: Any, state: Any, batch: Any) -> dict[str, tuple[Any, Any]]:
        loss, weight, _ = self.loss(ops, params, state, batch, 0)
        return {"loss": (loss, weight), "score": (ops.sum(self.score(ops, params)), weight)}


class Counting(Lookups):
    """Minus the sum of what was looked up: no parameter has a part in it."""

    parameters = {"bias": Spec((1,), init="zeros")}

    def loss(self, ops: Any, params: Any, state: Any, batch: Any, seed: Any) -> tuple[Any, Any, dict[str, Any]]:
        found = ops.add(ops.sum(params["rows/user"]), ops.sum(params["rows/history"]))
        return ops.multiply(found, ops.constant(np.float32(-1.0))), ops.sum(batch["row_weight"]), {}


def values(seed: int = 1) -> dict[str, np.ndarray]:
    """Of the parameters."""
    rng = np.random.default_rng(seed)
    return {name: (0.5 * rng.standard_normal(spec.shape)).astype(np.float32)
            for name, spec in Lookups.parameters.items()}


def by_hand(params: dict[str, np.ndarray], batch: dict[str, Any]) -> float:
    """The loss sum in float64."""
    wide = {name: np.asarray(value, np.float64) for name, value in params.items()}
    user, history = (np.asarray(batch["rows"][feature], np.float64) for feature in ("user", "history"))
    scores = np.exp(np.einsum("rd,rtd->rt", user, history))
    mixed = np.einsum("rt,rtd->rd", scores / scores.sum(1, keepdims=True), history)
    score = (np.tanh(mixed @ wide["weight"] + wide["bias"]) @ wide["out"] * user).sum(1)
    return float((np.square(score - batch["label"]) * batch["row_weight"]).sum())


def numeric(params: dict[str, np.ndarray], batch: dict[str, Any], feature: str, step: float = 1e-5) -> np.ndarray:
    """The gradient of `by_hand` with respect to a feature's rows, by central differences."""
    at = np.asarray(batch["rows"][feature], np.float64)
    found = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        sides = []
        for sign in (1.0, -1.0):
            moved = at.copy()
            moved[place] += sign * step
            sides.append(by_hand(params, {**batch, "rows": {**batch["rows"], feature: moved}}))
        found[place] = (sides[0] - sides[1]) / (2 * step)
    return found
