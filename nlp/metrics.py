"""What a language model is trained and judged by, as sums over places in rows that add up over shards."""

from __future__ import annotations

from typing import Any

import numpy as np

from elastic.model.layers import smoothed

Array = Any


def weights_of(ops: Any, row_weight: Array, places: int) -> Array:
    """(rows, places): those of the rows."""
    return ops.multiply(ops.reshape(row_weight, (row_weight.shape[0], 1)), ops.constant(np.ones((1, places))))


def loss_of(ops: Any, logits: Array, targets: Array, weights: Array, vocab_size: int,
            smoothing: float = 0.0) -> tuple[Array, Array]:
    """The summed cross-entropy of logits (rows, places, vocab), whose last dim may be split, and the number of places
    in real rows."""
    total = ops.cross_entropy(logits, targets, weights, "vocab", vocab_size)
    if smoothing:
        total = smoothed(ops, total, ops.collect(logits, "vocab", vocab_size), weights, smoothing)
    return total, ops.sum(weights)
