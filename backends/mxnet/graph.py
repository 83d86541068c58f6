"""A model's loss, or its metrics, as one graph of MXNet's, recorded once and run by its graph executor (what Gluon calls hybridising).

The executor lets reshapes share memory and keeps its arrays from call to call. Recording runs the model once on real arrays and writes
down the same calls on symbols beside them, so a model may ask every intermediate result for its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from backends.mxnet.ops import MXNetOps, factors, mx, to_array

_OPTIONS = [("static_alloc", True), ("static_shape", True)]


class Seed:
    """Stands for the seed of whichever call runs the graph; a model can only hand it on."""

    def __init__(self, first: int):
        self.first = first


class Node:
    """An array of the recording and its symbol. `first` is the same image with its channels before height and width, if known."""

    __slots__ = ("symbol", "value", "first")

    def __init__(self, symbol: Any, value: Any, first: Node | None = None):
        self.symbol, self.value, self.first = symbol, value, first

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


class Space:
    """A name space of kernels that calls each one twice: on arrays, and on symbols."""

    def __init__(self, arrays: Any, symbols: Any):
        self.arrays, self.symbols = arrays, symbols

    def __getattr__(self, name: str) -> Callable[..., Any]:
        on_arrays, on_symbols = getattr(self.arrays, name), getattr(self.symbols, name)

        def call(*args: Any, **keywords: Any) -> Any:
            symbols = on_symbols(*(side(a, "symbol") for a in args), **keywords)
            values = on_arrays(*(side(a, "value") for a in args), **keywords)
            return [Node(*both) for both in zip(symbols, values)] if isinstance(values, list) else Node(symbols, values)

        setattr(self, name, call)
        return call


def side(argument: Any, which: str) -> Any:
    if isinstance(argument, Node):
        return getattr(argument, which)
    return tuple(side(a, which) for a in argument) if isinstance(argument, tuple) else argument


class Unrecordable(Exception):
    """A model asks for what a graph does not offer."""


class RecordingOps(MXNetOps):
    """Ops on nodes. What enters the graph is written down in `inputs`: a name and a function of the seed that gives the array."""

    def __init__(self, ops: MXNetOps):
        super().__init__(ops.dtype, Space(mx.np, mx.sym.np), Space(mx.npx, mx.sym.npx), ops.apart)
        self.inputs: dict[str, Callable[[int], Any]] = {}
        self.constants: dict[tuple[Any, ...], Node] = {}

    def admit(self, name: str, value: Any, again: Callable[[int], Any]) -> Node:
        self.inputs[name] = again
        return Node(mx.sym.var(name).as_np_ndarray(), value)

    def constant(self, values: Any) -> Node:
        array = to_array(values, self.dtype)
        raw = array.asnumpy()
        key = (raw.shape, raw.dtype.str, raw.tobytes())
        if key not in self.constants:
            self.constants[key] = self.admit(f"constant{len(self.inputs)}", array, lambda seed: array)
        return self.constants[key]

    def recompute(self, function: Callable[..., Any], *arrays: Node) -> Node:
        raise Unrecordable("a graph keeps every result for its gradient")

    def dropout_factors(self, shape: tuple[int, ...], rate: float, seed: Any, tag: str) -> Node:
        def again(seed: int) -> Any:
            return to_array(factors(shape, rate, seed, tag, self.dtype), self.dtype)

        if not isinstance(seed, Seed):
            raise TypeError(f"dropout {tag!r} must get the seed that the model was called with, not {seed!r}")
        return self.admit(f"dropout{len(self.inputs)}", again(seed.first), again)

    def classic(self, name: str, x: Node, **keywords: Any) -> list[Any]:
        symbols = getattr(mx.sym, name)(x.symbol.as_nd_ndarray(), **keywords)
        values = super().classic(name, x.value, **keywords)
        return [Node(symbols[i].as_np_ndarray(), value) for i, value in enumerate(values)]

    # Between two kernels for images there is no need to turn the channels back and forth.

    def channels_first(self, x: Node) -> Node:
        return x.first or super().channels_first(x)

    def channels_last(self, x: Node) -> Node:
        out = super().channels_last(x)
        return Node(out.symbol, out.value, x)

    def relu(self, x: Node) -> Node:
        return super().relu(x) if x.first is None else self.channels_last(super().relu(x.first))

    def add(self, x: Any, y: Any) -> Node:
        firsts = [getattr(argument, "first", None) for argument in (x, y)]
        if None in firsts or x.shape != y.shape:
            return super().add(x, y)
        return self.channels_last(super().add(*firsts))


class Graph:
    """`function(ops, params, state, batch, seed)`, which gives results by name, for one set of shapes; recorded with ops like these."""

    def __init__(self, function: Callable[..., Mapping[str, Any]], like: MXNetOps, params: Mapping[str, Any], state: Mapping[str, Any],
                 batch: Mapping[str, Any], seed: int):
        ops = RecordingOps(like)
        entered = [{name: ops.admit(f"{kind}/{name}", value, _none) for name, value in arrays.items()}
                   for kind, arrays in (("params", params), ("state", state), ("batch", batch))]
        found = function(ops, *entered, Seed(seed))
        self._plain = {name: value for name, value in found.items() if not isinstance(value, Node)}
        nodes = {name: value for name, value in found.items() if isinstance(value, Node)}
        self._outputs = list(nodes)
        # an output may be an input as it is, which the executor does not take
        symbols = [mx.sym.np.copy(node.symbol) if node.symbol.name in ops.inputs else node.symbol for node in nodes.values()]
        whole = mx.sym.Group(symbols, create_fn=mx.sym.np._Symbol)
        self._inputs = [(name, ops.inputs[name]) for name in whole.list_inputs()]
        self._run = mx.nd.CachedOp(whole, _OPTIONS)

    def __call__(self, params: Mapping[str, Any], state: Mapping[str, Any], batch: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """The results by name. The next call overwrites them."""
        given = {f"{kind}/{name}": value for kind, arrays in (("params", params), ("state", state), ("batch", batch))
                 for name, value in arrays.items()}
        outputs = self._run(*(given[name] if name in given else again(seed) for name, again in self._inputs))
        return {**self._plain, **dict(zip(self._outputs, outputs if isinstance(outputs, list) else [outputs]))}


def _none(seed: int) -> Any:
    raise AssertionError("parameters, state and batch are handed over by name")


def key_of(what: Any, state: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    """What a graph is good for."""
    return (what, *((name, tuple(array.shape), str(array.dtype)) for name, array in (*state.items(), *batch.items())))
