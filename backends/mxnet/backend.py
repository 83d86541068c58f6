"""`elastic.backend.Backend` on MXNet: parameters are arrays over the platform's flat buffers, without a copy.

Kernels run in the calling thread (see `backends.mxnet`) and share scratch memory across threads, so one thread computes at a time
in a process; workers that are processes never wait for one another.
"""

from __future__ import annotations

import ctypes
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from backends.mxnet import adapter, optimizer, warn_if_late
from backends.mxnet.adapter import seeded
from backends.mxnet.graph import Graph, Unrecordable, key_of
from backends.mxnet.ops import MXNetOps, mx, shapes, to_array
from elastic.backend import Batch, Buffer, Model, ShardResult, Spec, UpdateRule
from elastic.errors import UserError

ALIGN_BYTES = 64
KEPT = 8  # block lists of recent ranges: parameters and two slots in two segments, and some to spare

_autograd = mx.autograd
_library = mx.base._LIB
_blas = ctypes.CDLL(str(Path(mx.__file__).parent / "libopenblas.so.0")) if (Path(mx.__file__).parent / "libopenblas.so.0").exists() else None


def create(model: Model | Any, settings: Any) -> MXNetBackend:
    """`settings` has device ("cpu", "auto"), precision ("float32", "float64" for tests), threads and compile. UserError."""
    warn_if_late()
    return MXNetBackend(adapt(model), settings)


def adapt(model: Any) -> Any:
    """A user's Gluon block as a model; others as they are. UserError where a block cannot serve."""
    if isinstance(model, mx.gluon.Block):
        with adapter.computing:
            return adapter.GluonModel(model)
    if not isinstance(getattr(model, "parameters", None), Mapping):
        raise UserError(f'model.kind gives a {type(model).__name__}, which is no Gluon block; backend.name = "mxnet" trains mxnet.gluon.Block.')
    return model


def construct(factory: Callable[..., Any], config: Mapping[str, Any], seed: int) -> Any:
    """A user's block or data set; what it draws to begin with is a function of `seed`, so every worker builds the same."""
    with seeded(seed):
        return factory(**config)


@contextmanager
def computing(threads: int, numpy_shapes: bool = True) -> Iterator[None]:
    """This thread's turn, with the thread count on which bits depend: OpenMP's is a thread's own setting, BLAS has one for all."""
    with adapter.computing:
        _library.MXSetNumOMPThreads(threads)
        if _blas is not None and _blas.openblas_get_num_threads() != threads:
            _blas.openblas_set_num_threads(threads)
        with shapes(numpy_shapes):
            yield


class MXNetBackend:
    """One model on the CPU. Calls may come from any thread; processes may hold several backends."""

    name = "mxnet"

    def __init__(self, model: Any, settings: Any):
        if settings.device not in ("cpu", "auto"):
            raise UserError(f'backend.device = {settings.device!r} is not for the mxnet backend, which runs on "cpu"; '
                            'write backend.name = "torch" for a GPU.')
        if settings.precision not in ("float32", "float64"):
            raise UserError(f'backend.precision = {settings.precision!r} must be "float32" with the mxnet backend.')
        self.parameters: Mapping[str, Spec] = model.parameters
        self.buffers: Mapping[str, Spec] = model.buffers
        self._model = model
        self._dtype = np.dtype(settings.precision)
        self._ops = MXNetOps(self._dtype)
        self._own = model if isinstance(model, adapter.GluonModel) else None
        self._way = int(settings.threads), self._own is None or self._own.numpy  # how `computing` is entered
        self._leaves: dict[str, Any] = {}
        self._state: Mapping[str, np.ndarray] = {}
        self._trainable: set[str] = set()
        self._graphs: dict[Any, Callable[..., dict[str, Any]]] = {}
        self._compilations = 0
        self._kept: OrderedDict[tuple[int, int, int], list[Any]] = OrderedDict()

    def allocate(self, size: int) -> Buffer:
        room = np.zeros(size * self._dtype.itemsize + ALIGN_BYTES, np.uint8)
        start = -room.ctypes.data % ALIGN_BYTES
        return room[start:start + size * self._dtype.itemsize].view(self._dtype)

    def initial(self) -> Mapping[str, Any]:
        return self._model.initial() if hasattr(self._model, "initial") else {}

    def bind(self, params: Mapping[str, Buffer], buffers: Mapping[str, Any]) -> None:
        with computing(*self._way):
            self._leaves = {name: as_array(params[name]) for name in self.parameters}
            if self._own is None or self._own.numpy:
                self._leaves = {name: leaf.as_np_ndarray() for name, leaf in self._leaves.items()}
        self._state = {name: buffers[name] for name in self.buffers}
        self._trainable = set()
        self._kept.clear()

    def gradients(self, batch: Batch, seed: int, into: Mapping[str, Buffer]) -> ShardResult:
        with computing(*self._way):
            self._aim(into)
            columns, state = self._columns(batch), self._device_state()
            with _autograd.record():
                loss, weight, new = self._loss(state, columns, seed)
            total, count = number(loss), number(weight)
            if self._backward(loss):
                for name, view in into.items():
                    leaf = self._leaves[name]
                    if leaf._fresh_grad:
                        view += np.from_dlpack(Lent(leaf.grad))
                        leaf._fresh_grad = False
            elif count:
                raise UserError("model.freeze or the model itself leaves the loss without any trainable parameter behind it.")
            return ShardResult(total, count, {name: as_numpy(value) for name, value in new.items()})

    def metrics(self, batch: Batch) -> Mapping[str, tuple[float, float]]:
        # in predict mode the kernels of some layers rearrange their weights in place, here in the platform's own buffers
        with computing(*self._way), _autograd.train_mode():  # a user's block switches back, on copies
            found = self._measured(self._device_state(), self._columns(batch))
            value = plain if hasattr(self._model, "tally") else number
            return {name: (value(total), number(weight)) for name, (total, weight) in found.items()}

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """The scores of a model that offers `logits`."""
        with computing(*self._way), _autograd.train_mode():
            return self._model.logits(self._ops, self._leaves, to_array(tokens, self._dtype)).asnumpy()

    def update(self, rule: UpdateRule, param: Buffer, grad: Buffer, slots: Mapping[str, Buffer], block: int) -> None:
        with computing(*self._way):
            kept = {name: self._blocks(slot, block) for name, slot in slots.items()}
            for i, (values, slope) in enumerate(zip(self._blocks(param, block), blocks_of(grad, block))):
                optimizer.apply(rule, values, slope, {name: blocks[i] for name, blocks in kept.items()})

    def squared_norms(self, grad: Buffer, block: int) -> np.ndarray:
        # NumPy sums in pairs, in one thread; its dot product would go to a BLAS with a thread count of its own
        return np.array([np.square(grad[i:i + block], dtype=np.float64).sum() for i in range(0, len(grad), block)])

    def compilations(self) -> int:
        return self._compilations

    def _loss(self, state: Mapping[str, Any], columns: Any, seed: int) -> tuple[Any, Any, Mapping[str, Any]]:
        if self._own is not None:
            return self._own.loss(None, self._leaves, state, columns, seed)

        def results(*arguments: Any) -> dict[str, Any]:
            loss, weight, new = self._model.loss(*arguments)
            return {"loss": loss, "weight": weight, **{f"new/{name}": value for name, value in new.items()}}

        found = self._graph(results, frozenset(self._trainable), state, columns, seed)
        return found["loss"], found["weight"], {name: found[f"new/{name}"] for name in self._state if f"new/{name}" in found}

    def _measured(self, state: Mapping[str, Any], columns: Any) -> Mapping[str, tuple[Any, Any]]:
        if self._own is not None:
            return self._own.metrics(None, self._leaves, state, columns)

        def results(*arguments: Any) -> dict[str, Any]:
            pairs = self._model.metrics(*arguments[:-1])
            return {f"{name}/{i}": value for name, pair in pairs.items() for i, value in enumerate(pair)}

        found = self._graph(results, "metrics", state, columns, 0)
        return {name.removesuffix("/0"): (total, found[name.removesuffix("0") + "1"]) for name, total in found.items() if name.endswith("/0")}

    def _graph(self, function: Callable[..., dict[str, Any]], what: Any, state: Mapping[str, Any], columns: Mapping[str, Any],
               seed: int) -> dict[str, Any]:
        """Results of the graph that is recorded for these shapes, or of one kernel after the other where a model cannot be recorded."""
        key = key_of(what, state, columns)
        if key not in self._graphs:
            try:
                with _autograd.pause(train_mode=True):
                    self._graphs[key] = Graph(function, self._ops, self._leaves, state, columns, seed)
            except Unrecordable:
                self._graphs[key] = functools.partial(function, self._ops)
            self._compilations += 1
        return self._graphs[key](self._leaves, state, columns, seed)

    def _backward(self, loss: Any) -> bool:
        """False where no trainable parameter stands behind the loss."""
        try:
            loss.backward()
        except mx.MXNetError as error:
            if "computational graph" not in str(error):
                raise
            return False
        return True

    def _aim(self, into: Mapping[str, Buffer]) -> None:
        """Gives the leaves in `into` a gradient; the others are frozen."""
        if into.keys() == self._trainable:
            return
        self._trainable = set(into)
        self._ops.apart = len(into) < len(self.parameters)
        self._leaves = {name: leaf.detach() for name, leaf in self._leaves.items()}
        for name in into:
            self._leaves[name].attach_grad()

    def _device_state(self) -> dict[str, Any]:
        """Copies, because a step may be redone."""
        return {name: self._own.array(value) if self._own else to_array(value, self._dtype) for name, value in self._state.items()}

    def _columns(self, batch: Any) -> Any:
        return self._own.arrays(batch) if self._own else {name: to_array(column, self._dtype) for name, column in batch.items()}

    def _blocks(self, buffer: Buffer, block: int) -> list[Any]:
        # only of buffers that live as long as the model: a kept array holds its memory, so the address cannot pass to another
        key = (buffer.__array_interface__["data"][0], len(buffer), block)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = blocks_of(buffer, block)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return found


def as_array(buffer: np.ndarray) -> Any:
    """An MXNet array over the same memory."""
    return mx.nd.from_dlpack(buffer.__dlpack__())


class Lent:
    """An MXNet array as NumPy takes it without a copy. It must be in C order, as gradients are; MXNet refuses others."""

    def __init__(self, array: Any):
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.to_dlpack_for_read()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # the CPU


def blocks_of(buffer: np.ndarray, block: int) -> list[Any]:
    return [as_array(buffer[start:start + block]) for start in range(0, len(buffer), block)]


def as_numpy(value: Any) -> Any:
    return value.asnumpy() if hasattr(value, "asnumpy") else value


def number(value: Any) -> float:
    return float(as_numpy(value))


def plain(value: Any) -> Any:
    """A number, or float64 NumPy where there are several."""
    value = as_numpy(value)
    return np.asarray(value, np.float64) if np.ndim(value) else float(value)
