"""`elastic.model.backend.Backend` on TensorFlow: a shard's loss and its gradients are one traced function of the parameters.

Parameters are tensors over the platform's flat buffers, without a copy (DLPack): what the platform writes there, the next
call reads. They are handed to the traced function as arguments, so it holds no copy and never traces twice for them.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np

from backends.common import check_linear, check_read, check_repeats
from backends.tensorflow import optimizer
from backends.tensorflow.ops import U64, TensorFlowOps, tf
from backends.tensorflow.pieces import Pieces, plain
from elastic.data.collate import stacked
from elastic.errors import UserError
from elastic.model.backend import Batch, Buffer, Habits, Model, ShardResult, Spec, Tally, UpdateRule, tally_of
from elastic.model.user_code import UNTRAINED

ALIGN_BYTES = 64  # TensorFlow ends the process on DLPack memory that is aligned to less

GENERATORS = ("let layers draw by a keras.random.SeedGenerator that is an attribute of theirs (one made elsewhere, and tf.random, go on from call "
              "to call), and count nothing in the loss")

READ = "keep the variable itself, and ask for its value in each call"

_start = threading.Lock()

# Starting values and a data set's draws come from process-wide generators: what one thread seeds and draws must not interleave
# with another's.
drawing = threading.RLock()


def create(model: Model | Any, settings: Any) -> TensorFlowBackend:
    """`settings` has device ("cpu", "auto"), precision ("float32", "float64"), threads and compile. UserError."""
    return TensorFlowBackend(adapt(model), settings)


def adapt(model: Model | Any) -> Any:
    """A user's Keras model as a model; others as they are. UserError where it cannot serve."""
    if isinstance(getattr(model, "parameters", None), Mapping):
        return model
    from backends.tensorflow.adapter import KerasModel, keras

    if not isinstance(model, keras.Model):
        raise UserError(f'model.kind gives {type(model).__name__}, which is no Keras model; backend.name = "tensorflow" trains those.')
    return KerasModel(model)


def before_models(settings: Any) -> None:
    """To be called before a user's code makes variables, with which TensorFlow starts. What cannot be had any more, `create` tells:
    a process that only looks at a model need not compute like a worker.
    """
    with suppress(UserError):
        start(int(settings.threads))


def construct(factory: Callable[..., Any], config: Mapping[str, Any], seed: int) -> Any:
    """A user's model or data set; what it draws to begin with is a function of `seed`, so every worker builds the same."""
    with seeded(seed):
        return factory(**config)


collate = stacked  # a user's items as a batch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the generators of Python and NumPy, from which Keras draws starting values, start from `seed`; then they are as before."""
    with drawing:
        own, theirs = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed & (1 << 32) - 1)
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(theirs)


def start(threads: int) -> None:
    """Sets what TensorFlow fixes for a process at its first kernel. UserError where it has run already, with other threads."""
    with _start:
        config = tf.config.threading
        if config.get_intra_op_parallelism_threads() != threads:
            try:
                config.set_intra_op_parallelism_threads(threads)
                config.set_inter_op_parallelism_threads(1)  # a training step is a chain: its kernels share the threads
                tf.config.set_visible_devices([], "GPU")
            except RuntimeError as error:
                raise UserError(f"backend.threads = {threads} cannot be had: TensorFlow has already computed in this process, with other "
                                "threads; let nothing use it before the run begins.") from error
        tf.config.experimental.enable_op_determinism()


class TensorFlowBackend(Pieces):
    """One model on the CPU. Calls may come from any thread, one at a time; processes may hold several backends."""

    name = "tensorflow"

    def __init__(self, model: Any, settings: Any):
        if settings.device not in ("cpu", "auto"):
            raise UserError(f'backend.device = {settings.device!r} is not for the tensorflow backend, which runs on "cpu"; use "torch" on a GPU.')
        if settings.precision not in ("float32", "float64"):
            raise UserError(f"backend.precision = {settings.precision!r} must be float32 with the tensorflow backend.")
        start(int(settings.threads))
        super().__init__(model)
        self.parameters: Mapping[str, Spec] = model.parameters
        self.buffers: Mapping[str, Spec] = model.buffers
        self._own: Any = model if hasattr(model, "tensors") else None  # a user's, `adapter.KerasModel`
        self._columns = self._own.tensors if self._own else self._neutral_columns
        self._dtype = np.dtype(settings.precision)
        self._ops = TensorFlowOps(self._dtype)
        self._jit = bool(settings.compile)
        self._params: dict[str, Any] = {}
        self._state: Mapping[str, np.ndarray] = {}
        self._steps: dict[tuple[str, ...], Callable[..., Any]] = {}
        self._compilations = 0
        self._metrics = self._traced(self._measured)
        self._constrained: dict[str, np.ndarray] = {}

    def allocate(self, size: int) -> Buffer:
        room = np.zeros(size * self._dtype.itemsize + ALIGN_BYTES, np.uint8)
        first = -room.ctypes.data % ALIGN_BYTES
        return room[first:first + size * self._dtype.itemsize].view(self._dtype)

    def initial(self) -> Mapping[str, Any]:
        return self._model.initial() if hasattr(self._model, "initial") else {}

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
        into = room()
        if self._own is None:
            self.gradients(batch, 0, into)
            return Habits()
        names, columns = tuple(into), self._columns(batch)
        self._own.open(self._params, self._device_state(), columns)
        own, everything = self._own, (*self.parameters, *self.buffers)

        def again(hidden: Iterable[str], factor: float) -> tuple[ShardResult, dict[str, np.ndarray]]:
            with own.hidden(hidden):
                return self._computed(names, batch, 0, factor)

        first, once = self._computed(names, batch, 0)
        second, twice = again(everything, 2.0)
        check_read(own.kind, everything, first, second, lambda name: again([name] if name else [], 1.0)[0], READ)
        check_repeats(own.kind, first, second, GENERATORS)
        check_linear(own.kind, once, twice)
        own.rehearse(self._params, self._device_state(), columns)
        own.check_gradients(self._params, self._device_state(), columns, {name: once.get(name, np.zeros(())) for name in names})
        return Habits(moved=own.moved, sums=own.sums, undivided=own.undivided)

    def _computed(self, names: tuple[str, ...], batch: Batch, seed: int, factor: float = 1.0) -> tuple[ShardResult, dict[str, np.ndarray]]:
        """One shard, with `factor` times the gradients of its loss sum."""
        columns, state = self._columns(batch), self._device_state()
        arguments: tuple[Any, ...] = self._params, state, columns, tf.constant(np.uint64(seed & U64))
        if self.is_split:
            loss, weight, new, slopes = self._call(("gradients", names), self._step_of(names), arguments)
        else:
            if names not in self._steps:
                self._steps[names] = self._traced(self._step_of(names))
            if self._own:
                self._own.open(self._params, state, columns)
                arguments = *arguments, tf.constant(factor)
            with self._telling():
                loss, weight, new, slopes = self._steps[names](*arguments)
        found = {name: np.asarray(slope) for name, slope in zip(names, slopes, strict=True) if slope is not None}
        return ShardResult(float(loss), float(weight), {name: value.numpy() for name, value in new.items()}), found

    def metrics(self, batch: Batch) -> Mapping[str, tuple[Any, float]]:
        columns, state = self._columns(batch), self._device_state()
        if self._own:
            self._own.open(self._params, state, columns)
        with self._telling():
            found = (self._call(("metrics",), self._measured, (self._params, state, columns)) if self.is_split
                     else self._metrics(self._params, state, columns))
        return {name: (plain(total), float(weight)) for name, (total, weight) in found.items()}

    def tally(self) -> Tally | None:
        return tally_of(self._model)

    def _telling(self) -> AbstractContextManager[Any]:
        """Around a user's own kernels: what fails in them is the user's error."""
        return self._own.telling() if self._own else nullcontext()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """The scores of a model that offers `logits`. Not traced: a text that grows has another shape with every token."""
        return self._model.logits(self._ops, self._params, tf.constant(np.asarray(tokens, np.int64))).numpy()

    def update(self, rule: UpdateRule, param: Buffer, grad: Buffer, slots: Mapping[str, Buffer], block: int) -> None:
        optimizer.apply(rule, param, grad, slots)
        for name, view in self._constrained.items():
            if lies_in(view, param):
                view[...] = self._own.constraints[name](tf.constant(view)).numpy()

    def squared_norms(self, grad: Buffer, block: int) -> np.ndarray:
        return optimizer.squared_norms(grad, block)

    def compilations(self) -> int:
        return self._compilations

    def _traced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self._compilations += 1  # Python runs while tracing, never after
            return function(*arguments)

        return tf.function(counted, jit_compile=self._jit, autograph=False)

    def _measured(self, params: Mapping[str, Any], state: Mapping[str, Any], batch: Any) -> Mapping[str, tuple[Any, Any]]:
        return self._model.metrics(self._ops, params, state, batch)

    def _step_of(self, names: Sequence[str]) -> Callable[..., Any]:
        def step(params: Mapping[str, Any], state: Mapping[str, Any], batch: Any, seed: Any, factor: Any = None) -> tuple[Any, Any, Any, list[Any]]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([params[name] for name in names])
                loss, weight, new = self._model.loss(self._ops, params, state, batch, seed)
            if self._own:
                self._own.check_moved(names)
            slopes = tape.gradient(loss, [params[name] for name in names],
                                   output_gradients=None if factor is None else tf.cast(factor, loss.dtype))
            if all(slope is None for slope in slopes) and not (isinstance(weight, float) and weight == 0.0):  # a batch without rows
                raise UserError(UNTRAINED)
            return (tf.cast(loss, tf.float64), tf.cast(weight, tf.float64), dict(new),
                    [None if slope is None else tf.convert_to_tensor(slope) for slope in slopes])

        return step

    def _device_state(self) -> dict[str, Any]:
        return {name: tf.constant(value) for name, value in self._state.items()}

    def _neutral_columns(self, batch: Batch) -> dict[str, Any]:
        kinds = {"f": self._dtype, "i": np.dtype(np.int64), "u": np.dtype(np.int64), "b": np.dtype(np.bool_)}
        return {name: tf.constant(np.asarray(column).astype(kinds[np.asarray(column).dtype.kind], copy=False)) for name, column in batch.items()}


def tensor_over(view: np.ndarray) -> Any:
    """A tensor that shares the memory of a view."""
    assert view.ctypes.data % ALIGN_BYTES == 0, "parameters begin at multiples of 64 bytes"
    return tf.experimental.dlpack.from_dlpack(view.__dlpack__())


def lies_in(view: np.ndarray, buffer: np.ndarray) -> bool:
    first = view.ctypes.data - buffer.ctypes.data
    return first >= 0 and first + view.nbytes <= buffer.nbytes
