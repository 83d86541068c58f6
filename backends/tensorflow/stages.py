"""A model on a mesh: its pieces forward and backward, and whatever has collectives inside, as programs that are cut at these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.common import HostBackend, looked_up, neutral, tallied
from backends.tensorflow.arrays import columns, shaped
from backends.tensorflow.ops import U64, TensorFlowOps, tf
from backends.tensorflow.tracing import Environment, Program, Recording, signature
from elastic.model.backend import ROWS, Batch, Buffer, ShardResult


@dataclass(frozen=True)
class Kept:
    """What a forward pass leaves for its backward pass; `names` are the parameters that it read."""

    program: Program
    environment: Environment
    names: tuple[str, ...]
    num_inputs: int | None


class Stages(HostBackend):
    """The half of the backend that `elastic.model.backend.Chain` is for; `TensorFlowBackend` is the other."""

    def __init__(self, model: Any, settings: Any):
        super().__init__(model, settings)
        self._ops, self._jit = TensorFlowOps(self._dtype), bool(settings.compile)
        self._params: dict[str, Any] = {}
        self._programs: dict[Any, list[Program]] = {}
        self._degrees: tuple[tuple[str, int], ...] = ()  # of the dims that are split

    def connect(self, axes: Mapping[str, Any]) -> None:
        self.forget()
        self._ops.axes = dict(axes)
        self._degrees = tuple(sorted((dim, axis.size) for dim, axis in axes.items() if axis.size > 1))

    def forward(self, key: Any, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch,
                seed: int
                ) -> Buffer | ShardResult:
        names = self._read_by(pieces)
        arguments = ({name: self._params[name] for name in names}, shaped(inputs, shape), self._columns(batch),
                     tf.constant(np.uint64(seed & U64)))
        recording = Recording()
        program = self._program(("forward", tuple(pieces)), self._passes(pieces, names, recording), arguments,
                                recording)
        environment = program.begin(arguments, self._ops.part)
        result = program.run(environment, 0)
        self._kept[key] = Kept(program, environment, names, None if inputs is None else int(np.prod(shape)))
        if self._ends(pieces):
            return ShardResult(float(result[0]), float(result[1]), {})
        return result.numpy().reshape(-1)

    def backward_input(self, key: Any, gradient: Buffer | None) -> Buffer | None:
        kept = self._kept[key]
        if gradient is not None:
            kept.program.feed_gradient(kept.environment, gradient)
        slope = kept.program.run(kept.environment, 1)
        if kept.num_inputs is None:
            return None
        return np.zeros(kept.num_inputs, self._ops.dtype) if slope is None else slope.numpy().reshape(-1)

    def backward_weight(self, key: Any, into: Mapping[str, Buffer]) -> None:
        kept = self._kept.pop(key)
        wanted = frozenset(i for i, name in enumerate(kept.names) if name in into)
        for name, slope in zip(kept.names, kept.program.run(kept.environment, 2, wanted), strict=True):
            if slope is not None:
                view = into[name]
                view += np.asarray(slope)

    def infer(self, pieces: Sequence[str], inputs: Buffer | None, shape: Sequence[int], batch: Batch) -> Any:
        names = self._read_by(pieces)

        def function(params: Mapping[str, Any], x: Any, batch: Any) -> Any:
            x = self._through(self._ops, params, pieces, x, batch, None)
            return dict(self._model.measure(self._ops, x, batch)) if self._ends(pieces) else x

        arguments = {name: self._params[name] for name in names}, shaped(inputs, shape), self._columns(batch)
        found = self._call(("infer", tuple(pieces)), function, arguments)
        if self._ends(pieces):
            return tallied(found)
        return found.numpy().reshape(-1)

    def _passes(self, pieces: Sequence[str], names: Sequence[str], recording: Recording) -> Callable[..., Any]:
        """Of pieces: what they make; the gradient of their inputs; those of their parameters."""
        def function(params: Mapping[str, Any], inputs: Any, batch: Any, seed: Any) -> tuple[Any, Any, Any]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([params[name] for name in names])
                if inputs is not None:
                    tape.watch(inputs)
                x = self._through(self._ops, params, pieces, inputs, batch, seed)
                result = self._model.score(self._ops, x, batch, seed) if self._ends(pieces) else x
            recording.turn()
            loss = result[0] if self._ends(pieces) else result
            gradient = None if self._ends(pieces) else recording.gradient_of(result)
            slope, slopes = tape.gradient(loss, [[] if inputs is None else [inputs], [params[name] for name in names]],
                                          gradient)
            if self._ends(pieces):
                result = tf.cast(result[0], tf.float64), tf.cast(result[1], tf.float64)
            return result, slope[0] if slope else None, slopes

        return function

    def _columns(self, batch: Any) -> Any:
        if self._own:
            return columns(batch)
        rows = {feature: tf.constant(rows.astype(self._dtype, copy=False)) for feature, rows in looked_up(batch).items()}
        found: dict[str, Any] = {name: tf.constant(column) for name, column in neutral(batch, self._dtype).items()}
        return {**found, ROWS: rows} if rows else found

    def _call(self, key: tuple[Any, ...], function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """A function of a single phase."""
        recording = Recording()
        program = self._program(key, lambda *arguments: (function(*arguments),), arguments, recording)
        return program.run(program.begin(arguments, self._ops.part), 0)

    def _program(self, key: tuple[Any, ...], function: Callable[..., Any], arguments: Sequence[Any],
                 recording: Recording) -> Program:
        """Traced for these degrees and shapes, and again only where a model that asks for its own place has got another
        one."""
        programs = self._programs.setdefault((*key, self._degrees, signature(arguments)), [])
        for program in programs:
            if program.suits(self._ops.part):
                return program
        self._ops.recording = recording
        try:
            programs.append(Program(function, arguments, recording, self._jit))
        finally:
            self._ops.recording = None
        self._compilations += 1
        return programs[-1]
