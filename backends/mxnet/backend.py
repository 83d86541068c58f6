"""`elastic.model.backend.Backend` on MXNet: parameters are arrays over the platform's flat buffers, without a copy.

Kernels run in the calling thread (see `backends.mxnet`) and share scratch memory across threads, so one thread computes
at a time in a process; workers that are processes never wait for one another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from backends.common import Blocks, Door, HostBackend, looked_up, mapped, named_rows, rehearse, tallied
from backends.mxnet import adapter, optimizer, warn_if_late
from backends.mxnet.adapter import seeded
from backends.mxnet.arrays import (
    add_fresh,
    as_array,
    as_numpy,
    blocks_of,
    flat,
    flattened,
    number,
    paired,
    slopes_of,
    taken,
)
from backends.mxnet.ops import MXNetOps, mx, to_array
from backends.mxnet.tracing import Graph, Unrecordable, key_of
from backends.mxnet.turn import computing, turn
from elastic.data.collate import stacked
from elastic.errors import UserError
from elastic.model.backend import ROWS, Batch, Buffer, Habits, Model, ShardResult, UpdateRule
from elastic.model.user_code import UNTRAINED

KINDS = ("bool", "int8", "int32", "int64", "uint8", "float16", "float32", "float64")  # of the library's arrays

_autograd = mx.autograd


class MXNet(Door):
    name, trains = "mxnet", "Gluon block"
    seeded = staticmethod(seeded)

    def create(self, model: Model | Any, settings: Any) -> MXNetBackend:
        """`settings` has device ("cpu", "auto"), precision ("float32", "float64" for tests), threads and compile.
        UserError."""
        warn_if_late()
        return MXNetBackend(self.adapt(model), settings)

    def own(self, model: Any) -> Any:
        if not isinstance(model, mx.gluon.Block):
            return super().own(model)
        with turn:
            return adapter.GluonModel(model)

    def collate(self, items: Sequence[Any]) -> Any:
        """MXNet's own arrays may be among them."""
        return stacked(items, KINDS, as_array=lambda item: taken_out(item) if isinstance(item, mx.nd.NDArray)
                       else np.asarray(item))


framework = MXNet()


def taken_out(array: Any) -> np.ndarray:
    with turn:
        return array.asnumpy()  # type: ignore[no-any-return]


@dataclass
class Pass:
    """What a micro-batch's backward pass needs. `gradients` are those of the parameters, by name, between its two
    halves."""

    result: Any
    inputs: Any
    leaves: Mapping[str, Any]
    gradients: Mapping[str, np.ndarray] = field(default_factory=dict)


class MXNetBackend(HostBackend):
    """One model on the CPU. Calls may come from any thread; processes may hold several backends."""

    name = "mxnet"

    def __init__(self, model: Any, settings: Any):
        super().__init__(model, settings)
        self._ops = MXNetOps(self._dtype)
        self._way = int(settings.threads), self._own is None or self._own.numpy  # how `computing` is entered
        self._leaves: dict[str, Any] = {}
        self._moved: tuple[str, ...] = ()
        # address, elements, and what rate and decay are multiplied by
        self._multiplied: list[tuple[int, int, tuple[float, float]]] = []
        self._trainable: set[str] = set()
        self._graphs: dict[Any, Callable[..., dict[str, Any]]] = {}
        self._blocks = Blocks(blocks_of)

    def bind(self, params: Mapping[str, Buffer], buffers: Mapping[str, Any]) -> None:
        with computing(*self._way):
            self._leaves = {name: as_array(params[name]) for name in self.parameters}
            if self._own is None or self._own.numpy:
                self._leaves = {name: leaf.as_np_ndarray() for name, leaf in self._leaves.items()}
        self._state = {name: buffers[name] for name in self.buffers}
        self._trainable = set()
        self._blocks.clear()
        rates = self._own.multiplied if self._own else {}
        self._multiplied = sorted((params[name].ctypes.data, params[name].size, both) for name, both in rates.items())

    def gradients(self, batch: Batch, seed: int, into: Mapping[str, Buffer], factor: float = 1.0) -> ShardResult:
        """With `factor` times the gradients."""
        with computing(*self._way), self._own.telling() if self._own else nullcontext():
            self._aim(into)
            columns, state = self._columns(batch), self._device_state()
            rows = self._rows(batch, columns)
            for leaf in rows.values():
                if leaf.size:  # to the library an array without elements is one of unknown shape
                    leaf.attach_grad()
            with _autograd.record():
                loss, weight, new = self._loss(state, columns, rows, seed)
            total, count = number(loss), number(weight)
            slope = None if factor == 1.0 else self._own.array(np.full(loss.shape, factor, loss.dtype))
            if self._differentiated(loss, slope):
                add_fresh(self._leaves, into)
            elif count:
                raise UserError(UNTRAINED)
            return ShardResult(total, count, {name: as_numpy(value) for name, value in new.items()}, slopes_of(rows))

    def rehearse(self, batch: Batch, room: Callable[[], Mapping[str, Buffer]]) -> Habits:
        own = self._own
        if own is None:
            return super().rehearse(batch, room)
        like = room()

        def run(hidden: Sequence[str], factor: float) -> tuple[ShardResult, Mapping[str, np.ndarray]]:
            into = {name: np.zeros(view.shape, view.dtype) for name, view in like.items()}
            with own.hidden(hidden):
                return self.gradients(batch, 0, into, factor), into

        self._find_moved(batch, like)
        rehearse(own, (*self.parameters, *self.buffers), run, own.attributes)
        return Habits(moved=self._moved)

    def _find_moved(self, batch: Batch, into: Mapping[str, Buffer]) -> None:
        """Which frozen parameters the loss writes to; they are as before afterwards, and it gets copies from now on.
        UserError for others."""
        assert self._own is not None
        self._moved = ()
        before = {name: leaf.asnumpy() for name, leaf in self._leaves.items()}
        self.gradients(batch, 0, into)
        written = [name for name, value in before.items()
                   if not np.array_equal(value, self._leaves[name].asnumpy(), equal_nan=True)]
        for name in written:
            self._leaves[name][:] = before[name]
            if name in into:
                raise UserError(f"model.kind: {self._own.kind} writes to its parameter {name} in its loss, and the "
                                "optimizer writes to "
                                'it too; give it grad_req = "null", or leave it to the optimizer.')
        self._moved = tuple(written)

    def metrics(self, batch: Batch) -> Mapping[str, tuple[float, float]]:
        # in predict mode the kernels of some layers rearrange their weights in place, here in the platform's own
        # buffers
        with computing(*self._way), _autograd.train_mode():  # a user's block switches back, on copies
            columns = self._columns(batch)
            return self._told(self._measured(self._device_state(), columns, self._rows(batch, columns)))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with computing(*self._way), _autograd.train_mode():
            return self._model.logits(self._ops, self._leaves, to_array(tokens, self._dtype)).asnumpy()

    def update(self, rule: UpdateRule, param: Buffer, grad: Buffer, slots: Mapping[str, Buffer], block: int) -> None:
        with computing(*self._way):
            for low, high, rates in self._ranges(param):
                own = rule if rates is None else replace(rule, lr=rule.lr * rates[0],
                                                         weight_decay=rule.weight_decay * rates[1])
                kept = {name: self._blocks(slot[low:high], block) for name, slot in slots.items()}
                for i, (values, slope) in enumerate(zip(self._blocks(param[low:high], block),
                                                        blocks_of(grad[low:high], block))):
                    optimizer.apply(own, values, slope, {name: blocks[i] for name, blocks in kept.items()})

    def _ranges(self, param: Buffer) -> Iterator[tuple[int, int, tuple[float, float] | None]]:
        """A range of the parameters, cut where some have a rate or decay of their own."""
        at = 0
        for offset, size, rates in self._multiplied:
            low = min(max((offset - param.ctypes.data) // param.itemsize, at), len(param))
            high = min(max((offset - param.ctypes.data) // param.itemsize + size, low), len(param))
            if low < high:
                if at < low:
                    yield at, low, None
                yield low, high, rates
                at = high
        if at < len(param):
            yield at, len(param), None

    def connect(self, axes: Mapping[str, Any]) -> None:
        self._ops.axes = dict(axes)

    def forward(self, key: Any, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch,
                seed: int
                ) -> Buffer | ShardResult:
        with computing(*self._way):
            self._aim(self._leaves)  # frozen ones too: it is told only in `backward` what learns
            entering = self._entering(inputs, shape)
            for leaf in entering.values():
                leaf.attach_grad()
            columns = self._columns(batch)
            with _autograd.record():
                found = self._made_by(pieces, entering, columns, seed)
            self._kept[key] = Pass(found.get("loss", found.get("out")), entering.get("inputs"), self._leaves)
            return ShardResult(number(found["loss"]), number(found["weight"]),
                               {}) if "loss" in found else flat(found["out"])

    def backward(self, key: Any, gradient: Buffer | None, into: Mapping[str, Buffer]) -> Buffer | None:
        with computing(*self._way):
            done = self._kept.pop(key)
            slope = self._back(done, gradient)
            add_fresh(done.leaves, into)
            return slope

    def backward_input(self, key: Any, gradient: Buffer | None) -> Buffer | None:
        # the whole pass: MXNet would compute most of this half again for the other one
        with computing(*self._way):
            done = self._kept[key]
            slope = self._back(done, gradient)
            done.gradients = {name: taken(leaf) for name, leaf in done.leaves.items() if leaf._fresh_grad}
            return slope

    def backward_weight(self, key: Any, into: Mapping[str, Buffer]) -> None:
        for name, gradient in self._kept.pop(key).gradients.items():
            if name in into:
                view = into[name]
                view += gradient

    def forget(self) -> None:
        super().forget()
        self._ops.lost = None

    def infer(self, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch) -> Any:
        with computing(*self._way), _autograd.train_mode():
            found = self._made_by(pieces, self._entering(inputs, shape), self._columns(batch), None)
            return flat(found["out"]) if "out" in found else self._told(paired(found))

    def _loss(self, state: Mapping[str, Any], columns: Any, rows: Mapping[str, Any], seed: int) -> tuple[Any, Any, Mapping[str, Any]]:
        if self._own is not None:
            copies = {name: self._leaves[name].copy() for name in self._moved}
            total, weight, new = self._own.loss(None, {**self._leaves, **copies}, state, columns, seed)
            return total, weight, {**new, **copies}

        def results(*arguments: Any) -> dict[str, Any]:
            loss, weight, new = self._model.loss(*arguments)
            return {"loss": loss, "weight": weight, **{f"new/{name}": value for name, value in new.items()}}

        found = self._graph(results, frozenset(self._trainable), state, columns, seed, rows)
        return found["loss"], found["weight"], {name: found[f"new/{name}"] for name in self._state
                                                if f"new/{name}" in found}

    def _measured(self, state: Mapping[str, Any], columns: Any,
                  rows: Mapping[str, Any]) -> Mapping[str, tuple[Any, Any]]:
        if self._own is not None:
            return self._own.metrics(None, self._leaves, state, columns)

        def results(*arguments: Any) -> dict[str, Any]:
            return flattened(self._model.metrics(*arguments[:-1]))

        return paired(self._graph(results, "metrics", state, columns, 0, rows))

    def _told(self, found: Mapping[str, tuple[Any, Any]]) -> Mapping[str, tuple[Any, float]]:
        if self._own is None:
            return tallied(found, as_numpy)
        return {name: (number(total), number(weight)) for name, (total, weight) in found.items()}

    def _entering(self, inputs: Buffer | None, shape: Sequence[int]) -> dict[str, Any]:
        return {} if inputs is None else {"inputs": as_array(inputs.reshape(tuple(shape))).as_np_ndarray()}

    def _made_by(self, pieces: Sequence[str], entering: Mapping[str, Any], columns: Mapping[str, Any], seed: int
                 | None) -> dict[str, Any]:
        """What pieces of the model make, as "out"; or the loss, or for evaluation (`seed` None) the metrics, where they
        end it."""
        def results(ops: Any, params: Mapping[str, Any], entering: Mapping[str, Any], batch: Mapping[str, Any],
                    handed: Any) -> dict[str, Any]:
            x = self._through(ops, params, pieces, entering.get("inputs"), batch, None if seed is None else handed)
            if not self._ends(pieces):
                return {"out": x}
            if seed is None:
                return flattened(self._model.measure(ops, x, batch))
            return dict(zip(("loss", "weight"), self._model.score(ops, x, batch, handed)))

        return self._graph(results, (*pieces, seed is None), entering, columns, seed or 0)

    def _back(self, done: Pass, gradient: Buffer | None) -> Buffer | None:
        """The gradient of the inputs; those of the parameters are where `add_fresh` finds them."""
        slope = None if gradient is None else as_array(gradient.reshape(done.result.shape)).as_np_ndarray()
        self._differentiated(done.result, slope)
        return None if done.inputs is None else flat(done.inputs.grad)

    def _graph(self, function: Callable[..., dict[str, Any]], what: Any, state: Mapping[str, Any],
               columns: Mapping[str, Any],
               seed: int, rows: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Results of the graph that is recorded for these shapes, or of one kernel after the other where a model cannot
        be recorded. `rows`: by feature, to be read as parameters are."""
        named = named_rows(rows or {})
        params, key = {**self._leaves, **named}, key_of(what, self._ops, state, {**columns, **named})
        if key not in self._graphs:
            try:
                with _autograd.pause(train_mode=True):
                    self._graphs[key] = Graph(function, self._ops, params, state, columns, seed)
            except Unrecordable:
                self._graphs[key] = functools.partial(function, self._ops)
            self._compilations += 1
        return self._graphs[key](params, state, columns, seed)

    def _differentiated(self, result: Any, slope: Any = None) -> bool:
        """A backward pass; False where no trainable parameter stands behind the result."""
        try:
            result.backward(slope)
        except mx.MXNetError as error:
            if "computational graph" not in str(error):
                raise
            return False
        finally:
            self._ops.raise_lost()
        return True

    def _aim(self, into: Mapping[str, Buffer]) -> None:
        """Gives the leaves in `into` a gradient; the others are frozen."""
        if into.keys() == self._trainable:
            return
        self._trainable = set(into)
        self._ops.apart = len(into) < len(self.parameters)
        self._leaves = {name: leaf.detach() for name, leaf in self._leaves.items()}
        # a user's layer of which a weight alone is frozen: MXNet's dense and convolution kernels leave out the bias's
        # gradient with it
        layers = {name.rpartition(".")[0] for name in into} if self._own else set()
        for name, leaf in self._leaves.items():
            if name in into or name.rpartition(".")[0] in layers:
                leaf.attach_grad()

    def _device_state(self) -> dict[str, Any]:
        """Copies, because a step may be redone."""
        return {name: self._own.array(value, is_exact=True) if self._own else to_array(value, self._dtype)
                for name, value in self._state.items()}

    def _columns(self, batch: Any) -> Any:
        return mapped(batch, self._own.array) if self._own else {
            name: to_array(column, self._dtype) for name, column in batch.items() if not isinstance(column, Mapping)}

    def _rows(self, batch: Any, columns: Any) -> dict[str, Any]:
        """What was looked up; of a user's own model the arrays that are in its batch, whose gradients it is to have."""
        return {feature: columns[ROWS][feature] if self._own else to_array(rows, self._dtype)
                for feature, rows in looked_up(batch).items()}
