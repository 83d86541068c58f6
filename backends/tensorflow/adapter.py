"""A user's own Keras model as a model: named arrays and a call without side effects.

The model is built and compiled with a loss, and its rows are (x, y) or (x, y, sample_weight); or it has
`batch_loss(batch)` giving the mean loss over the batch or (sum, weight), and may have `batch_metrics(batch)` giving
{name: (sum, weight)}. What compile() was told is served as `fit` serves it or refused; its optimizer is not asked, the
recipe's trains. The model is called inside a stateless scope: what it writes (a batch norm's statistics) comes back as
new buffers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from backends.common import check_attributes, check_float32, mapped, plain_attributes, spoiled, telling
from backends.tensorflow.compiled import (
    VARIABLES,
    Figures,
    MetricTally,
    check_compiled,
    divisor,
    is_sum,
    parts,
    snake,
    uneven,
)
from backends.tensorflow.ops import mixed, tf

# isort: split
import keras

from elastic.data.collate import num_rows
from elastic.errors import UserError
from elastic.model.backend import Adapted, Spec
from elastic.model.ops import GOLDEN, tag_key
from elastic.model.user_code import pair, pairs

COARSELY = 0.05  # as far as two ways of computing in bfloat16 are apart, and much less than a gradient that is lost
OF_KERAS = frozenset(vars(keras.Model()))


class Scope(keras.StatelessScope):
    """Remembers which variables were written to. As with variables themselves, no gradient goes through what was
    written."""

    def __init__(self, values: list[tuple[Any, Any]]):
        super().__init__(values, collect_losses=True, initialize_variables=False)
        self.written: dict[int, Any] = {}

    def added(self) -> list[Any]:
        """What add_loss was told until now."""
        return list(self.losses)

    def add_update(self, update: tuple[Any, Any]) -> None:
        self.written[id(update[0])] = update[0]
        super().add_update((update[0], tf.stop_gradient(update[1])))


class KerasModel(Adapted):
    """`elastic.model.backend.Model` over a Keras model; `ops` is not used.

    `open` must have seen a batch before `loss` and `metrics` are traced. `moved`: frozen weights that the loss writes
    to.
    """

    KEEP = "keep it in a weight of the model (add_weight(trainable=False)), or leave it as it is"
    READ = "keep the variable itself, and ask for its value in each call"
    GENERATORS = ("let layers draw by a keras.random.SeedGenerator that is an attribute of theirs (one made elsewhere, "
                  "and tf.random, go on from call to call), and count nothing in the loss")

    def __init__(self, model: keras.Model):
        self._model, self.kind = model, type(model).__name__
        if keras.backend.backend() != "tensorflow":
            raise UserError(f'model.kind: Keras computes on {keras.backend.backend()} here; with backend.name = '
                            '"tensorflow" let KERAS_BACKEND be "tensorflow" or unset.')
        if not model.built:
            raise UserError(f"model.kind: {self.kind} is not built; call it once on an example, or its "
                            "build(input_shape), where it is made.")
        self._own_loss = hasattr(model, "batch_loss")
        check_compiled(model, self._own_loss)
        generators = [generator.state for layer in model._flatten_layers() for generator in layer._seed_generators]
        self._seeds = list({id(state): state for state in generators}.values())
        named = named_variables(model, [v for v in model.variables if all(v is not state for state in self._seeds)])
        weights = {id(v) for layer in model._flatten_layers() for v in layer._trainable_variables}
        self._trained = trained = {id(v) for v in model.trainable_weights}
        self._weights = {name: v for name, v in named.items() if id(v) in trained
                         or (id(v) in weights and v.dtype == "float32")}
        self._kept = {name: v for name, v in named.items() if name not in self._weights}
        if not trained:
            raise UserError(f"model.kind: {self.kind} has no parameters to train; if its layers make them when they "
                            "are first called, call it once on an example where it is made.")
        check_float32({name: v.dtype for name, v in self._weights.items()})
        self.constraints = {name: v.constraint for name, v in self._weights.items() if v.constraint is not None}
        self.given = {name: np.array(v.numpy()) for name, v in named.items()}
        self.parameters = {name: Spec.given(self.given[name], trainable=id(v) in trained,
                                            whole=name in self.constraints)
                           for name, v in self._weights.items()}
        self.buffers = {name: Spec.given(self.given[name]) for name in self._kept}
        self.figures: Figures | None = None  # until `open` has seen a batch
        self.moved: tuple[str, ...] = ()
        self.sums, self.undivided = not self._own_loss and is_sum(model), ""

    @contextmanager
    def _lent(self, values: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the variables themselves, in place of which a scope has tensors, hold these values."""
        variables = {**self._weights, **self._kept}
        for name, value in values.items():
            variables[name].assign(value)
        try:
            yield
        finally:
            for name in values:
                variables[name].assign(self.given[name])

    def hidden(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Inside, these of the variables themselves hold what nothing should read."""
        return self._lent({name: spoiled(self.given[name]) for name in names})

    def check_gradients(self, params: Mapping[str, Any], state: Mapping[str, Any], batch: Any,
                        found: Mapping[str, np.ndarray]) -> None:
        """UserError where Keras by itself, with variables instead of a scope's tensors, has other gradients than were
        `found`."""
        for number, seed in enumerate(self._seeds):
            seed.assign(seed_state(0, number, seed.dtype))
        with self._lent({**params, **state}), self.telling(), tf.GradientTape() as tape:
            total, _ = self._loss(batch, True, lambda: [loss for layer in self._model._flatten_layers()
                                                        for loss in layer._losses])
        slopes = tape.gradient(total, [self._weights[name].value for name in found])
        wanted = {name: np.zeros(()) if slope is None else np.asarray(tf.convert_to_tensor(slope))
                  for name, slope in zip(found, slopes, strict=True)}
        everything = np.sqrt(sum(np.square(slope, dtype=np.float64).sum() for slope in wanted.values()))
        for name, slope in wanted.items():
            off = np.linalg.norm(np.asarray(found.get(name, 0.0) - slope, np.float64))
            if off > COARSELY * np.linalg.norm(slope) and off > COARSELY ** 2 * everything:
                raise UserError(f"model.kind: {self.kind} has another gradient of {name} here than in Keras itself: "
                                "keras.remat, tf.recompute_grad and a tf.custom_gradient do not see the variables that "
                                "are read inside of them; take them out, or hand the variables' values to them as "
                                "arguments.")

    def tally(self) -> MetricTally:
        return MetricTally(self)

    def open(self, params: Mapping[str, Any], state: Mapping[str, Any], batch: Any) -> None:
        """Makes what compile() names: this creates variables, which no stateless scope allows. UserError for metrics
        that do not add up."""
        if self.figures is not None or not num_rows(batch):
            return
        if not self._own_loss:
            x, y, sample_weight = parts(batch, bool(self._model.loss))
            with self._scope(params, state, 0, opening=True):
                y_pred = self._called(x, False)
            loss, metrics = self._model._compile_loss, self._model._compile_metrics
            with self.telling():  # some make variables when they first see values
                if loss is not None and not loss.built:
                    loss.build(y, y_pred)
                if metrics is not None and not metrics.built:
                    metrics.update_state(y, y_pred, sample_weight)
                    metrics.reset_state()
        figures = Figures(self._model)
        with self.telling():
            if not figures.variables:  # nor need it take half of a shard
                self._measured(figures, params, state, [batch])
            else:
                halves = pieces_of(batch)
                figures.check_adds_up(self.kind, *(self._measured(figures, params, state, some)
                                                   for some in (halves, halves[:1], halves[1:])))
        self.figures = figures

    def rehearse(self, params: Mapping[str, Any], state: Mapping[str, Any], batch: Any) -> None:
        """Beside traces: why a batch's loss is not made of its parts', and attributes that change. The model has been
        called before."""
        before = self._attributes()
        halves = pieces_of(batch)

        def told(rows: Any, seed: int = 0) -> tuple[float, float]:
            with self._scope(params, state, seed) as scope:
                loss, weight = (self._loss if self._own_loss else self._found)(rows, False, scope.added)
            return float(loss), float(weight)

        losses = [told(rows) for rows in ((together(halves), *halves) if not self._own_loss else (batch,))]
        check_attributes(self.kind, before, self._attributes(), self.KEEP)
        if not self._own_loss and not self.undivided:
            why = uneven(self.kind, losses, self.sums)
            # what draws in inference as well, as a VAE does, gives other losses anyway
            if why and told(together(halves), 1) == losses[0]:
                self.undivided = why

    def loss(self, ops: Any, params: Mapping[str, Any], state: Mapping[str, Any], batch: Any,
             seed: Any) -> tuple[Any, Any, Mapping[str, Any]]:
        """The loss sum, its weight and the new buffers; what its layers draw is a function of `seed`."""
        rows = num_rows(batch)
        if not rows:
            return tf.zeros(()), 0.0, {**state, **{name: params[name] for name in self.moved}}
        with self._scope(params, state, seed) as scope:
            total, weight = self._loss(batch, True, scope.added)
        self.moved = tuple(name for name, v in self._weights.items() if id(v) in scope.written)
        new = {name: scope.get_current_value(v) for name, v in self._kept.items()}
        return total, weight, {**new, **{name: scope.get_current_value(self._weights[name]) for name in self.moved}}

    def check_moved(self, trained: Sequence[str]) -> None:
        """UserError where the loss writes to what the optimizer trains."""
        for name in self.moved:
            if name in trained:
                raise UserError(f"model.kind: {self.kind} writes to its parameter {name} in its loss, and the "
                                "optimizer writes to it too; use a constraint, or make it untrainable.")

    def metrics(self, ops: Any, params: Mapping[str, Any], state: Mapping[str, Any],
                batch: Any) -> Mapping[str, tuple[Any, Any]]:
        """The model's own metrics and always "loss", in inference mode."""
        if not num_rows(batch):
            return {"loss": (0.0, 0.0)}
        with self._scope(params, state, 0) as scope:
            out = {"loss": self._loss(batch, False, scope.added)}
            if hasattr(self._model, "batch_metrics"):
                out |= pairs(self._model.batch_metrics(mapped(batch)), "batch_metrics(batch)")
            if self.figures is not None and self.figures.variables:
                out[VARIABLES] = self.figures.change(map(scope.get_current_value, self.figures.variables)), 1.0
        return out

    def _measured(self, figures: Figures, params: Mapping[str, Any], state: Mapping[str, Any],
                  batches: list[Any]) -> np.ndarray:
        """How far some batches after one another move the metrics' variables."""
        values = figures.values()
        for batch in batches:
            with self._scope(params, state, 0, values) as scope:
                self._loss(batch, False, scope.added)
            values = [(v, scope.get_current_value(v)) for v in figures.variables]
        return np.asarray(figures.change([value for _, value in values]))

    def _called(self, x: Any, training: bool) -> Any:
        return self._model(x, training=training) if self._model._call_has_training_arg else self._model(x)

    def _loss(self, batch: Any, training: bool, added: Callable[[], Sequence[Any]]) -> tuple[Any, Any]:
        """(sum, weight), with what was `added` by add_loss until then. An evaluation weighs batches by their rows, as
        `evaluate` does."""
        rows = num_rows(batch)
        if self._own_loss:
            return as_sum(self._model.batch_loss(mapped(batch)), rows)
        loss, weight = self._found(batch, training, added)
        if not training:
            return loss * rows, float(rows)
        return (loss, weight) if self.sums else (loss * weight, weight)

    def _found(self, batch: Any, training: bool, added: Callable[[], Sequence[Any]]) -> tuple[Any, Any]:
        """The loss as `fit` has it, and what it is divided by."""
        model = self._model
        x, y, sample_weight = parts(batch, bool(self._model.loss))
        y_pred = self._called(x, training)
        loss = tf.reshape(model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training),
                          ())
        weight, why = divisor(model, y_pred, sample_weight, added(), num_rows(batch))
        self.undivided = self.undivided or why
        if not training and model._compile_metrics is not None:
            model._compile_metrics.update_state(y, y_pred, sample_weight)
        return loss, weight

    def _attributes(self) -> Mapping[str, Any]:
        layers = [(layer.name if layer is not self._model else "", layer) for layer in self._model._flatten_layers()
                  if not type(layer).__module__.startswith("keras.")]
        return plain_attributes(layers, lambda value: value.numpy() if isinstance(value, tf.Tensor)
                                and hasattr(value, "numpy") else None,
                                OF_KERAS)

    def telling(self) -> AbstractContextManager[None]:
        return telling(self.kind, in_one_line)

    @contextmanager
    def _scope(self, params: Mapping[str, Any], state: Mapping[str, Any], seed: Any, values: list[tuple[Any, Any]]
               | None = None,
               opening: bool = False) -> Iterator[Scope]:
        """Inside, the model computes with these arrays, and metrics with `values`. UserError where it writes to what it
        must not."""
        model = self._model
        if values is None:
            values = self.figures.values() if self.figures else []
        values = values + [(v, params[name]) for name, v in self._weights.items()] + [(v, state[name]) for name, v in self._kept.items()]
        values += [(v, seed_state(seed, i, v.dtype)) for i, v in enumerate(self._seeds)]
        known = len(model.variables)
        with self.telling(), Scope(values) as scope:
            yield scope
        if len(model.variables) != known:
            raise UserError(f"model.kind: {self.kind} makes parameters while it runs; make all of them where it is "
                            "built.")
        ours = {id(v) for v, _ in values} | ({id(v) for v in model.metrics_variables} if opening else set())
        for number, variable in scope.written.items():
            if number not in ours:
                raise UserError(f"model.kind: {self.kind} writes to the variable {variable.path}, which is none of its "
                                "own, so no checkpoint has it; make it, or the SeedGenerator that it belongs to, an "
                                "attribute of a layer.")
        if {id(v) for v in model.trainable_weights} != self._trained:
            raise UserError(f"model.kind: {self.kind} changes `trainable` while it computes its loss; set it where the "
                            "model is made, or use model.freeze and model.thaw.")
        check_graph(self.kind, model._flatten_layers())


def check_graph(kind: str, layers: Iterable[Any]) -> None:
    """UserError where what is being traced writes to a plain tf.Variable, which no scope hides."""
    if tf.executing_eagerly():
        return
    graph = tf.compat.v1.get_default_graph()
    for op in graph.get_operations():
        if re.fullmatch(r"(Assign\w*|Resource(Scatter|Apply|StridedSliceAssign)\w*)", op.type):
            handles = [outer for outer, inner in graph.captures if inner is op.inputs[0]]
            found = [f"{layer.name}.{name}" for layer in layers for name, value in vars(layer).items()
                     if isinstance(value, tf.Variable) and any(value.handle is handle for handle in handles)]
            raise UserError(f"model.kind: {kind} writes to the tf.Variable {(found or [op.name])[0]}, which Keras does "
                            "not know as its own; make it by add_weight(trainable=False).")


def pieces_of(batch: Any) -> list[Any]:
    """Two batches: the two parts of this one, or this one twice where it has one row."""
    middle = num_rows(batch) // 2
    if not middle:
        return [batch, batch]
    return [keras.tree.map_structure(lambda x: x[:middle], batch),
            keras.tree.map_structure(lambda x: x[middle:], batch)]


def together(batches: list[Any]) -> Any:
    return keras.tree.map_structure(lambda *x: tf.concat(x, 0), *batches)


def named_variables(model: keras.Model, variables: list[Any]) -> dict[str, Any]:
    """Variables by name, as "dense.kernel".

    Keras numbers layers without a name of their own by how many the process has made; here they are numbered within the
    model, so that every worker finds the same names.
    """
    automatic = {layer.name: snake(type(layer).__name__) for layer in model._flatten_layers(include_self=False)}
    # the prefixes are what Bidirectional puts before a name
    automatic = {name: found[1] for name, base in automatic.items()
                 if (found := re.fullmatch(rf"((?:forward_|backward_)?{base})(?:_\d+)?", name))}
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


def seed_state(seed: Any, number: int, dtype: str) -> Any:
    """Where the generator of layer `number` starts: two 31-bit numbers out of the step's seed."""
    start = tf.constant(np.uint64(seed)) if isinstance(seed, int) else seed
    drawn = mixed(start + np.uint64(GOLDEN * (tag_key(f"keras {number}") + 1) & (1 << 64) - 1))
    return tf.cast(tf.bitwise.right_shift(tf.bitcast(drawn, tf.uint32), np.uint32(1)), dtype)


def in_one_line(error: Exception) -> str:
    """What Keras says of an error, without its frame of colours and arguments."""
    told = [part.strip() for part in re.sub(r"\x1b\[\d*m", "", str(error)).split("\n\n")]
    return " ".join(next((part for part in told if not part.startswith("Exception encountered")),
                         told[0]).split()).rstrip(".")


def as_sum(found: Any, rows: int) -> tuple[Any, Any]:
    """(sum, weight) as they are; a mean times the number of rows."""
    if isinstance(found, tuple):
        return pair(found, "batch_loss(batch)")
    found = tf.convert_to_tensor(found)
    if found.shape.num_elements() != 1:
        raise UserError("model.kind: batch_loss(batch) must give one number or (sum, weight), not a tensor of shape "
                        f"{tuple(found.shape)}.")
    return tf.reshape(found, ()) * rows, float(rows)
