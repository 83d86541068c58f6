"""The values that arrays start from, the same for every framework and layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from elastic.model.backend import Spec

START: dict[str, Callable[[Spec, np.random.Generator], np.ndarray]] = {
    "zeros": lambda spec, generator: np.zeros(spec.shape),
    "ones": lambda spec, generator: np.ones(spec.shape),
    "normal": lambda spec, generator: generator.standard_normal(spec.shape) * spec.scale,
    "uniform": lambda spec, generator: generator.uniform(-spec.scale, spec.scale, spec.shape),
    "values": lambda spec, generator: np.reshape(spec.values, spec.shape),
}


def initial_values(specs: Mapping[str, Spec], seed: int, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Starting values of whole arrays from a counter-based generator keyed by (seed, name): the same for every
    framework and layout."""
    values = {}
    for name, spec in specs.items():
        if spec.init == "given":
            values[name] = np.asarray(given[name])
            continue
        key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        values[name] = START[spec.init](spec, generator).astype(spec.dtype)
    return values
