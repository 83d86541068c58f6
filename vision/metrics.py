"""What a classifier of images starts from, and is trained and judged by: sums over rows, that add up over shards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from elastic.model.backend import Spec
from elastic.model.layers import smoothed

Array = Any
TOP = 5
BIASES = ("zeros", "mean")
LEAST_COUNT = 0.5  # of images of a class, that a logarithm stands for


def head_bias(config: Any, num_classes: int, counts: Sequence[int]) -> Spec:
    """Of the logits: zeros, or with `bias_init` "mean" the logarithms of the classes' shares of the training images."""
    if config.bias_init == "zeros" or not counts:
        return Spec((num_classes,), ("classes",), "zeros")
    return Spec((num_classes,), ("classes",), "values",
                values=tuple(math.log(max(count, LEAST_COUNT) / sum(counts)) for count in counts))


def loss_of(ops: Any, logits: Array, batch: Mapping[str, Array], smoothing: float) -> tuple[Array, Array]:
    """The summed cross-entropy of (rows, classes) and the number of real rows.

    A batch has "label" (rows,) and "row_weight" (rows,); where rows were mixed up, "label2" and "mix", the first
    label's part.
    """
    weights = batch["row_weight"]
    if "mix" in batch:
        first = ops.multiply(weights, batch["mix"])
        second = ops.subtract(weights, first)
        total = ops.add(ops.cross_entropy(logits, batch["label"], first),
                        ops.cross_entropy(logits, batch["label2"], second))
    else:
        total = ops.cross_entropy(logits, batch["label"], weights)
    return smoothed(ops, total, logits, weights, smoothing), ops.sum(weights)


def scores_of(ops: Any, logits: Array, batch: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """loss (not smoothed), accuracy and, of more than five classes, top5: each a sum and the number of real rows."""
    weights, labels = batch["row_weight"], batch["label"]
    count = ops.sum(weights)
    out = {"loss": (ops.cross_entropy(logits, labels, weights), count),
           "accuracy": (ops.correct(logits, labels, weights), count)}
    if logits.shape[-1] > TOP:
        out["top5"] = (ops.correct(logits, labels, weights, TOP), count)
    return out
