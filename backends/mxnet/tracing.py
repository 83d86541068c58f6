"""Writing down what a model does, to run it by MXNet's graph executor (what Gluon calls hybridising): it runs once on real arrays, and the
same calls are made on symbols beside them, so a model may ask every intermediate result for its shape.

A graph cannot wait for other workers, so each collective ends a segment, and the next one begins. What a later segment
needs of an earlier one is carried over by name. The executor lets reshapes share memory and keeps its arrays from call
to call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backends.mxnet.ops import MXNetOps, factors, mx, to_array

_OPTIONS = [("static_alloc", True), ("static_shape", True)]


class Seed:
    """Stands for the seed of whichever call runs the graph; a model can only hand it on."""

    def __init__(self, first: int):
        self.first = first


class Unrecordable(Exception):
    """A model asks for what a graph does not offer."""


class Node:
    """An array of the recording and its symbol. `home` is the number of its segment, -1 if it is there by its name
    before any of them;
    `first` the same image with its channels before height and width, if known.
    """

    __slots__ = ("symbol", "value", "home", "first", "carried")

    def __init__(self, symbol: Any, value: Any, home: int, first: Node | None = None):
        self.symbol, self.value, self.home, self.first = symbol, value, home, first
        self.carried: Any = symbol if home < 0 else None  # the variable by which other segments know it

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


@dataclass
class Segment:
    """What runs between two collectives: symbols by the names under which others ask for them. Then `crossing`, the
    collective."""

    outputs: dict[str, Any] = field(default_factory=dict)
    crossing: Crossing | None = None


@dataclass(frozen=True)
class Crossing:
    """One collective, and the names of what goes into it and what comes out."""

    kind: str
    dim: str
    length: int
    source: str
    result: str


class Space:
    """A name space of kernels that calls each one twice: on arrays, and on symbols."""

    def __init__(self, arrays: Any, symbols: Any):
        self.arrays, self.symbols = arrays, symbols
        self.ops: RecordingOps

    def __getattr__(self, name: str) -> Callable[..., Any]:
        on_arrays, on_symbols = getattr(self.arrays, name), getattr(self.symbols, name)

        def call(*args: Any, **keywords: Any) -> Any:
            home = len(self.ops.segments) - 1
            symbols = on_symbols(*each(args, self.ops.symbol), **keywords)
            values = on_arrays(*each(args, lambda node: node.value), **keywords)
            return [Node(*both, home) for both in zip(symbols,
                                                      values)] if isinstance(values, list) else Node(symbols, values, home)

        setattr(self, name, call)
        return call


def each(argument: Any, of: Callable[[Node], Any]) -> Any:
    if isinstance(argument, Node):
        return of(argument)
    return tuple(each(a, of) for a in argument) if isinstance(argument, (tuple, list)) else argument


class RecordingOps(MXNetOps):
    """Ops on nodes. What enters the graph is written down in `inputs`: a name and a function of the seed that gives the
    array."""

    def __init__(self, ops: MXNetOps):
        spaces = Space(mx.np, mx.sym.np), Space(mx.npx, mx.sym.npx)
        super().__init__(ops.dtype, *spaces, ops.apart)
        for space in spaces:
            space.ops = self
        self.axes = ops.axes
        self.inputs: dict[str, Callable[[int], Any]] = {}
        self.constants: dict[tuple[Any, ...], Node] = {}
        self.segments = [Segment()]
        self.num_carried = 0

    def admit(self, name: str, value: Any, again: Callable[[int], Any]) -> Node:
        self.inputs[name] = again
        return Node(variable(name), value, -1)

    def symbol(self, node: Node) -> Any:
        """The node as the present segment knows it."""
        return node.symbol if node.home == len(self.segments) - 1 else self.by_name(node)

    def by_name(self, node: Node) -> Any:
        """The variable that stands for a node outside its segment."""
        if node.carried is None:
            node.carried = variable(f"carried{self.num_carried}")
            self.num_carried += 1
            self.segments[node.home].outputs[node.carried.name] = node.symbol
        return node.carried

    def across(self, kind: str, x: Node, dim: str, length: int) -> Node:
        """Ends the segment. Nobody is waited for: others may have recorded this long ago. What came would have this
        shape."""
        crossing = Crossing(kind, dim, length, self.by_name(x).name, f"crossed{len(self.segments)}")
        self.segments[-1].crossing = crossing
        self.segments.append(Segment())
        value = mx.np.zeros((*x.shape[:-1], length), dtype=x.value.dtype) if kind == "collect" else x.value
        return Node(variable(crossing.result), value, -1)

    def constant(self, values: Any) -> Node:
        array = to_array(values, self.dtype)
        raw = array.asnumpy()
        key = (raw.shape, raw.dtype.str, raw.tobytes())
        if key not in self.constants:
            # another handle each time: a backward pass forgets what MXNet knew of a handle, though other passes may
            # still need it
            self.constants[key] = self.admit(f"constant{len(self.inputs)}", array, lambda seed: array.detach())
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
        symbols = getattr(mx.sym, name)(self.symbol(x).as_nd_ndarray(), **keywords)
        values = super().classic(name, x.value, **keywords)
        return [Node(symbols[i].as_np_ndarray(), value, len(self.segments) - 1) for i, value in enumerate(values)]

    # Between two kernels for images there is no need to turn the channels back and forth.

    def channels_first(self, x: Node) -> Node:
        return x.first or super().channels_first(x)

    def channels_last(self, x: Node) -> Node:
        out = super().channels_last(x)
        out.first = x
        return out

    def relu(self, x: Node) -> Node:
        return super().relu(x) if x.first is None else self.channels_last(super().relu(x.first))

    def add(self, x: Any, y: Any) -> Node:
        firsts = [getattr(argument, "first", None) for argument in (x, y)]
        if None in firsts or x.shape != y.shape:
            return super().add(x, y)
        return self.channels_last(super().add(*firsts))


def variable(name: str) -> Any:
    return mx.sym.var(name).as_np_ndarray()


class Graph:
    """`function(ops, params, state, batch, seed)`, which gives results by name, for one set of shapes; recorded with
    ops like these."""

    def __init__(self, function: Callable[..., Mapping[str, Any]], like: MXNetOps, params: Mapping[str, Any],
                 state: Mapping[str, Any],
                 batch: Mapping[str, Any], seed: int):
        self._like = like
        ops = RecordingOps(like)
        entered = [{name: ops.admit(f"{kind}/{name}", value, _none) for name, value in arrays.items()}
                   for kind, arrays in (("params", params), ("state", state), ("batch", batch))]
        found = function(ops, *entered, Seed(seed))
        self._plain = {name: value for name, value in found.items() if not isinstance(value, Node)}
        self._results = {name: ops.by_name(value).name for name, value in found.items() if isinstance(value, Node)}
        self._again = ops.inputs
        self._parts = [(_compiled(segment), segment.crossing) for segment in ops.segments]

    def __call__(self, params: Mapping[str, Any], state: Mapping[str, Any], batch: Mapping[str, Any],
                 seed: int) -> dict[str, Any]:
        """The results by name. The next call overwrites them, unless they still wait for their gradient."""
        known = {f"{kind}/{name}": value for kind, arrays in (("params", params), ("state", state), ("batch", batch))
                 for name, value in arrays.items()}
        for part, crossing in self._parts:
            if part is not None:
                run, inputs, outputs = part
                found = run(*(known[name] if name in known else self._again[name](seed) for name in inputs))
                for name, value in zip(outputs, found if isinstance(found, list) else [found]):
                    known[name] = value if value.dtype.kind == "f" else value.detach()  # an integer has no gradient
            if crossing is not None:
                known[crossing.result] = self._like.across(crossing.kind, known[crossing.source], crossing.dim,
                                                           crossing.length)
        return {**self._plain, **{name: known[source] for name, source in self._results.items()}}


def _compiled(segment: Segment) -> tuple[Any, list[str], list[str]] | None:
    """The graph with the names of its inputs and outputs; None where it has nothing to give."""
    if not segment.outputs:
        return None
    whole = mx.sym.Group(list(segment.outputs.values()), create_fn=mx.sym.np._Symbol)
    return mx.nd.CachedOp(whole, _OPTIONS), whole.list_inputs(), list(segment.outputs)


def _none(seed: int) -> Any:
    raise AssertionError("parameters, state and batch are handed over by name")


def key_of(what: Any, ops: MXNetOps, state: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    """What a graph is good for. Of the axes it knows the worker's place, not the group: the next generation runs the
    same graph."""
    return (what, *((dim, axis.size, axis.rank) for dim, axis in ops.axes.items()),
            *((name, tuple(array.shape), str(array.dtype)) for name, array in (*state.items(), *batch.items())))
