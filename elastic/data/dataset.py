"""What the platform asks of a data set, and the adapter for a user's own map-style one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from elastic.errors import RecipeError


class Dataset(Protocol):
    """Samples by index. `fills`: filler rows stay in the batch with weight 0, so shapes never change; else they are dropped."""

    num_samples: int
    fills: bool

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Any:
        """Columns by name (a user's own may be a tuple), one row for each index; the epoch may vary what a sample looks like."""


class MapStyle:
    """A user's data set with a length and items that are dicts or tuples of arrays or numbers.

    A batch is what an item is, a dict or a tuple, with the items stacked along a new first axis. It holds real rows only, so
    the last one of a run may be shorter, down to none. What items draw at random, as to augment themselves, is a function of the
    run's seed and the batch's positions: they are loaded inside `seeded(number)`, which also keeps other threads from drawing,
    the one that trains above all. Only a data set that says `draws = False` is loaded while the model computes.
    """

    fills = False

    def __init__(self, source: Any, seed: int = 0, seeded: Callable[[int], AbstractContextManager[Any]] = nullcontext):
        self.source, self.seed = source, seed
        self.seeded = seeded if getattr(source, "draws", True) else no_seed
        for method in ("__len__", "__getitem__"):
            if not hasattr(source, method):
                raise RecipeError(f"data.kind: {type(source).__name__} has no {method}; a data set needs a length and items by index.")
        self.num_samples = len(source)
        if self.num_samples < 1:
            raise RecipeError(f"data.kind: {type(source).__name__} has no samples; give one with at least one.")

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray] | tuple[np.ndarray, ...]:
        chosen = [int(index) for index in indices] or [0]  # with no rows, item 0 still tells columns and shapes
        first = (int(epochs[0]), chosen[0]) if len(epochs) else (0, 0)
        with self.seeded(batch_seed(self.seed, *first)):
            kind, items = self._items(chosen)
        columns = {name: np.stack([item[name] for item in items])[:len(indices)] for name in items[0]}
        return columns if kind is dict else tuple(columns.values())

    def _items(self, indices: list[int]) -> tuple[type, list[dict[Any, np.ndarray]]]:
        kinds, items = [], []
        for index in indices:
            item = self.source[index]
            kinds.append(dict if isinstance(item, Mapping) else tuple)
            if not isinstance(item, (Mapping, tuple, list)):
                raise RecipeError(f"data.kind: item {index} is a {type(item).__name__}; give a dict or a tuple of arrays.")
            named = item.items() if isinstance(item, Mapping) else enumerate(item)
            items.append({name: np.asarray(value) for name, value in named})
            found, first = ({name: value.shape for name, value in items[n].items()} for n in (-1, 0))
            if found != first:
                raise RecipeError(f"data.kind: item {index} has columns {found}, item {indices[0]} has {first}; "
                                  "give every item the same columns and shapes.")
        return kinds[0], items


def no_seed(number: int) -> AbstractContextManager[Any]:
    return nullcontext()


def batch_seed(seed: int, epoch: int, index: int) -> int:
    """For the batch that begins with this sample in this epoch; no batch of another epoch has the same."""
    return int(np.random.SeedSequence([seed, epoch, index, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))
