"""`elastic.model.backend.Backend` in NumPy, the oracle. In precision "float64" its buffers are float64, unlike any other backend's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.common import before_models as before_models
from backends.reference import optimizer
from backends.reference.ops import ReferenceOps
from backends.reference.tape import Variable, backward, value_of
from elastic.errors import UserError
from elastic.model.backend import Batch, Buffer, Habits, Model, ShardResult, UpdateRule

ALIGN_BYTES = 64


def create(model: Model, settings: Any) -> ReferenceBackend:
    """`settings` has device ("cpu" or "auto"), precision ("float32", "float64"); threads and compile do not matter."""
    if not hasattr(model, "parameters") or callable(model.parameters):
        raise UserError(f'backend.name = "reference" runs the models that come with the platform, not {type(model).__name__}; use "torch".')
    return ReferenceBackend(model, settings)


@dataclass
class Run:
    """What a backward pass needs of pieces that have run."""

    start: Variable | None
    leaves: Mapping[str, Variable]
    result: Variable


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
        self._kept: dict[Any, Run] = {}

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

    def rehearse(self, batch: Batch, room: Callable[[], Mapping[str, Buffer]]) -> Habits:
        self.gradients(batch, 0, room())
        return Habits()

    def metrics(self, batch: Batch) -> Mapping[str, tuple[Any, float]]:
        return tallied(self._model.metrics(self._ops, self._params, self._copied(), self._columns(batch)))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """The scores of a model that offers `logits`."""
        return self._model.logits(self._ops, self._params, np.asarray(tokens, np.int64))

    def update(self, rule: UpdateRule, param: Buffer, grad: Buffer, slots: Mapping[str, Buffer], block: int) -> None:
        for cut in cuts(len(param), block):
            optimizer.apply(rule, param[cut], grad[cut], {name: slot[cut] for name, slot in slots.items()})

    def squared_norms(self, grad: Buffer, block: int) -> np.ndarray:
        wide = (grad[cut].astype(np.float64) for cut in cuts(len(grad), block))
        return np.array([np.dot(values, values) for values in wide])

    def connect(self, axes: Mapping[str, Any]) -> None:
        self._ops.axes = dict(axes)

    def forward(self, key: Any, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch, seed: int
                ) -> Buffer | ShardResult:
        names = dict.fromkeys(name for piece in pieces for name in self._model.names(piece))
        leaves = {name: Variable(self._params[name]) for name in names}
        start = None if inputs is None else Variable(inputs.reshape(tuple(shape)))
        x: Any = start
        columns, weight = self._columns(batch), None
        for piece in pieces:
            x = self._model.run(self._ops, {**self._params, **leaves}, piece, x, columns, seed)
        if pieces[-1] == self._model.pieces[-1]:
            x, weight = self._model.score(self._ops, x, columns, seed)
        self._kept[key] = Run(start, leaves, x)
        return x.value.reshape(-1) if weight is None else ShardResult(float(x.value), float(value_of(weight)), {})

    def backward(self, key: Any, gradient: Buffer | None, into: Mapping[str, Buffer]) -> Buffer | None:
        found = self.backward_input(key, gradient)
        self.backward_weight(key, into)
        return found

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

    def forget(self) -> None:
        self._kept.clear()

    def infer(self, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch) -> Any:
        x, columns = None if inputs is None else inputs.reshape(tuple(shape)), self._columns(batch)
        for piece in pieces:
            x = self._model.run(self._ops, self._params, piece, x, columns, None)
        return tallied(self._model.measure(self._ops, x, columns)) if pieces[-1] == self._model.pieces[-1] else np.ascontiguousarray(x).reshape(-1)

    def compilations(self) -> int:
        return 0

    def _copied(self) -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in self._state.items()}

    def _columns(self, batch: Batch) -> dict[str, np.ndarray]:
        return {name: np.asarray(column).astype(np.int64 if np.asarray(column).dtype.kind in "iu" else
                                                self._dtype if np.asarray(column).dtype.kind == "f" else bool)
                for name, column in batch.items()}


def tallied(found: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, float]]:
    """Sums and weights as numbers; what is no scalar as float64."""
    return {name: (np.asarray(total, np.float64) if np.ndim(total) else float(total), float(weight)) for name, (total, weight) in found.items()}


def cuts(size: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, size)) for start in range(0, size, block))
