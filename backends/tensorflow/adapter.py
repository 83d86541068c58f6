"""A user's own Keras model as a model: named arrays and a call without side effects.

The model is built and compiled with a loss, and its rows are (x, y) or (x, y, sample_weight); or it has `batch_loss(batch)` giving
the mean loss over the batch or (sum, weight), and may have `batch_metrics(batch)` giving {name: (sum, weight)}. Compiled metrics
count too where they are means over rows; the compiled optimizer and a `train_step` of its own do not, the recipe's optimizer
trains. It is called inside `keras.StatelessScope`: what it writes (a batch norm's statistics) comes back as new buffers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from backends.tensorflow.ops import mixed, tf

# isort: split
import keras

from elastic.backend import Spec
from elastic.errors import UserError
from elastic.ops import GOLDEN, tag_key
from elastic.own import pair, pairs, rebuilt

SEED = "seed_generator_state"  # Keras' name for the state of a layer's own generator


class KerasModel:
    """`elastic.backend.Model` over a Keras model; `ops` is not used. `tensors` makes its batches."""

    def __init__(self, model: keras.Model):
        self._model, self._kind = model, type(model).__name__
        if not model.built:
            raise UserError(f"model.kind: {self._kind} is not built; call it once on an example, or its build(input_shape), where it is made.")
        if not hasattr(model, "batch_loss") and not model.loss:
            raise UserError(f"model.kind: {self._kind} has no loss; call its compile(loss=...), or give it a method batch_loss(batch).")
        seeds = [v for v in model.non_trainable_variables if v.name == SEED]
        named = named_variables(model, [v for v in model.variables if v.name != SEED])
        self._trained = {name: v for name, v in named.items() if v.trainable}
        self._kept = {name: v for name, v in named.items() if not v.trainable}
        self._seeds = list(seeds)
        if not self._trained:
            raise UserError(f"model.kind: {self._kind} has no parameters to train.")
        for name, variable in self._trained.items():
            if variable.dtype != "float32":
                raise UserError(f"model.kind: parameter {name} is {variable.dtype}; parameters must be float32.")
        self._given = {name: np.array(v.numpy()) for name, v in named.items()}
        self.parameters = {name: given_spec(self._given[name]) for name in self._trained}
        self.buffers = {name: given_spec(self._given[name]) for name in self._kept}

    def initial(self) -> Mapping[str, np.ndarray]:
        """The values that the model was built with."""
        return self._given

    def tensors(self, batch: Any) -> Any:
        return columns(batch)

    def loss(self, ops: Any, params: Mapping[str, Any], state: Mapping[str, Any], batch: Any,
             seed: Any) -> tuple[Any, Any, Mapping[str, Any]]:
        """The loss sum, its weight and the new buffers; what its layers draw is a function of `seed`."""
        rows = num_rows(batch)
        if not rows:
            return tf.zeros(()), 0.0, state
        with self._scope(params, state, seed) as scope:
            total, weight = self._loss(batch, True)
        return total, weight, {name: scope.get_current_value(v) for name, v in self._kept.items()}

    def metrics(self, ops: Any, params: Mapping[str, Any], state: Mapping[str, Any],
                batch: Any) -> Mapping[str, tuple[Any, Any]]:
        """The model's own metrics and always "loss", in inference mode."""
        if not num_rows(batch):
            return {"loss": (0.0, 0.0)}
        compiled = None if hasattr(self._model, "batch_loss") else self._model._compile_metrics
        if compiled is not None and not compiled.built:
            self._build(compiled, params, state, batch)
        with self._scope(params, state, 0) as scope:
            out = {"loss": self._loss(batch, False)}
            if hasattr(self._model, "batch_metrics"):
                out |= pairs(self._model.batch_metrics(batch), "batch_metrics(batch)")
            if compiled is not None:
                out |= {metric.name: (scope.get_current_value(metric.total), scope.get_current_value(metric.count))
                        for metric in compiled.metrics}
        return out

    def _loss(self, batch: Any, training: bool) -> tuple[Any, Any]:
        model, rows = self._model, num_rows(batch)
        if hasattr(model, "batch_loss"):
            return as_sum(model.batch_loss(batch), rows)
        x, y, sample_weight = parts(batch)
        y_pred = model(x, training=training)
        loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        if not training and model._compile_metrics is not None:
            model._compile_metrics.update_state(y, y_pred, sample_weight)
        return as_sum(loss, rows)

    def _build(self, compiled: Any, params: Mapping[str, Any], state: Mapping[str, Any], batch: Any) -> None:
        """Makes what compile(metrics=[...]) names; this creates variables, which no stateless scope allows."""
        x, y, _ = parts(batch)
        with self._scope(params, state, 0):
            y_pred = self._model(x, training=False)
        compiled.build(y, y_pred)
        for metric in compiled.metrics:
            if not isinstance(metric, keras.metrics.Mean):
                raise UserError(f"model.kind: the metric {metric.name} of {self._kind} is no mean over rows; take it out of compile(metrics=...).")

    @contextmanager
    def _scope(self, params: Mapping[str, Any], state: Mapping[str, Any], seed: Any) -> Iterator[keras.StatelessScope]:
        values = [(v, params[name]) for name, v in self._trained.items()] + [(v, state[name]) for name, v in self._kept.items()]
        values += [(v, seed_state(seed, i, v.dtype)) for i, v in enumerate(self._seeds)]
        known = len(self._model.variables)
        compiled = self._model._compile_metrics
        if compiled is not None and compiled.built:
            values += [(v, tf.zeros(v.shape, v.dtype)) for v in compiled.variables]
        try:
            with keras.StatelessScope(values, collect_losses=True, initialize_variables=False) as scope:
                yield scope
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"model.kind: {self._kind} cannot be called ({type(error).__name__}: {in_one_line(error)}).") from error
        if len(self._model.variables) != known:
            raise UserError(f"model.kind: {self._kind} makes parameters while it runs; make all of them where it is built.")


def named_variables(model: keras.Model, variables: list[Any]) -> dict[str, Any]:
    """Variables by name, as "dense.kernel".

    Keras numbers layers without a name of their own by how many the process has made; here they are numbered within the model,
    so that every worker finds the same names.
    """
    automatic = {layer.name: snake(type(layer).__name__) for layer in model._flatten_layers(include_self=False)}
    automatic = {name: base for name, base in automatic.items() if re.fullmatch(rf"{base}(_\d+)?", name)}
    renamed: dict[str, str] = {}
    counts: dict[str, int] = {}
    out: dict[str, Any] = {}
    for variable in variables:
        steps = variable.path.split("/")
        for step in steps:
            if step in automatic and step not in renamed:
                number = counts[automatic[step]] = counts.get(automatic[step], -1) + 1
                renamed[step] = f"{automatic[step]}_{number}" if number else automatic[step]
        kept = steps[1:] if len(steps) > 1 and steps[0] == model.name else steps
        name = plain_name = ".".join(renamed.get(step, step) for step in kept)
        twins = 1
        while name in out:
            name, twins = f"{plain_name}.{twins}", twins + 1
        out[name] = variable
    return out


def snake(name: str) -> str:
    """A class's name as Keras makes a layer's of it: "BatchNormalization" is "batch_normalization"."""
    name = re.sub(r"\W+", "", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z0-9]+)", r"\1_\2", name)).lower()


def seed_state(seed: Any, number: int, dtype: str) -> Any:
    """Where the generator of layer `number` starts: two 31-bit numbers out of the step's seed."""
    start = tf.constant(np.uint64(seed)) if isinstance(seed, int) else seed
    drawn = mixed(start + np.uint64(GOLDEN * (tag_key(f"keras {number}") + 1) & (1 << 64) - 1))
    return tf.cast(tf.bitwise.right_shift(tf.bitcast(drawn, tf.uint32), np.uint32(1)), dtype)


def in_one_line(error: Exception) -> str:
    """What Keras says of an error, without its frame of colours and arguments."""
    told = [part.strip() for part in re.sub(r"\x1b\[\d*m", "", str(error)).split("\n\n")]
    return " ".join(next((part for part in told if not part.startswith("Exception encountered")), told[0]).split()).rstrip(".")


def given_spec(value: np.ndarray) -> Spec:
    return Spec(tuple(value.shape), (), "given", dtype=str(value.dtype))


def parts(batch: Any) -> tuple[Any, Any, Any]:
    if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 3:
        raise UserError("model.kind: a compiled Keras model trains on rows (x, y) or (x, y, sample_weight); let the data set give them, or "
                        "give the model a method batch_loss(batch).")
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def as_sum(found: Any, rows: int) -> tuple[Any, Any]:
    """(sum, weight) as they are; a mean times the number of rows."""
    if isinstance(found, tuple):
        return pair(found, "batch_loss(batch)")
    found = tf.convert_to_tensor(found)
    if found.shape.num_elements() != 1:
        raise UserError(f"model.kind: batch_loss(batch) must give one number or (sum, weight), not a tensor of shape {tuple(found.shape)}.")
    return tf.reshape(found, ()) * rows, float(rows)


def num_rows(batch: Any) -> int:
    while not hasattr(batch, "shape"):
        values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
        if not values:
            raise UserError("data.kind: a batch has no columns.")
        batch = values[0]
    return int(batch.shape[0])


def columns(batch: Any) -> Any:
    """The batch as its data set made it, dict or tuple, with tensors for arrays; float64 becomes float32."""
    if isinstance(batch, Mapping):
        return {name: columns(value) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return rebuilt(batch, columns)
    array = np.asarray(batch)
    return tf.constant(array.astype(np.float32) if array.dtype == np.float64 else array)

