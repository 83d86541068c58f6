"""What `compile()` and a Keras model's own methods ask for: served as `fit` serves it, or refused in one sentence. What a batch adds to the
variables of metrics is added up, and each one's own `result()` is told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from backends.tensorflow.ops import tf

# isort: split
import keras
from keras.src.backend import get_keras_mask
from keras.src.losses.loss import apply_mask

from elastic.errors import UserError

OWN_LOSS = "give the model a method batch_loss(batch), which is computed shard by shard and returns the mean or (sum, weight)"
ONE_SHARD = f"write elastic.logical_shards = 1, or {OWN_LOSS}"
NOT_ASKED = ("train_step", "test_step", "compute_metrics", "make_train_function", "make_test_function", "fit",
             "evaluate", "train_on_batch")
MEANS = ("sum_over_batch_size", "mean")
WEIGHTED = "mean_with_sample_weight"
TOLERANCE = 1e-4
VARIABLES = "metric variables"  # one array, among what a model's metrics give
COARSE, FINE = 2.0 ** 10, 2.0 ** 52  # grids on which sums of float64 are exact, whatever their order


def check_compiled(model: keras.Model, own_loss: bool) -> None:
    """UserError where `fit` would do what shards cannot."""
    kind = type(model).__name__
    for variable in model.trainable_weights:
        if variable.overwrite_with_gradient:
            raise UserError(f"model.kind: {kind} keeps {variable.path} by overwriting it with its gradient (float8); "
                            "use another dtype policy.")
    if any(layer.compute_dtype == "float16" for layer in model._flatten_layers()):
        raise UserError(f'model.kind: {kind} computes in float16, for which `fit` scales its loss; use '
                        '"mixed_bfloat16" or "float32".')
    if own_loss:
        return
    for name in NOT_ASKED:
        if getattr(type(model), name) is not getattr(keras.Model, name) or name in vars(model):
            raise UserError(f"model.kind: {kind} has a {name} of its own, which is not called here; {OWN_LOSS}.")
    if not model.compiled:
        raise UserError(f"model.kind: {kind} has no loss; call its compile(loss=...), or {OWN_LOSS}.")
    for loss in losses_of(model):
        if loss.reduction not in (*MEANS, WEIGHTED, "sum"):
            raise UserError(f"model.kind: the loss {loss.name} of {kind} has reduction = {loss.reduction!r}, which "
                            "gives no one number; write "
                            f'reduction = "sum_over_batch_size", or {OWN_LOSS}.')


def losses_of(model: keras.Model) -> list[Any]:
    """Those that compile() was given as objects; the others are means over rows."""
    return [loss for loss in keras.tree.flatten(model.loss) if isinstance(loss, keras.losses.Loss)]


def is_sum(model: keras.Model) -> bool:
    """Whether all its losses are sums over rows."""
    return len(losses_of(model)) == num_losses(model) > 0 and all(loss.reduction == "sum" for loss in losses_of(model))


def num_losses(model: keras.Model) -> int:
    return sum(loss is not None for loss in keras.tree.flatten(model.loss))


def divisor(model: keras.Model, y_pred: Any, sample_weight: Any, added: Sequence[Any], rows: int) -> tuple[Any, str]:
    """What the loss of a batch is divided by, so that batches' losses can be put together by it; and why they cannot,
    or "".

    `added`: what the call has told to add_loss.
    """
    masks = [mask for mask in map(get_keras_mask, keras.tree.flatten(y_pred)) if mask is not None]
    kinds, named = {loss.reduction for loss in losses_of(model)}, f"model.kind: the loss of {type(model).__name__}"
    is_mixed = bool(added) or num_losses(model) > 1 or type(model).compute_loss is not keras.Model.compute_loss
    if "sum" in kinds:
        if is_sum(model) and not model.losses and type(model).compute_loss is keras.Model.compute_loss:
            return float(rows), ""
        return float(rows), f'{named} has reduction = "sum" and another part (a penalty, add_loss, a mean), which is no sum over rows; {ONE_SHARD}.'
    if not masks and WEIGHTED not in kinds:
        return float(rows), ""
    if is_mixed:
        what = "a mask" if masks else f"reduction = {WEIGHTED!r}"
        return float(rows), f"{named} has {what}, by which Keras divides, and more than one part, each divided by something else; {ONE_SHARD}."
    if WEIGHTED not in kinds:
        return total(masks[0]), ""
    weights = apply_mask(sample_weight, masks[0] if masks else None, "float32", WEIGHTED)
    return (float(rows) if weights is None else total(weights)), ""


def total(values: Any) -> Any:
    return keras.ops.sum(keras.ops.cast(values, "float32"))


def uneven(kind: str, found: Sequence[tuple[float, float]], is_sum: bool) -> str:
    """Of a batch and its two parts, the loss and what it is divided by. Why the parts do not make the batch, or ""."""
    (whole, size), *rest = found
    pieces = [loss * (1.0 if is_sum else weight / max(size, 1e-30)) for loss, weight in rest]
    if abs(whole - sum(pieces)) <= TOLERANCE * max(abs(whole), sum(map(abs, pieces))) + 1e-6:
        return ""
    return (f"model.kind: the loss of {kind} is not a {'sum' if is_sum else 'mean'} over rows: over a batch it is "
            f"{whole:.6g}, and {sum(pieces):.6g} put together from its two parts, so shards would train it otherwise "
            f"than `fit`; {ONE_SHARD}.")


def parts(batch: Any, is_asked: bool) -> tuple[Any, Any, Any]:
    """(x, y, sample_weight); without a compiled loss x alone will do."""
    if not is_asked and (isinstance(batch, Mapping) or not isinstance(batch, (tuple, list)) or len(batch) == 1):
        return batch[0] if isinstance(batch, (tuple, list)) else batch, None, None
    if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 3:
        raise UserError("model.kind: a compiled Keras model trains on rows (x, y) or (x, y, sample_weight); let the "
                        "data set give them, or give the model a method batch_loss(batch).")
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


class Figures:
    """A model's metrics beside its loss: compiled ones, those of its outputs' losses, and metrics that its layers keep.
    """

    def __init__(self, model: keras.Model):
        self.metrics = [metric for metric in model.metrics if metric is not model._loss_tracker]
        rename([part for metric in self.metrics for part in getattr(metric, "metrics", [metric])])
        self.variables = [v for metric in self.metrics for v in metric.variables]
        self.initial = [np.array(v.numpy()) for v in self.variables]

    def values(self) -> list[tuple[Any, Any]]:
        """What the variables start from, for a scope."""
        return list(zip(self.variables, self.initial, strict=True))

    def change(self, current: Iterable[Any]) -> Any:
        """How far the variables have moved, as one float64 tensor."""
        moved = [tf.reshape(tf.cast(now, tf.float64) - first.astype(np.float64), (-1,))
                 for now, first in zip(current, self.initial, strict=True)]
        return tf.concat(moved, 0) if moved else tf.zeros(0, tf.float64)

    def check_adds_up(self, kind: str, both: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
        """UserError unless two batches after one another move the variables as far as each of them alone, added up."""
        at = 0
        for metric, variable in [(owner, v) for owner in self.metrics for v in owner.variables]:
            cut = slice(at, at + int(np.prod(variable.shape)))
            at = cut.stop
            if not np.allclose(both[cut], one[cut] + other[cut], rtol=1e-4, atol=1e-6, equal_nan=True):
                # of a list of metrics
                inner = (part for part in getattr(metric, "metrics", ()) if any(v is variable for v in part.variables))
                raise UserError(f"model.kind: the metric {next(inner, metric).name} of {kind} cannot be added up over "
                                "shards: what two batches make of its variables is not the sum of what each makes; "
                                "take it out of compile(metrics=...).")

    def results(self, moved: np.ndarray) -> dict[str, float]:
        """Each metric's own result, by the names that Keras tells them by; an array's entries are numbered."""
        values, at = [], 0
        for variable, first in self.values():
            value = first.astype(np.float64) + moved[at:at + first.size].reshape(first.shape)
            values.append((variable, (np.rint(value) if first.dtype.kind in "iu" else value).astype(first.dtype)))
            at += first.size
        found: dict[str, Any] = {}
        with keras.StatelessScope(values):
            for metric in self.metrics:
                result = metric.result()
                found |= result if isinstance(result, Mapping) else {metric.name: result}
        out: dict[str, float] = {}
        for name, value in found.items():
            array = np.asarray(value, np.float64)
            out |= {name: float(array.item())} if array.size == 1 else {f"{name}.{i}": float(x) for i, x in enumerate(array.reshape(-1))}
        return out


def rename(metrics: Iterable[Any]) -> None:
    """Keras numbers metrics without a name of their own by how many the process has made; here they are numbered within
    the model."""
    counts: Counter[str] = Counter()
    for metric in metrics:
        base = snake(type(metric).__name__)
        if re.fullmatch(rf"{base}(_\d+)?", metric.name):
            metric.name = f"{base}_{counts[base]}" if counts[base] else base
            counts[base] += 1


def snake(name: str) -> str:
    """A class's name as Keras makes an object's of it: "BatchNormalization" is "batch_normalization"."""
    name = re.sub(r"\W+", "", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z0-9]+)", r"\1_\2", name)).lower()


class MetricTally:
    """`elastic.model.tally.Tally` of `Figures`. Kept in two parts on grids, so that no order of adding up shows. The
    length of `counts` is known when the model has measured a batch.
    """

    def __init__(self, model: Any):
        self._model, self._parts = model, np.zeros(0)

    @property
    def counts(self) -> np.ndarray:
        figures = self._model.figures
        return self._parts if len(self._parts) or not figures else np.zeros(2 * sum(first.size for first in figures.initial))

    def add(self, batch: Any, found: Mapping[str, tuple[Any, float]]) -> None:
        if VARIABLES not in found:
            return
        value = np.atleast_1d(np.asarray(found[VARIABLES][0], np.float64))
        coarse = np.rint(value * COARSE) / COARSE
        parts = np.concatenate([coarse, np.rint((value - coarse) * FINE) / FINE])
        self._parts = parts if not len(self._parts) else self._parts + parts

    def figures(self, counts: np.ndarray, means: Mapping[str, float]) -> Mapping[str, float]:
        found = self._model.figures
        return found.results(counts.reshape(2, -1).sum(axis=0)) if found and len(counts) else {}
