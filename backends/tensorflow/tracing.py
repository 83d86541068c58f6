"""Functions that are traced as a whole and cut where workers meet.

A kernel that blocks for its peers inside a graph holds one of the process's few threads for kernels, and two that do
not depend on each other may start in another order elsewhere. So a graph is cut at every collective: TensorFlow runs
the parts, and the calling thread itself meets its peers between them, in the order in which the function named the
collectives, which is the same for all. The same cuts part a forward pass from its backward pass, and what a backward
pass must do for the inputs from the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf

Host = Callable[[np.ndarray], np.ndarray]
Environment = dict[str, Any]  # tensors by their names in the graph


@dataclass(frozen=True)
class Cut:
    """`host` makes one tensor of another, outside of the graph."""

    given: Any
    made: Any
    host: Host


@dataclass
class Recording:
    """What is noted while a function is traced."""

    graph: Any = None
    cuts: list[Cut] = field(default_factory=list)
    places: dict[str, Any] = field(default_factory=dict)  # dim -> this worker's place, told at each call
    # dim -> a place that the function itself has read, and the trace relies on
    parts: dict[str, int] = field(default_factory=dict)
    num_forward: int | None = None  # operations that belong to the first phase
    gradient: Any = None  # that of the first phase's result, told later

    def cut(self, x: Any, shape: Sequence[int], host: Host) -> Any:
        self._check()
        made = tf.compat.v1.placeholder(x.dtype, shape)
        self.cuts.append(Cut(x, made, host))
        return made

    def place(self, dim: str) -> Any:
        self._check()
        if dim not in self.places:
            self.places[dim] = tf.compat.v1.placeholder(tf.int64, ())
        return self.places[dim]

    def gradient_of(self, result: Any) -> Any:
        self.gradient = tf.compat.v1.placeholder(result.dtype, result.shape)
        return self.gradient

    def turn(self) -> None:
        """What comes now belongs to later phases."""
        self.num_forward = len(self.graph.get_operations())

    def _check(self) -> None:
        if tf.compat.v1.get_default_graph() is not self.graph:
            raise NotImplementedError("a collective inside a branch or a loop of a graph")


@dataclass(frozen=True)
class Step:
    """One graph and the collective behind it, if there is one. `done` names what no later step reads."""

    run: Callable[..., Any] | None
    inputs: Sequence[str]
    outputs: Sequence[str]
    cut: Cut | None
    done: Sequence[str]


class Program:
    """A function of tensors in phases: it returns one nest of outputs for each, tensors, numbers or None.

    Before `recording.turn()` it computes the first phase; what comes behind it goes to the first later phase that needs
    it.
    """

    def __init__(self, function: Callable[..., Sequence[Any]], arguments: Sequence[Any], recording: Recording,
                 jit: bool = False):
        self._recording, self._jit = recording, jit
        found: dict[str, Any] = {}

        def traced(*arguments: Any) -> Any:
            recording.graph = tf.compat.v1.get_default_graph()
            found["inputs"] = [tensor.name for tensor in tf.nest.flatten(arguments) if tensor is not None]
            results = function(*arguments)
            found["outputs"] = [tf.nest.map_structure(lambda x: x if x is None else tf.convert_to_tensor(x), phase)
                                for phase in results]
            return ()

        concrete = tf.function(traced, autograph=False).get_concrete_function(*tf.nest.map_structure(spec_of, list(arguments)))
        self._inputs: list[str] = found["inputs"]
        self._captured = {inner.name: outer for outer, inner in concrete.graph.captures}
        self._outputs = found["outputs"]
        self._constant_outputs = {out.op.name for out in tf.nest.flatten(self._outputs) if out is not None
                                  and out.op.type == "Const"}
        self._library = recording.graph.as_graph_def().library
        self._keep = concrete  # owns the graph
        self._cuts = {cut.made.op.name: cut for cut in recording.cuts}
        self._operations = recording.graph.get_operations()
        self._phases: dict[tuple[int, frozenset[int] | None], list[Step]] = {}

    def suits(self, parts: Callable[[str], int]) -> bool:
        """Whether the places that the trace relies on are still this worker's."""
        return all(parts(dim) == part for dim, part in self._recording.parts.items())

    def begin(self, arguments: Sequence[Any], parts: Callable[[str], int]) -> Environment:
        environment = dict(zip(self._inputs, (tensor for tensor in tf.nest.flatten(list(arguments))
                                              if tensor is not None), strict=True))
        environment.update(self._captured)
        for dim, place in self._recording.places.items():
            environment[place.name] = tf.constant(parts(dim), tf.int64)
        return environment

    def feed_gradient(self, environment: Environment, gradient: Any) -> None:
        """What the phases behind the first one need to begin with."""
        room = self._recording.gradient
        environment[room.name] = tf.constant(np.asarray(gradient).reshape(tuple(room.shape)))

    def run(self, environment: Environment, phase: int, wanted: frozenset[int] | None = None) -> Any:
        """The outputs of a phase, or of the last one those `wanted`, by number; the others are None then."""
        if (phase, wanted) not in self._phases:
            self._phases[phase, wanted] = self._build(phase, wanted)
        for step in self._phases[phase, wanted]:
            if step.run is not None:
                environment.update(zip(step.outputs, step.run(*[environment[name] for name in step.inputs]),
                                       strict=True))
            if step.cut is not None:
                environment[step.cut.made.name] = tf.constant(step.cut.host(np.asarray(environment[step.cut.given.name])))
            for name in step.done:
                environment.pop(name, None)
        flat = tf.nest.flatten(self._outputs[phase])
        return tf.nest.pack_sequence_as(self._outputs[phase], [
            None if out is None or (wanted is not None and i not in wanted) else environment[out.name]
            for i, out in enumerate(flat)])

    @cached_property
    def _phase_of(self) -> dict[str, int]:
        """The phase of every operation that anything needs."""
        needed: dict[str, int] = {}
        for phase, outputs in enumerate(self._outputs):
            for name in self._behind(outputs):
                needed.setdefault(name, phase)
        num_forward = self._recording.num_forward
        first = {op.name for op in self._operations[:num_forward]} if num_forward is not None else set()
        return {name: 0 if name in first else phase for name, phase in needed.items()}

    def _behind(self, outputs: Any) -> set[str]:
        """All operations on which outputs depend, by way of the collectives too."""
        found: set[str] = set()
        open_ = [out.op for out in tf.nest.flatten(outputs) if out is not None]
        while open_:
            op = open_.pop()
            if op.name not in found:
                found.add(op.name)
                open_ += [x.op for x in op.inputs] + ([self._cuts[op.name].given.op] if op.name in self._cuts else [])
        return found

    def _build(self, phase: int, wanted: frozenset[int] | None) -> list[Step]:
        """The steps of a phase: its operations in their order, cut at its collectives."""
        outputs = tf.nest.flatten(self._outputs[phase])
        if wanted is not None:
            outputs = [out for i, out in enumerate(outputs) if i in wanted]
        alive = self._behind(outputs) if wanted is not None else None
        chosen = [op for op in self._operations if self._phase_of.get(op.name) == phase
                  and (alive is None or op.name in alive)]
        parts: list[list[Any]] = [[]]
        cuts: list[Cut] = []
        for op in chosen:
            if op.name in self._cuts:
                cuts.append(self._cuts[op.name])
                parts.append([])
            elif op.type not in ("Placeholder", "Const") or (op.type == "Const" and op.name in self._constant_outputs):
                parts[-1].append(op)
        uses = [self._read_by(part) | ({cuts[i].given.name} if i < len(cuts) else set())
                for i, part in enumerate(parts)]
        later = {out.name for out in outputs if out is not None} | self._read_by(
            op for op in self._operations if self._phase_of.get(op.name, -1) > phase)
        later |= {cut.given.name for cut in self._cuts.values() if self._phase_of.get(cut.made.op.name, -1) > phase}
        later |= {out.name for outs in self._outputs[phase + 1:] for out in tf.nest.flatten(outs) if out is not None}
        steps: list[Step] = []
        for i in reversed(range(len(parts))):
            cut = cuts[i] if i < len(cuts) else None
            own = later | ({cut.given.name} if cut else set())
            done = sorted((uses[i] | ({cut.made.name} if cut else set())) - later)
            steps.append(self._step(parts[i], own, cut, done))
            later |= uses[i]
        return steps[::-1]

    def _read_by(self, operations: Iterable[Any]) -> set[str]:
        return {x.name for op in operations for x in op.inputs if x.op.type != "Const"}

    def _step(self, part: Sequence[Any], later: set[str], cut: Cut | None, done: Sequence[str]) -> Step:
        own = {op.name for op in part}
        inputs = sorted(name for name in self._read_by(part) if name.split(":")[0] not in own)
        outputs = [out.name for op in part for out in op.outputs if out.name in later]
        if cut is not None and cut.given.op.type == "Const" and cut.given.name not in outputs:
            part, outputs = [*part, cut.given.op], [*outputs, cut.given.name]
        if not outputs:
            return Step(None, (), (), cut, done)
        return Step(self._function(part, inputs, outputs), inputs, outputs, cut, done)

    def _function(self, part: Sequence[Any], inputs: Sequence[str], outputs: Sequence[str]) -> Callable[..., Any]:
        """A function of its own of some of the operations; constants that they read are copied."""
        graph = self._recording.graph
        own = {op.name: op for op in part}
        own.update({x.op.name: x.op for op in part for x in op.inputs if x.op.type == "Const"})
        definition = tf.compat.v1.GraphDef(versions=graph.graph_def_versions)
        definition.library.CopyFrom(self._library)
        for op in own.values():
            node = definition.node.add()
            node.CopyFrom(op.node_def)
            kept = [name for name in node.input if not name.startswith("^") or name[1:] in own]
            del node.input[:]
            node.input.extend(kept)
            node.attr.pop("_class", None)  # beside which operations it would lie: some are in other parts

        def function(*tensors: Any) -> Any:
            return tf.graph_util.import_graph_def(definition, input_map=dict(zip(inputs, tensors)),
                                                  return_elements=list(outputs))

        specs = [spec_of(graph.get_tensor_by_name(name)) for name in inputs]
        return tf.function(function, autograph=False,
                           jit_compile=self._jit).get_concrete_function(*specs).inference_fn.call_flat


def spec_of(x: Any) -> Any:
    return None if x is None else tf.TensorSpec(x.shape, x.dtype)


def signature(arguments: Mapping[str, Any] | Sequence[Any]) -> tuple[Any, ...]:
    """What distinguishes arguments of another kind."""
    return tuple((tuple(x.shape), x.dtype) for x in tf.nest.flatten(arguments) if x is not None)
