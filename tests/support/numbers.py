"""A backend of a few lines, for members that train by hand: one parameter, a plain step of SGD."""

from __future__ import annotations

from typing import Any

import numpy as np

from elastic.model.backend import ShardResult, Spec


class Backend:
    """loss = value * w, its gradient is the batch's value; a plain step of SGD."""

    name = "numbers"
    parameters = {"w": Spec((1,), init="zeros")}
    buffers: dict[str, Spec] = {}

    def allocate(self, size: int) -> np.ndarray:
        return np.zeros(size, np.float32)

    def initial(self) -> dict[str, Any]:
        return {}

    def bind(self, params: Any, buffers: Any) -> None:
        self.params = params

    def gradients(self, batch: Any, seed: int, into: Any) -> ShardResult:
        into["w"][0] += batch["value"]
        return ShardResult(batch["value"], 2.0, {})

    def metrics(self, batch: Any) -> dict[str, tuple[float, float]]:
        return {"loss": (batch["value"], 1.0)}

    def tally(self) -> None:
        return None

    def update(self, rule: Any, param: Any, grad: Any, slots: Any, block: int) -> None:
        param -= rule.lr * rule.scale * grad

    def squared_norms(self, grad: Any, block: int) -> np.ndarray:
        return np.array([float(np.square(grad.astype(np.float64)).sum())])
