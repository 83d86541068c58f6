"""`elastic.model.backend.Backend` in NumPy, the oracle. In precision "float64" its buffers are float64, unlike any other backend's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.common import Door, HostBackend, looked_up, named_rows, neutral, tallied
from backends.reference import optimizer
from backends.reference.ops import ReferenceOps
from backends.reference.tape import Variable, backward, value_of
from elastic.model.backend import Batch, Buffer, Model, ShardResult, UpdateRule


class Reference(Door):
    name, trains = "reference", "model of named arrays"

    def create(self, model: Model, settings: Any) -> ReferenceBackend:
        """`settings` has device ("cpu" or "auto"), precision ("float32", "float64"); threads and compile do not matter.
        """
        return ReferenceBackend(self.adapt(model), settings)


framework = Reference()


@dataclass
class Run:
    """What a backward pass needs of pieces that have run."""

    start: Variable | None
    leaves: Mapping[str, Variable]
    result: Variable


class ReferenceBackend(HostBackend):
    """One model in NumPy."""

    name = "reference"

    def __init__(self, model: Any, settings: Any):
        super().__init__(model, settings)
        self._ops = ReferenceOps(self._dtype)
        self._params: Mapping[str, np.ndarray] = {}

    def bind(self, params: Mapping[str, Buffer], buffers: Mapping[str, Any]) -> None:
        self._params = {name: params[name] for name in self.parameters}
        self._state = {name: buffers[name] for name in self.buffers}

    def gradients(self, batch: Batch, seed: int, into: Mapping[str, Buffer]) -> ShardResult:
        leaves = {name: Variable(self._params[name]) for name in into}
        rows = {feature: Variable(self._wide(array)) for feature, array in looked_up(batch).items()}
        loss, weight, new = self._model.loss(self._ops, {**self._params, **leaves, **named_rows(rows)},
                                             self._copied(), neutral(batch, self._dtype), seed)
        backward(loss)
        for name, view in into.items():
            gradient = leaves[name].gradient
            if gradient is not None:
                view += gradient
        return ShardResult(float(loss.value), float(value_of(weight)),
                           {name: np.asarray(value_of(v)) for name, v in new.items()},
                           {feature: slope_of(leaf) for feature, leaf in rows.items()})

    def metrics(self, batch: Batch) -> Mapping[str, tuple[Any, float]]:
        rows = {feature: self._wide(array) for feature, array in looked_up(batch).items()}
        return tallied(self._model.metrics(self._ops, {**self._params, **named_rows(rows)}, self._copied(),
                                           neutral(batch, self._dtype)))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self._model.logits(self._ops, self._params, np.asarray(tokens, np.int64))

    def update(self, rule: UpdateRule, param: Buffer, grad: Buffer, slots: Mapping[str, Buffer], block: int) -> None:
        for start in range(0, len(param), block):
            cut = slice(start, start + block)
            optimizer.apply(rule, param[cut], grad[cut], {name: slot[cut] for name, slot in slots.items()})

    def squared_norms(self, grad: Buffer, block: int) -> np.ndarray:
        wide = (grad[start:start + block].astype(np.float64) for start in range(0, len(grad), block))
        return np.array([np.dot(values, values) for values in wide])

    def connect(self, axes: Mapping[str, Any]) -> None:
        self._ops.axes = dict(axes)

    def forward(self, key: Any, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch,
                seed: int
                ) -> Buffer | ShardResult:
        leaves = {name: Variable(self._params[name]) for name in self._read_by(pieces)}
        start = None if inputs is None else Variable(inputs.reshape(tuple(shape)))
        columns, weight = neutral(batch, self._dtype), None
        x = self._through(self._ops, {**self._params, **leaves}, pieces, start, columns, seed)
        if self._ends(pieces):
            x, weight = self._model.score(self._ops, x, columns, seed)
        self._kept[key] = Run(start, leaves, x)
        return x.value.reshape(-1) if weight is None else ShardResult(float(x.value), float(value_of(weight)), {})

    def backward_input(self, key: Any, gradient: Buffer | None) -> Buffer | None:
        """All of the work: an oracle may do too much at a time."""
        run = self._kept[key]
        backward(run.result, None if gradient is None else gradient.reshape(run.result.shape))
        if run.start is None:
            return None
        return np.zeros(run.start.value.size, self._dtype) if run.start.gradient is None else run.start.gradient.reshape(-1)

    def backward_weight(self, key: Any, into: Mapping[str, Buffer]) -> None:
        for name, leaf in self._kept.pop(key).leaves.items():
            if name in into and leaf.gradient is not None:
                into[name][...] += leaf.gradient

    def infer(self, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch) -> Any:
        start, columns = None if inputs is None else inputs.reshape(tuple(shape)), neutral(batch, self._dtype)
        x = self._through(self._ops, self._params, pieces, start, columns, None)
        return tallied(self._model.measure(self._ops, x,
                                           columns)) if self._ends(pieces) else np.ascontiguousarray(x).reshape(-1)

    def _wide(self, array: np.ndarray) -> np.ndarray:
        return array.astype(self._dtype, copy=False)

    def _copied(self) -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in self._state.items()}


def slope_of(leaf: Variable) -> np.ndarray:
    """An array of its own: a pull may have given another's, or a view of it."""
    return np.zeros_like(leaf.value) if leaf.gradient is None else np.array(leaf.gradient, leaf.dtype, order="C")
