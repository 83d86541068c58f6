"""`elastic.model.backend.Backend` on TensorFlow: a shard's loss and its gradients are one traced function of the parameters.

Parameters are tensors over the platform's flat buffers, without a copy (DLPack): what the platform writes there, the
next call reads. They are handed to the traced function as arguments, so it holds no copy and never traces twice for
them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np

from backends.common import Door, drawing, looked_up, named_rows, rehearse, tallied
from backends.tensorflow import optimizer
from backends.tensorflow.arrays import lies_in, tensor_over
from backends.tensorflow.ops import U64, tf
from backends.tensorflow.stages import Stages
from elastic.errors import UserError
from elastic.model.backend import ROWS, Batch, Buffer, Habits, Model, ShardResult, UpdateRule
from elastic.model.user_code import UNTRAINED

_start = threading.Lock()

# Starting values and a data set's draws come from process-wide generators: what one thread seeds and draws must not
# interleave with another's.
_generators = threading.RLock()


class TensorFlow(Door):
    name, trains = "tensorflow", "Keras model"

    def before_models(self, settings: Any) -> None:
        """TensorFlow starts with the first variable. What cannot be had any more, `create` tells: a process that only
        looks at a model need not compute like a worker.
        """
        with suppress(UserError):
            start(int(settings.threads))

    def create(self, model: Model | Any, settings: Any) -> TensorFlowBackend:
        """`settings` has device ("cpu", "auto"), precision ("float32", "float64"), threads and compile. UserError."""
        return TensorFlowBackend(self.adapt(model), settings)

    def own(self, model: Any) -> Any:
        from backends.tensorflow.adapter import KerasModel, keras

        return KerasModel(model) if isinstance(model, keras.Model) else super().own(model)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Keras draws starting values from the generators of Python and NumPy."""
        with _generators, drawing(seed):
            yield


framework = TensorFlow()


def start(threads: int) -> None:
    """Sets what TensorFlow fixes for a process at its first kernel. UserError where it has run already, with other
    threads."""
    with _start:
        config = tf.config.threading
        if config.get_intra_op_parallelism_threads() != threads:
            try:
                config.set_intra_op_parallelism_threads(threads)
                config.set_inter_op_parallelism_threads(1)  # a training step is a chain: its kernels share the threads
                tf.config.set_visible_devices([], "GPU")
            except RuntimeError as error:
                raise UserError(f"backend.threads = {threads} cannot be had: TensorFlow has already computed in this "
                                "process, with other threads; let nothing use it before the run begins.") from error
        tf.config.experimental.enable_op_determinism()


class TensorFlowBackend(Stages):
    """One model on the CPU. Calls may come from any thread, one at a time; processes may hold several backends."""

    name = "tensorflow"

    def __init__(self, model: Any, settings: Any):
        super().__init__(model, settings)
        start(int(settings.threads))
        self._steps: dict[tuple[tuple[str, ...], tuple[str, ...]], Callable[..., Any]] = {}
        self._metrics = self._traced(self._measured)
        self._constrained: dict[str, np.ndarray] = {}

    def bind(self, params: Mapping[str, Buffer], buffers: Mapping[str, Any]) -> None:
        self._params = {name: tensor_over(params[name]) for name in self.parameters}
        self._state = {name: buffers[name] for name in self.buffers}
        self._constrained = {name: params[name] for name in self._own.constraints} if self._own else {}

    def gradients(self, batch: Batch, seed: int, into: Mapping[str, Buffer]) -> ShardResult:
        result, slopes = self._computed(tuple(into), batch, seed)
        for name, slope in slopes.items():
            view = into[name]
            view += slope
        return result

    def rehearse(self, batch: Batch, room: Callable[[], Mapping[str, Buffer]]) -> Habits:
        if self._own is None:
            return super().rehearse(batch, room)
        own, names, columns = self._own, tuple(room()), self._columns(batch)
        own.open(self._params, self._device_state(), columns)

        def run(hidden: Sequence[str], factor: float) -> tuple[ShardResult, dict[str, np.ndarray]]:
            with own.hidden(hidden):
                return self._computed(names, batch, 0, factor)

        once = rehearse(own, (*self.parameters, *self.buffers), run)
        own.rehearse(self._params, self._device_state(), columns)
        own.check_gradients(self._params, self._device_state(), columns,
                            {name: once.get(name, np.zeros(())) for name in names})
        return Habits(moved=own.moved, sums=own.sums, undivided=own.undivided)

    def _computed(self, names: tuple[str, ...], batch: Batch, seed: int,
                  factor: float = 1.0) -> tuple[ShardResult, dict[str, np.ndarray]]:
        """One shard, with `factor` times the gradients of its loss sum."""
        columns, state, rows = self._columns(batch), self._device_state(), looked_up(batch)
        arguments: tuple[Any, ...] = self._params, state, columns, tf.constant(np.uint64(seed & U64))
        sought = names, tuple(rows)
        if self._degrees:
            loss, weight, new, slopes = self._call(("gradients", *sought), self._step_of(*sought), arguments)
        else:
            if sought not in self._steps:
                self._steps[sought] = self._traced(self._step_of(*sought))
            if self._own:
                self._own.open(self._params, state, columns)
                arguments = *arguments, tf.constant(factor)
            with self._telling():
                loss, weight, new, slopes = self._steps[sought](*arguments)
        cut = len(names)
        found = {name: np.asarray(slope) for name, slope in zip(names, slopes[:cut], strict=True) if slope is not None}
        back = {feature: np.zeros(rows[feature].shape, self._dtype) if slope is None else np.array(slope)
                for feature, slope in zip(rows, slopes[cut:], strict=True)}
        return ShardResult(float(loss), float(weight), {name: value.numpy() for name, value in new.items()}, back), found

    def metrics(self, batch: Batch) -> Mapping[str, tuple[Any, float]]:
        columns, state = self._columns(batch), self._device_state()
        if self._own:
            self._own.open(self._params, state, columns)
        with self._telling():
            found = (self._call(("metrics",), self._measured, (self._params, state, columns)) if self._degrees
                     else self._metrics(self._params, state, columns))
        return tallied(found)

    def _telling(self) -> AbstractContextManager[Any]:
        """Around a user's own kernels: what fails in them is the user's error."""
        return self._own.telling() if self._own else nullcontext()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Not traced: a text that grows has another shape with every token."""
        return self._model.logits(self._ops, self._params, tf.constant(np.asarray(tokens, np.int64))).numpy()

    def update(self, rule: UpdateRule, param: Buffer, grad: Buffer, slots: Mapping[str, Buffer], block: int) -> None:
        optimizer.apply(rule, param, grad, slots)
        for name, view in self._constrained.items():
            if lies_in(view, param):
                view[...] = self._own.constraints[name](tf.constant(view)).numpy()

    def _traced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self._compilations += 1  # Python runs while tracing, never after
            return function(*arguments)

        return tf.function(counted, jit_compile=self._jit, autograph=False)

    def _measured(self, params: Mapping[str, Any], state: Mapping[str, Any],
                  batch: Any) -> Mapping[str, tuple[Any, Any]]:
        return self._model.metrics(self._ops, *self._told_apart(params, state, batch))

    def _told_apart(self, params: Mapping[str, Any], state: Mapping[str, Any], batch: Any) -> tuple[Any, Any, Any]:
        """A model of named arrays reads rows as it reads parameters; a user's own finds them in its batch."""
        if self._own or ROWS not in batch:
            return params, state, batch
        return ({**params, **named_rows(batch[ROWS])}, state,
                {name: column for name, column in batch.items() if name != ROWS})

    def _step_of(self, names: Sequence[str], features: Sequence[str]) -> Callable[..., Any]:
        def step(params: Mapping[str, Any], state: Mapping[str, Any], batch: Any, seed: Any,
                 factor: Any = None) -> tuple[Any, Any, Any, list[Any]]:
            sources = [*(params[name] for name in names), *(batch[ROWS][feature] for feature in features)]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                loss, weight, new = self._model.loss(self._ops, *self._told_apart(params, state, batch), seed)
            if self._own:
                self._own.check_moved(names)
            slopes = tape.gradient(loss, sources,
                                   output_gradients=None if factor is None else tf.cast(factor, loss.dtype))
            # a batch without rows
            if all(slope is None for slope in slopes) and not (isinstance(weight, float) and weight == 0.0):
                raise UserError(UNTRAINED)
            return (tf.cast(loss, tf.float64), tf.cast(weight, tf.float64), dict(new),
                    [None if slope is None else tf.convert_to_tensor(slope) for slope in slopes])

        return step

    def _device_state(self) -> dict[str, Any]:
        return {name: tf.constant(value) for name, value in self._state.items()}
