"""What models of several domains share, written in ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = Any
Layer = Callable[[Mapping[str, Array], Array, str], Array]


def one_layer(ops: Any, layer: Layer, params: Mapping[str, Array], name: str, x: Array, recompute: bool) -> Array:
    """`layer(params, x, name)`, which reads the parameters called NAME.* alone; with `recompute`, of its results only the last is kept."""
    if not recompute:
        return layer(params, x, name)
    own = [key for key in params if key.startswith(f"{name}.")]

    def function(x: Array, *weights: Array) -> Array:
        return layer(dict(zip(own, weights)), x, name)

    return ops.recompute(function, x, *(params[key] for key in own))


def smoothed(ops: Any, total: Array, logits: Array, weights: Array, smoothing: float) -> Array:
    """`total`, the weighted cross-entropy of logits (..., classes) with weights (...), with smoothing / classes of the target for every class.

    Szegedy et al. 2016, section 7.
    """
    if not smoothing:
        return total
    *lead, num_classes = logits.shape
    even = ops.multiply(ops.reshape(weights, (*lead, 1)), ops.constant(np.full((1, num_classes), -smoothing / num_classes)))
    return ops.add(ops.multiply(total, ops.constant(1.0 - smoothing)), ops.sum(ops.multiply(ops.log_softmax(logits), even)))
