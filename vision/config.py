"""What the configurations of all image models share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from elastic.model.backend import Spec

BIASES = ("zeros", "mean")
LEAST_COUNT = 0.5  # of images of a class, that a logarithm stands for


def head_bias(config: Any, num_classes: int, counts: Sequence[int]) -> Spec:
    """Of the logits: zeros, or with `bias_init` "mean" the logarithms of the classes' shares of the training images."""
    if config.bias_init == "zeros" or not counts:
        return Spec((num_classes,), ("classes",), "zeros")
    return Spec((num_classes,), ("classes",), "values", values=tuple(math.log(max(count, LEAST_COUNT) / sum(counts)) for count in counts))
