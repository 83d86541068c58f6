"""What a run's tables are: their specs, the features that look them up, and the numbers of their optimizers. Plain values; `of_recipe` makes them.

A batch of a data set with tables has, under BAGS, what each feature looks up; a worker puts what was looked up in its
place under ROWS, and a backend gives back the slopes of the loss by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from elastic.model.backend import ROWS
from elastic.tables.spec import RowUpdate, TableSpec

BAGS = "bags"  # the key of a batch under which lies {feature: Bags}


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
    all tables of a worker may take together; 0 is no limit. `move_bytes`: what a worker sends or gets at a time while
    buckets move, or one bucket. `kernels`: "numba" or "reference". `look_ahead`: how many steps before its own a lookup is
    asked for; 0: at its step. `disk_path`: a folder for the rows that memory has no room for; "" for none.
    """

    specs: tuple[TableSpec, ...]
    features: tuple[Feature, ...]
    updates: Mapping[str, RowUpdate]
    twin: bool = True
    memory_bytes: int = 0
    kernels: str = "numba"
    move_bytes: int = 64_000_000
    look_ahead: int = 0
    disk_path: str = ""

    @property
    def num_buckets(self) -> int:
        return self.specs[0].num_buckets

    @cached_property
    def by_table(self) -> dict[str, tuple[Feature, ...]]:
        """The features of each table, in order."""
        return {spec.name: tuple(one for one in self.features if one.table == spec.name) for spec in self.specs}


def answered(batch: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with what its features have looked up in the place of its bags."""
    return {**{name: column for name, column in batch.items() if name != BAGS}, ROWS: rows}
