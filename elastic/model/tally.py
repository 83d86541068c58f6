"""Figures of an evaluation that are no means over rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Tally(Protocol):
    """Figures that are no means over rows, as the area under a curve: computed from whole numbers, counted batch by
    batch.

    A model that has some offers `tally()`, which gives a new one. Whole numbers below 2^53 add up the same in any
    order.
    """

    @property
    def counts(self) -> np.ndarray:
        """float64, one-dimensional, always of the same length."""

    def add(self, batch: Mapping[str, np.ndarray], found: Mapping[str, tuple[Any, float]]) -> None:
        """Counts one batch; `found` is what `metrics` said of it, arrays as NumPy arrays."""

    def figures(self, counts: np.ndarray, means: Mapping[str, float]) -> Mapping[str, float]:
        """From the counts of all batches and the means of all metrics."""


def tally_of(model: Any) -> Tally | None:
    """A new one, of a model that counts; whoever brings one need not say that it does not."""
    return model.tally() if hasattr(model, "tally") else None
