"""What the data's facts say of tables: which there are, how wide, and what each feature looks up in them. Plain values, as facts are.

A data door writes them (`Placed.facts`) once it knows its columns; everybody else reads them (`placed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from elastic.data.jagged import Jagged
from elastic.errors import RecipeError
from elastic.recipe.embedding import TableSection, width_of
from elastic.tables.bags import Bags

LINEAR = ".linear"  # at the end of a name: a table of single weights beside one of vectors, and its features


@dataclass(frozen=True)
class Place:
    """A table. `like`: the section [tables.LIKE] that says the rest of it; "" for its defaults. `init` "" is
    normal:1/sqrt(width)."""

    name: str
    like: str
    width: int
    init: str = ""
    vocabulary: int = 0


@dataclass(frozen=True)
class Look:
    """A feature: the values of `column`, plus `shift`, are the ids that it looks up."""

    name: str
    table: str
    column: str
    pooling: str = "sum"
    length: int = 1
    shift: int = 0

    def bags(self, values: np.ndarray | Jagged) -> Bags:
        """(rows,) is one id a row, (rows, k) k of them."""
        if isinstance(values, Jagged):
            ids, offsets = values.flat, values.offsets - values.offsets[0]
        else:
            ids, offsets = values.reshape(-1), np.arange(len(values) + 1) * (values.size // max(1, len(values)))
        ids = ids.astype(np.int64, copy=False)
        return Bags(ids + self.shift if self.shift else ids, offsets.astype(np.int64, copy=False), None, self.pooling,
                    self.length)


@dataclass(frozen=True)
class Placed:
    """`dense`: of columns that may be either, the numbers of those that stay a dense embedding."""

    places: tuple[Place, ...]
    looks: tuple[Look, ...]
    dense: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [look.name for look in self.looks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise RecipeError(f'tables: two features are called "{twice}", for a column\'s single weights are called '
                              f'"COLUMN{LINEAR}"; rename the column.')

    @property
    def facts(self) -> dict[str, Any]:
        """For the data's facts, under "placed"."""
        return {"places": [asdict(place) for place in self.places], "looks": [asdict(look) for look in self.looks],
                "dense": list(self.dense)}

    @property
    def keys(self) -> dict[str, str]:
        """The columns, each with the key that names it."""
        return {look.column: key_of(look.table.removesuffix(LINEAR)) for look in self.looks}

    def width(self, look: Look) -> int:
        return next(place.width for place in self.places if place.name == look.table)


def key_of(table: str) -> str:
    return f"tables.{table}.columns"


def placed(info: Mapping[str, Any]) -> Placed | None:
    """What the data's facts say; None where there are no tables."""
    if "placed" not in info:
        return None
    said = info["placed"]
    return Placed(tuple(Place(**place) for place in said["places"]), tuple(Look(**look) for look in said["looks"]),
                  tuple(said["dense"]))


def looks_of(name: str, table: TableSection, columns: Sequence[str]) -> list[Look]:
    return [Look(column, name, column, table.pooling, table.length) for column in columns]


def own_places(recipe: Any) -> Placed:
    """Of models of one's own: every table as the recipe has it, a feature for every column."""
    places = [Place(name, name, width_of(recipe.data, table), table.init) for name, table in recipe.tables.items()]
    looks = [look for name, table in recipe.tables.items() for look in looks_of(name, table, table.columns)]
    return Placed(tuple(places), tuple(looks))
