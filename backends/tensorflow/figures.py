"""The metrics of a compiled Keras model: what a batch adds to their variables is added up, and each one's own `result()` is told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from backends.tensorflow.ops import tf

# isort: split
import keras

from elastic.errors import UserError

VARIABLES = "metric variables"  # one array, among what a model's metrics give
COARSE, FINE = 2.0 ** 10, 2.0 ** 52  # grids on which sums of float64 are exact, whatever their order


class Figures:
    """A model's metrics beside its loss: compiled ones, those of its outputs' losses, and metrics that its layers keep."""

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
        moved = [tf.reshape(tf.cast(now, tf.float64) - first.astype(np.float64), (-1,)) for now, first in zip(current, self.initial, strict=True)]
        return tf.concat(moved, 0) if moved else tf.zeros(0, tf.float64)

    def check_adds_up(self, kind: str, both: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
        """UserError unless two batches after one another move the variables as far as each of them alone, added up."""
        at = 0
        for metric in self.metrics:
            size = sum(int(np.prod(v.shape)) for v in metric.variables)
            cut = slice(at, at + size)
            at += size
            if not np.allclose(both[cut], one[cut] + other[cut], rtol=1e-4, atol=1e-6, equal_nan=True):
                raise UserError(f"model.kind: the metric {self.name_of(metric, cut, both, one + other)} of {kind} cannot be added up over shards: "
                                "what two batches make of its variables is not the sum of what each makes; take it out of compile(metrics=...).")

    def name_of(self, metric: Any, cut: slice, both: np.ndarray, added: np.ndarray) -> str:
        """Of a list of metrics, the one that differs."""
        at = cut.start
        for part in getattr(metric, "metrics", [metric]):
            size = sum(int(np.prod(v.shape)) for v in part.variables)
            if not np.allclose(both[at:at + size], added[at:at + size], rtol=1e-4, atol=1e-6, equal_nan=True):
                return str(part.name)
            at += size
        return str(metric.name)

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
    """Keras numbers metrics without a name of their own by how many the process has made; here they are numbered within the model."""
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
    """`elastic.model.backend.Tally` of `Figures`. Kept in two parts on grids, so that no order of adding up shows. The length of `counts` is known
    when the model has measured a batch.
    """

    def __init__(self, model: Any):
        self._model, self._parts = model, np.zeros(0)

    @property
    def counts(self) -> np.ndarray:
        return self._parts if len(self._parts) else np.zeros(2 * self._model.num_values)

    def add(self, batch: Any, found: Mapping[str, tuple[Any, float]]) -> None:
        if VARIABLES not in found:
            return
        value = np.atleast_1d(np.asarray(found[VARIABLES][0], np.float64))
        coarse = np.rint(value * COARSE) / COARSE
        parts = np.concatenate([coarse, np.rint((value - coarse) * FINE) / FINE])
        self._parts = parts if not len(self._parts) else self._parts + parts

    def figures(self, counts: np.ndarray, means: Mapping[str, float]) -> Mapping[str, float]:
        return self._model.results(counts.reshape(2, -1).sum(axis=0)) if len(counts) else {}
