"""What a run's tables are: their specs, the features that look them up, and the numbers of their optimizers. From the recipe alone.

A batch of a data set with tables has, under BAGS, what each feature looks up; a worker puts what was looked up in its
place under ROWS, and a backend gives back the slopes of the loss by the same names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.recipe import Recipe
from elastic.recipe.embedding import TableSection
from elastic.tables.placing import Place, placed
from elastic.tables.spec import RowUpdate, TableSpec

BAGS, ROWS = "bags", "rows"  # keys of a batch: {feature: Bags}, {feature: float32 array}


@dataclass(frozen=True)
class Feature:
    """One thing that a model looks up: a column of the data. `length`: rows of a list that is not pooled."""

    name: str
    table: str
    pooling: str = "sum"
    length: int = 1


@dataclass(frozen=True)
class Tables:
    """`specs` and `features` in the order of their names; `updates` by table, with the rate that the schedule scales
    and a scale of 1. All tables have as many buckets. `twin`: every bucket has a second keeper. `memory_bytes`: what
    all tables of a worker may take together; 0 is no limit. `kernels`: "numba" or "reference".
    """

    specs: tuple[TableSpec, ...]
    features: tuple[Feature, ...]
    updates: Mapping[str, RowUpdate]
    twin: bool = True
    memory_bytes: int = 0
    kernels: str = "numba"

    @property
    def num_buckets(self) -> int:
        return self.specs[0].num_buckets

    def zeros(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with zeros in the place of what its features look up."""
        widths = {spec.name: spec.width for spec in self.specs}
        rows = {one.name: np.zeros(batch[BAGS][one.name].shape(widths[one.table]), np.float32) for one in self.features}
        return {**{name: column for name, column in batch.items() if name != BAGS}, ROWS: rows}

    def by_table(self) -> dict[str, tuple[Feature, ...]]:
        """The features of each table, in order."""
        return {spec.name: tuple(one for one in self.features if one.table == spec.name) for spec in self.specs}


def tables_of(recipe: Recipe, info: Mapping[str, Any]) -> Tables | None:
    """The tables of a run, by its recipe and its data's facts; None where it has none. RecipeError where a key cannot
    serve.

    A table's rate is its own `lr`, or optimizer.lr, by optimizer.base_batch as that is; its other numbers are those of
    [optimizer].
    """
    found = placed(info)
    if found is None:
        return None
    sections = {place.name: recipe.tables.get(place.like, TableSection()) for place in found.places}
    specs = tuple(spec_of(recipe, place, sections[place.name])
                  for place in sorted(found.places, key=lambda place: place.name))
    features = tuple(Feature(look.name, look.table, look.pooling, look.length)
                     for look in sorted(found.looks, key=lambda look: look.name))
    kernels = "reference" if recipe.backend.name == "reference" else "numba"
    return Tables(specs, features, {name: update_of(recipe, section) for name, section in sections.items()},
                  recipe.embedding.twin, int(recipe.embedding.memory_gb * 1e9), kernels)


def spec_of(recipe: Recipe, place: Place, section: TableSection) -> TableSpec:
    return TableSpec(place.name, place.width, section.optimizer, place.init or f"normal:{1 / math.sqrt(place.width)}",
                     recipe.run.seed, recipe.embedding.buckets, place.vocabulary, section.admit, section.ttl_steps,
                     section.max_rows)


def update_of(recipe: Recipe, section: TableSection) -> RowUpdate:
    optimizer = recipe.optimizer
    factor = recipe.data.batch_size / optimizer.base_batch if optimizer.base_batch else 1.0
    lr = (optimizer.lr if section.lr is None else section.lr) * factor
    return RowUpdate(lr, 1.0, section.weight_decay, optimizer.beta1, optimizer.beta2, optimizer.eps)
