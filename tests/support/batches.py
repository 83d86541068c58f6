"""Batches of numbers made up for the models of each domain, by the model's own shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Batches:
    """Of so many rows; tokens below `vocab`."""

    rows: int
    vocab: int

    def text(self, model: Any) -> Columns:
        return self.weighted(tokens=np.random.default_rng(0).integers(0, self.vocab,
                                                                      (self.rows, model.config.context + 1)))

    def hidden(self, model: Any) -> Columns:
        draw, context = np.random.default_rng(0), model.config.context
        return self.weighted(tokens=draw.integers(0, self.vocab, (self.rows, context)),
                             places=draw.integers(0, context, (self.rows, 5)),
                             targets=draw.integers(0, self.vocab, (self.rows, 5)))

    def images(self, model: Any) -> Columns:
        draw = np.random.default_rng(0)
        return self.weighted(image=draw.random((self.rows, *model.shape), np.float32),
                             label=draw.integers(0, 10, self.rows))

    def clicks(self, model: Any) -> Columns:
        draw = np.random.default_rng(0)
        return self.weighted(categorical=draw.integers(0, 20, (self.rows, 3)),
                             numeric=draw.random((self.rows, 4), np.float32),
                             label=draw.integers(0, 2, self.rows).astype(np.float32))

    def weighted(self, **columns: np.ndarray) -> Columns:
        return {**columns, "row_weight": np.ones(self.rows, np.float32)}
