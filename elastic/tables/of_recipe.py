"""A run's tables, by its recipe and its data's facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from elastic.errors import RecipeError
from elastic.recipe import Recipe
from elastic.recipe.embedding import TableSection
from elastic.tables.features import Feature, Tables
from elastic.tables.placing import Place, placed
from elastic.tables.spec import RowUpdate, TableSpec


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
    check_disk(recipe, specs)
    return Tables(specs, features, {name: update_of(recipe, section) for name, section in sections.items()},
                  recipe.embedding.twin, int(recipe.embedding.memory_gb * 1e9), kernels, int(recipe.embedding.move_mb * 1e6),
                  recipe.embedding.look_ahead, recipe.embedding.disk_path)


def check_disk(recipe: Recipe, specs: Sequence[TableSpec]) -> None:
    """RecipeError where no row could lie on disk."""
    given = f'embedding.disk_path = "{recipe.embedding.disk_path}"'
    if recipe.embedding.disk_path and recipe.backend.name == "reference":
        raise RecipeError(f'{given} is not for backend.name = "reference", whose rows stay in memory; leave it out.')
    if recipe.embedding.disk_path and all(spec.vocabulary for spec in specs):
        raise RecipeError(f"{given} is for tables that grow, and {specs[0].name} has a vocabulary, all of whose rows stay "
                          "in memory; leave it out.")


def spec_of(recipe: Recipe, place: Place, section: TableSection) -> TableSpec:
    return TableSpec(place.name, place.width, section.optimizer, place.init or f"normal:{1 / math.sqrt(place.width)}",
                     recipe.run.seed, recipe.embedding.buckets, place.vocabulary, section.admit, section.ttl_steps,
                     section.max_rows)


def update_of(recipe: Recipe, section: TableSection) -> RowUpdate:
    optimizer = recipe.optimizer
    factor = recipe.data.batch_size / optimizer.base_batch if optimizer.base_batch else 1.0
    lr = (optimizer.lr if section.lr is None else section.lr) * factor
    return RowUpdate(lr, 1.0, section.weight_decay, optimizer.beta1, optimizer.beta2, optimizer.eps)
