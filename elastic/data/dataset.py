"""What the platform asks of a data set, and the adapter for a user's own map-style one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy, deepcopy
from functools import partial
from typing import Any, Protocol

import numpy as np

from elastic.data.collate import Collate, Collated, batch_of, sliced, stacked, unlike
from elastic.data.order import Order
from elastic.errors import ElasticError, RecipeError
from elastic.model.user_code import place_of

COLLATES = ("collate", "collater", "collator", "collate_batch", "batchify_fn")  # names that others give to a collate_fn


class Dataset(Protocol):
    """Samples by index. What a batch holds follows from its indices and epochs alone, so every worker has the same.

    `fills`: filler rows stay in the batch with weight 0, so shapes never change; else they are dropped. `order`: the
    one in which it is trained on; None for that of the run's seed. `key`: of a user's own, what tells it from others.
    """

    num_samples: int
    fills: bool = True
    order: Order | None = None
    key: str = ""

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Any:
        """Columns by name (a user's own may be a tuple), one row for each index; the epoch may vary what a sample looks
        like."""


class MapStyle(Dataset):
    """A user's data set with a length and items of any nesting of dicts, lists and tuples; or `part` of it.

    A batch is what `collate`, the framework's own, makes of the items, or the data set's own `collate_fn`. It holds
    real rows only, so the last one of a run may be shorter, down to none. What items draw at random, as to augment
    themselves, is a function of the run's seed and the batch's positions: they are loaded inside `seeded(number)`,
    which also keeps other threads from drawing, the one that trains above all. Only a data set that says `draws =
    False` is loaded while the model computes.
    """

    fills = False
    order: Order | None = None

    def __init__(self, source: Any, seed: int = 0, seeded: Callable[[int], AbstractContextManager[Any]] = nullcontext,
                 collate: Collate = stacked):
        if any(cls.__module__.startswith("keras.") and cls.__name__ == "PyDataset" for cls in type(source).__mro__):
            raise RecipeError(f"data.kind: {type(source).__name__} is a PyDataset of Keras', whose items are batches; "
                              "give a data set whose items are single rows, (x, y).")
        for method in ("__len__", "__getitem__"):
            if not hasattr(source, method):
                raise RecipeError(f"data.kind: {type(source).__name__} has no {method}; a data set needs a length and "
                                  "items by index.")
        own, key = getattr(source, "collate_fn", None), getattr(source, "key", None)
        other = next((name for name in COLLATES if callable(getattr(source, name, None))), None)
        if other and not callable(own):
            raise RecipeError(f"data.kind: {type(source).__name__} has a method {other}, which is not called; name it "
                              "collate_fn (a list of items in, a batch out), or take it out.")
        self.part = range(asked(source, "its length", lambda: len(source)))
        if not self.part:
            raise RecipeError(f"data.kind: {type(source).__name__} has no samples; give one with at least one.")
        self.source, self.seed, self.collate, self.own, self.num_samples = source, seed, collate, own, len(self.part)
        self.seeded = seeded if getattr(source, "draws", True) else nullcontext
        self.key = f"{self.num_samples} samples" + (f", key() = {asked(source, 'key()', key)!r}" if callable(key)
                                                    else "")

    def split(self, eval_fraction: float) -> tuple[MapStyle, MapStyle | None]:
        """The items to train on, and the last ones, to evaluate on, if there are any."""
        kept, parts = self.num_samples - int(self.num_samples * eval_fraction), (copy(self), copy(self))
        for one, part in zip(parts, (self.part[:kept], self.part[kept:])):
            one.part, one.num_samples = part, len(part)
        return parts[0], parts[1] if parts[1].part else None

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Any:
        """Users' mistakes are RecipeErrors that name the item, and the path within it or the line of code."""
        # with no rows, an item still tells columns and shapes
        chosen = [self.part[int(index)] for index in indices] or [self.part[0]]
        first = (int(epochs[0]), int(indices[0])) if len(epochs) else (0, 0)
        with self.seeded(batch_seed(self.seed, *first)):
            items = [asked(self.source, f"item {number}", partial(self.source.__getitem__, number))
                     for number in chosen]
            for item, number in zip(items, chosen, strict=True):
                if not self.own and not isinstance(item, (Mapping, tuple, list)):
                    raise RecipeError(f"data.kind: item {number} is a {type(item).__name__}; give a dict or a tuple of "
                                      "arrays.")
            if self.own:
                some = ", ".join(map(str, chosen[:3])) + ", ..." * (len(chosen) > 3)
                made = asked(self.source, f"collate_fn for items {some}", partial(self.own, items))
                if made is None:
                    raise RecipeError(f"data.kind: collate_fn of {type(self.source).__name__} gives None for items "
                                      f"{some}; let it return the batch.")
                return Collated(made, len(indices))
            batch = batch_of(items, chosen, self.collate)
        return batch if len(indices) else sliced(batch, 0, 0)

    def check_repeats(self, indices: np.ndarray, epochs: np.ndarray) -> None:
        """RecipeError where the same rows are something else when they are asked for again: so would they be on another
        worker; and where a batch changes that was given before: the next are loaded while it is trained on."""
        one = kept = self.batch(indices, epochs)
        if self.own:  # else it is a copy
            with suppress(Exception):  # what cannot be copied is not looked at
                kept = deepcopy(one)
            self.batch((indices + 1) % self.num_samples, epochs)
            if path := unlike("batch", kept, one):
                raise RecipeError(f"data.kind: the collate_fn of {type(self.source).__name__} writes into a batch that "
                                  f"it gave before ({path}), and batches are loaded ahead; give new arrays each time.")
        if path := unlike("batch", kept, self.batch(indices, epochs)):
            raise RecipeError(f"data.kind: {type(self.source).__name__} gives something else when the same items are "
                              f"asked for again ({path}): it draws from a generator of its own, counts, or writes into "
                              "what it keeps; draw from numpy.random or random (or torch's default generator, on "
                              "torch), which are seeded for every batch, and give copies.")


def asked(source: Any, what: str, ask: Callable[[], Any]) -> Any:
    """What the user's own code gives; RecipeError with the file and line where it fails."""
    try:
        return ask()
    except ElasticError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise RecipeError(f"data.kind: {what} of {type(source).__name__} cannot be had: "
                          f"{type(error).__name__}{': ' * bool(text)}{text}{place_of(error)}; mend the data set.") from error


def batch_seed(seed: int, epoch: int, index: int) -> int:
    """For the batch that begins with this sample in this epoch; no batch of another epoch has the same."""
    return int(np.random.SeedSequence([seed, epoch, index, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))
