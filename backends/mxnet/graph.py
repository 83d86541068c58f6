"""A model's loss, or its metrics, as graphs of MXNet's, recorded once and run by its graph executor (what Gluon calls hybridising).

The executor lets reshapes share memory and keeps its arrays from call to call. Where nothing is split there is one graph; else one
between any two collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from backends.mxnet.ops import MXNetOps, mx
from backends.mxnet.recording import Node, RecordingOps, Seed, Segment

_OPTIONS = [("static_alloc", True), ("static_shape", True)]


class Graph:
    """`function(ops, params, state, batch, seed)`, which gives results by name, for one set of shapes; recorded with ops like these."""

    def __init__(self, function: Callable[..., Mapping[str, Any]], like: MXNetOps, params: Mapping[str, Any], state: Mapping[str, Any],
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

    def __call__(self, params: Mapping[str, Any], state: Mapping[str, Any], batch: Mapping[str, Any], seed: int) -> dict[str, Any]:
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
                known[crossing.result] = self._like.across(crossing.kind, known[crossing.source], crossing.dim, crossing.length)
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
    """What a graph is good for. Of the axes it knows the worker's place, not the group: the next generation runs the same graph."""
    return (what, *((dim, axis.size, axis.rank) for dim, axis in ops.axes.items()),
            *((name, tuple(array.shape), str(array.dtype)) for name, array in (*state.items(), *batch.items())))
