"""Which columns are dense embeddings, and which lie in tables whose rows are on workers.

A column of data.categorical has a vocabulary. Named in [tables.NAME] too, its rows lie in that table; else data.tables
says where they lie: "dense", all in one parameter on every worker; "rows", all in one table called `embedding`; "auto",
the first as long as their vocabularies have at most `MOST_DENSE` rows together, the second beyond. A column that
[tables.NAME] alone names has no vocabulary, and its table grows.

Under model.arch = "mf" every table of vectors has one of single weights beside it, NAME.linear, which starts from
zeros; under "lr" tables hold single weights only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from elastic.errors import RecipeError
from elastic.model import config as checks
from elastic.recipe.embedding import TableSection, width_of
from elastic.tables.placing import LINEAR, Look, Place, Placed, key_of, looks_of
from recommender.dlrm import Config

MOST_DENSE = 1 << 20  # rows: beyond, gradients and optimizer state of them all weigh more than a step's other work
ALL = "embedding"  # the table that data.tables = "rows" makes


def growing(data: Any, tables: Mapping[str, TableSection]) -> dict[str, str]:
    """The columns without a vocabulary, each with the key that names it."""
    return {column: key_of(name) for name, table in tables.items() for column in table.columns
            if column not in data.categorical}


def place(data: Any, model_config: Mapping[str, Any], tables: Mapping[str, TableSection], is_free: bool,
          sizes: Sequence[int]) -> tuple[Placed | None, list[str]]:
    """Where all lies, None where nothing does in tables, and a line where that was left to sizes. `sizes`: rows of each
    column of data.categorical; `is_free`: whether the recipe lets tables be."""
    config = checks.read("recommender.dlrm", Config, model_config)
    named = {column for table in tables.values() for column in table.columns}
    rest = [column for column in data.categorical if column not in named]
    total = sum(size for column, size in zip(data.categorical, sizes) if column in rest)
    is_large = data.tables == "auto" and is_free and total > MOST_DENSE
    if not tables and data.tables != "rows" and not is_large:
        return None, []
    taken = {name: (table, list(table.columns)) for name, table in tables.items()}
    dense = [number for number, column in enumerate(data.categorical) if column in rest]
    if rest and (data.tables == "rows" or is_large):
        if ALL in tables:
            raise RecipeError(f'[tables.{ALL}] has the name of the table that data.tables = "rows" makes of the other '
                              "columns of data.categorical; give it another name.")
        taken[ALL], dense = (TableSection(), rest), []
    starts = dict(zip(data.categorical, accumulate(sizes, initial=0)))
    places, looks = [], []
    for name, (table, columns) in taken.items():
        of_name = place_table(data, config, name, table, columns, dict(zip(data.categorical, sizes)), starts)
        places += of_name[0]
        looks += of_name[1]
    notes = [f'data.tables = "auto" is "rows": the columns of data.categorical have {total} rows together, and up to '
             f"{MOST_DENSE} stay a dense embedding on every worker."] if is_large else []
    return Placed(tuple(places), tuple(looks), tuple(dense)), notes


def place_table(data: Any, config: Config, name: str, table: TableSection, columns: Sequence[str],
                sizes: Mapping[str, int], starts: Mapping[str, int]) -> tuple[list[Place], list[Look]]:
    """A table and the features that look it up."""
    known = [column for column in columns if column in sizes]
    if known and len(known) < len(columns):
        other = next(column for column in columns if column not in sizes)
        raise RecipeError(f'tables.{name}.columns names "{known[0]}", which is among data.categorical and has a '
                          f'vocabulary, and "{other}", which has none; leave "{known[0]}" out of data.categorical, or '
                          "name it in another table.")
    vocabulary, shifts = 0, dict.fromkeys(columns, 0)
    for column in known:
        shifts[column] = vocabulary - starts[column]
        vocabulary += sizes[column]
    looks = [Look(look.name, look.table, look.column, look.pooling, look.length, shifts[look.column])
             for look in looks_of(name, table, columns)]
    like, width = name if table.columns else "", width_of(data, table)
    if config.arch == "lr":
        if table.width not in (None, 1):
            raise RecipeError(f'tables.{name}.width = {table.width} has no meaning under model.arch = "lr", whose rows '
                              "are single weights; leave it out.")
        return [Place(name, like, 1, table.init or "zeros", vocabulary)], looks
    if config.arch in ("dlrm", "mf") and width != width_of(data, TableSection()):
        raise RecipeError(f"tables.{name}.width = {width} differs from data.embedding_dim = "
                          f'{width_of(data, TableSection())}, and model.arch = "{config.arch}" multiplies the vectors '
                          "of columns with each other; leave it out, and set data.embedding_dim.")
    kind, scale = config.embedding_start(width)
    places = [Place(name, like, width, table.init or (f"{kind}:{scale}" if scale else "zeros"), vocabulary)]
    if config.arch == "mf":
        places.append(Place(name + LINEAR, like, 1, "zeros", vocabulary))
        looks += [Look(look.column + LINEAR, name + LINEAR, look.column, look.pooling, look.length, look.shift)
                  for look in looks]
    return places, looks
