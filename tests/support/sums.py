"""What a sum of shards must be: a recursion in NumPy that knows nothing of members."""

from __future__ import annotations

import math

import numpy as np


def leaves_of(num_shards: int, numel: int) -> np.ndarray:
    """Random float32 over 30 orders of magnitude, either sign, with zeros of either sign."""
    random = np.random.default_rng(num_shards)
    values = random.choice([-1.0, 1.0], (num_shards, numel)) * 10.0 ** random.uniform(-15, 15, (num_shards, numel))
    values[random.random((num_shards, numel)) < 0.1] = -0.0
    return values.astype(np.float32)


def tree(leaves: np.ndarray) -> np.ndarray:
    """The definition: a leaf is 0 + value; left part + right part, the left one the largest power of two that is
    shorter."""
    if len(leaves) == 1:
        return np.float32(0) + leaves[0]
    left = 2 ** (math.ceil(math.log2(len(leaves))) - 1)
    return tree(leaves[:left]) + tree(leaves[left:])
