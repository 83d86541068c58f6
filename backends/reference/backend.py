"""`elastic.backend.Backend` in NumPy, the oracle. In precision "float64" its buffers are float64, unlike any other backend's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from backends.reference import optimizer
from backends.reference.ops import ReferenceOps
from backends.reference.tape import Variable, backward, value_of
from elastic.backend import Batch, Buffer, Model, ShardResult, UpdateRule
from elastic.errors import UserError

ALIGN_BYTES = 64


def create(model: Model, settings: Any) -> ReferenceBackend:
    """`settings` has device ("cpu" or "auto"), precision ("float32", "float64"); threads and compile do not matter."""
    if not hasattr(model, "parameters") or callable(model.parameters):
        raise UserError(f'backend.name = "reference" runs the models that come with the platform, not {type(model).__name__}; use "torch".')
    return ReferenceBackend(model, settings)


class ReferenceBackend:
    """One model in NumPy."""

    name = "reference"

    def __init__(self, model: Any, settings: Any):
        if settings.device not in ("cpu", "auto"):
            raise UserError(f'backend.device = {settings.device!r} is not for the reference backend, which runs on "cpu".')
        if settings.precision not in ("float32", "float64"):
            raise UserError(f"backend.precision = {settings.precision!r} must be float32 or float64 with the reference backend.")
        self.parameters = model.parameters
        self.buffers = model.buffers
        self._model = model
        self._dtype = np.dtype(settings.precision)
        self._ops = ReferenceOps(self._dtype)
        self._params: Mapping[str, np.ndarray] = {}
        self._state: Mapping[str, np.ndarray] = {}

    def allocate(self, size: int) -> Buffer:
        room = np.zeros(size * self._dtype.itemsize + ALIGN_BYTES, np.uint8)
        start = -room.ctypes.data % ALIGN_BYTES
        return room[start:start + size * self._dtype.itemsize].view(self._dtype)

    def initial(self) -> Mapping[str, Any]:
        return {}

    def bind(self, params: Mapping[str, Buffer], buffers: Mapping[str, Any]) -> None:
        self._params = {name: params[name] for name in self.parameters}
        self._state = {name: buffers[name] for name in self.buffers}

    def gradients(self, batch: Batch, seed: int, into: Mapping[str, Buffer]) -> ShardResult:
        leaves = {name: Variable(self._params[name]) for name in into}
        loss, weight, new = self._model.loss(self._ops, {**self._params, **leaves}, self._copied(), self._columns(batch), seed)
        backward(loss)
        for name, view in into.items():
            gradient = leaves[name].gradient
            if gradient is not None:
                view += gradient
        return ShardResult(float(loss.value), float(value_of(weight)), {name: np.asarray(value_of(v)) for name, v in new.items()})

    def metrics(self, batch: Batch) -> Mapping[str, tuple[Any, float]]:
        found = self._model.metrics(self._ops, self._params, self._copied(), self._columns(batch))
        return {name: (np.asarray(total, np.float64) if np.ndim(total) else float(total), float(weight)) for name, (total, weight) in found.items()}

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """The scores of a model that offers `logits`."""
        return self._model.logits(self._ops, self._params, np.asarray(tokens, np.int64))

    def update(self, rule: UpdateRule, param: Buffer, grad: Buffer, slots: Mapping[str, Buffer], block: int) -> None:
        for cut in cuts(len(param), block):
            optimizer.apply(rule, param[cut], grad[cut], {name: slot[cut] for name, slot in slots.items()})

    def squared_norms(self, grad: Buffer, block: int) -> np.ndarray:
        wide = (grad[cut].astype(np.float64) for cut in cuts(len(grad), block))
        return np.array([np.dot(values, values) for values in wide])

    def compilations(self) -> int:
        return 0

    def _copied(self) -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in self._state.items()}

    def _columns(self, batch: Batch) -> dict[str, np.ndarray]:
        return {name: np.asarray(column).astype(np.int64 if np.asarray(column).dtype.kind in "iu" else
                                                self._dtype if np.asarray(column).dtype.kind == "f" else bool)
                for name, column in batch.items()}


def cuts(size: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, size)) for start in range(0, size, block))
