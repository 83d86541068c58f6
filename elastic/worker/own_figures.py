"""What each member says of what is its own, and how all that is said is put together: a vote carries no figure twice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class OwnFigures:
    """Of numbered things (logical shards, buckets), each has one owner: `owners` by number, of `size` members."""

    owners: np.ndarray
    size: int

    @cached_property
    def places(self) -> np.ndarray:
        """(size, most): each member's numbers, ascending; where it has fewer than others, the count of all."""
        counts = np.bincount(self.owners, minlength=self.size)
        places = np.full((self.size, counts.max(initial=0)), len(self.owners))
        places[np.arange(places.shape[1]) < counts[:, None]] = np.argsort(self.owners, kind="stable")
        return places

    @property
    def length(self) -> int:
        """How many figures each gives."""
        return self.places.shape[1]

    def of(self, member: int, figures: np.ndarray) -> np.ndarray:
        """A member's own of all things' figures, filled up with 0."""
        return np.append(figures, 0.0)[self.places[member]]

    def together(self, said: np.ndarray) -> np.ndarray:
        """All things' figures, float64, of what each of several times `size` members said, (members, length): a run of
        neighbours has one owner's place, and what they say is added in their order."""
        places = np.repeat(self.places, len(said) // self.size, axis=0)
        count = len(self.owners)
        return np.bincount(places.ravel(), said.ravel(), count + 1)[:count]
