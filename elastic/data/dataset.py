"""What the platform asks of a data set, and the adapter for a user's own map-style one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from elastic.errors import RecipeError


class Dataset(Protocol):
    """Samples by index. `fills`: filler rows stay in the batch with weight 0, so shapes never change; else they are dropped."""

    num_samples: int
    fills: bool

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Columns by name, one row for each index; the epoch may vary what a sample looks like (augmentation, offsets)."""


class MapStyle:
    """A user's data set with a length and items that are dicts or tuples of arrays or numbers.

    The items of a batch are stacked per key; a tuple's columns are named "0", "1" and so on. Batches hold real rows only, so the
    last one of a run may be shorter, down to none.
    """

    fills = False

    def __init__(self, source: Any):
        self.source = source
        for method in ("__len__", "__getitem__"):
            if not hasattr(source, method):
                raise RecipeError(f"data.kind: {type(source).__name__} has no {method}; a data set needs a length and items by index.")
        self.num_samples = len(source)
        if self.num_samples < 1:
            raise RecipeError(f"data.kind: {type(source).__name__} has no samples; give one with at least one.")

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        items = [self._columns(int(index)) for index in indices]
        if not items:
            return {name: np.stack([value])[:0] for name, value in self._columns(0).items()}
        return {name: self._stack(name, items, indices) for name in items[0]}

    def _columns(self, index: int) -> dict[str, np.ndarray]:
        item = self.source[index]
        if isinstance(item, (tuple, list)):
            item = {str(number): value for number, value in enumerate(item)}
        if not isinstance(item, Mapping):
            raise RecipeError(f"data.kind: item {index} is a {type(item).__name__}; give a dict or a tuple of arrays.")
        return {name: np.asarray(value) for name, value in item.items()}

    @staticmethod
    def _stack(name: str, items: list[dict[str, np.ndarray]], indices: np.ndarray) -> np.ndarray:
        for item, index in zip(items, indices, strict=True):
            found = item[name].shape if name in item else None
            if found != items[0][name].shape:
                raise RecipeError(f"data.kind: {name!r} of item {int(index)} has shape {found}, that of item {int(indices[0])} "
                                  f"{items[0][name].shape}; give every item the same columns and shapes.")
        return np.stack([item[name] for item in items])
