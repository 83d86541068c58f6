"""Plain gradient descent of a small model: what it starts from, its rate, its batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from elastic.model.initial import initial_values

ROWS, LR = 6, 0.05
CLICKS = {"sizes": [5, 3, 7], "num_numeric": 4, "embedding_dim": 6}
IMAGES = {"shape": [8, 8, 2], "num_classes": 4}


def tokens(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"tokens": rng.integers(0, 11, (ROWS, 9)), "row_weight": np.ones(ROWS)}


def hidden(rng: np.random.Generator) -> dict[str, np.ndarray]:
    places = np.sort(np.argsort(rng.random((ROWS, 8)), 1)[:, :3], 1)
    return {"tokens": rng.integers(0, 12, (ROWS, 8)), "places": places, "targets": rng.integers(0, 11, (ROWS, 3)),
            "row_weight": np.ones(ROWS)}


def clicks(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"categorical": np.cumsum([0, 5, 3]) + rng.integers(0, (5, 3, 7), (ROWS, 3)),
            "numeric": rng.standard_normal((ROWS, 4)),
            "label": rng.integers(0, 2, ROWS).astype(np.float64), "row_weight": np.ones(ROWS)}


def images(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"image": rng.standard_normal((ROWS, 8, 8, 2)), "label": rng.integers(0, 4, ROWS),
            "row_weight": np.ones(ROWS)}


def start(specs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Starting values in float64, with enough spread that every part of a model matters."""
    values = initial_values(specs, 3, {})
    rng = np.random.default_rng(4)
    return {name: values[name].astype(np.float64) + 0.1 * rng.standard_normal(values[name].shape) ** 2
            for name in sorted(values)}
