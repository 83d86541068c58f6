"""Embedding tables: `[tables.NAME]` and `[embedding]`, and what must hold between them and the other sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat

from elastic.errors import RecipeError
from elastic.recipe.fields import NAMES, Section, Texts, at_least, refuse_given, shown

TableName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]{0,99}$")]
CHANGEABLE = ("lr", "weight_decay", "admit", "ttl_steps", "max_rows")  # of a table, when a run is resumed
DEFAULT_WIDTH = 16  # where neither the table nor data.embedding_dim says one


def power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("no power of two")
    return value


class TableSection(Section):
    """A table whose rows lie on workers, and the columns whose values are looked up in it. A width, a rate or a start
    that is left out is that of the dense embeddings: see `width_of`, `optimizer.lr` and `elastic.tables.features`."""

    columns: Texts = Field((), description=f"{NAMES}: the columns whose values are looked up in this table")
    width: int | None = Field(None, ge=1, description="a whole number of at least 1")
    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "rowwise_adagrad"
    lr: FiniteFloat | None = Field(None, ge=0, description="a number of at least 0; left out it is optimizer.lr, whose "
                                                           "schedule it follows in any case")
    weight_decay: FiniteFloat = Field(0.0, ge=0, description="a number of at least 0")
    init: str = Field("", description='"zeros", "normal:S" or "uniform:S" with a number S above 0, as "normal:0.02"')
    pooling: Literal["sum", "mean", "none"] = "sum"
    length: int = at_least(1, 1, ": how long lists are at most that are not pooled")
    admit: int = at_least(0, 0, ": how often an id must have appeared before it has a row of its own")
    ttl_steps: int = at_least(0, 0, ": how many steps after its last appearance an id is forgotten; 0 for never")
    max_rows: int = at_least(0, 0, ": how many rows are kept, of those that appeared most often; 0 for no limit")


class Embedding(Section):
    """Where the rows of all tables lie."""

    placement: Literal["workers"] = Field("workers", description='"workers": parameter servers are not built yet')
    twin: bool = Field(True, description="true or false: whether a second worker keeps every row too")
    look_ahead: Literal[0, 2] = Field(2, description="0 or 2: how many steps before its own a lookup is asked for")
    buckets: Annotated[int, AfterValidator(power_of_two)] = Field(
        1024, ge=1, le=1 << 20, description="a power of two up to 1048576, as 1024: the parts of each table that move "
                                            "between workers")
    move_mb: FiniteFloat = Field(64.0, gt=0, description="a number above 0: megabytes of rows that a worker sends or gets "
                                                         "between two steps, at most, while buckets move")
    memory_gb: FiniteFloat = Field(0.0, ge=0, description="a number above 0: gigabytes of memory that the rows of one "
                                                          "worker and their index may take, or 0 for no limit")
    disk_path: str = Field("", pattern=r"^(/.*)?$", description="a folder on every worker's own disk, as \"/scratch\", "
                                                                "for the rows beyond memory_gb, or \"\" for none")


def width_of(data: Any, table: TableSection) -> int:
    return table.width or data.embedding_dim or DEFAULT_WIDTH


def obstacles(recipe: Any) -> Iterator[tuple[str, str]]:
    """What of a recipe rows on workers cannot serve: "section.key = value", and the remedy."""
    mesh = recipe.mesh
    if mesh.auto:
        yield 'mesh = "auto"', "leave it out"
    for axis in ("pipeline", "tensor", "expert", "micro_batches"):
        if getattr(mesh, axis) > 1:
            yield f"mesh.{axis} = {getattr(mesh, axis)}", "write 1"
    if recipe.optimizer.ema:
        yield f"optimizer.ema = {recipe.optimizer.ema}", "leave it out"
    if recipe.elastic.reduction == "fast":
        yield 'elastic.reduction = "fast"', 'write "exact"'


def check_embedding(recipe: Any) -> None:
    """`RecipeError` in one sentence."""
    tables, data = recipe.tables, recipe.data
    is_recommender = recipe.model.kind.startswith("recommender.")
    if tables or data.tables == "rows":
        whose = f"[tables.{next(iter(tables))}]" if tables else 'data.tables = "rows"'
        for given, remedy in obstacles(recipe):
            raise RecipeError(f"{given} is not for embedding tables on workers ({whose}); {remedy}.")
    elif not is_recommender:
        only = "for embedding tables, [tables.NAME], of which there is none"
        refuse_given("embedding", recipe.embedding, type(recipe.embedding).model_fields, only)
        refuse_given("checkpoint", recipe.checkpoint, ("full_every",), only)
    if recipe.embedding.disk_path and not recipe.embedding.memory_gb:
        raise RecipeError(f'embedding.disk_path = {shown(recipe.embedding.disk_path)} is for rows that embedding.memory_gb '
                          "has no room for, and that is 0, no limit; say how many gigabytes they may take of memory.")
    if tables and not (is_recommender or data.is_table and ":" in recipe.model.kind):
        name = next(iter(tables))
        raise RecipeError(f"tables.{name}.columns = {shown(tables[name].columns)} has a meaning only for recommenders "
                          "and for models of your own, over columns of a table (data.format and data.path); leave "
                          f"[tables.{name}] out.")
    owner: dict[str, str] = {}
    for name, table in tables.items():
        check_table(recipe, name, table)
        for column in table.columns:
            if column in owner:
                raise RecipeError(f'the column "{column}" stands twice among tables.{owner[column]}.columns and '
                                  f"tables.{name}.columns; leave it in one of them.")
            owner[column] = name


def check_table(recipe: Any, name: str, table: TableSection) -> None:
    data, key = recipe.data, f"tables.{name}"
    if not table.columns:
        raise RecipeError(f"{key}.columns is missing; name the columns whose values are looked up in the table.")
    for column in table.columns:
        if table.columns.count(column) > 1:
            raise RecipeError(f'{key}.columns = {shown(table.columns)} names the column "{column}" twice; leave one of '
                              "them out.")
        for role in ("label", "numeric", "columns", "split_column"):
            if column == getattr(data, role) or (role in ("numeric", "columns") and column in getattr(data, role)):
                raise RecipeError(f'the column "{column}" stands in {key}.columns and in data.{role}; leave it in one '
                                  "of them.")
        if data.names and column not in data.names:
            raise RecipeError(f'{key}.columns names the column "{column}", which is not among data.names = '
                              f"{shown(data.names)}; add it there or mend its name.")
    if table.pooling != "none":
        refuse_given(key, table, ("length",), f'under {key}.pooling = "none"')
    elif recipe.model.kind.startswith("recommender."):
        raise RecipeError(f'{key}.pooling = "none" is for models of your own; model.kind = {shown(recipe.model.kind)} '
                          'reads one vector of each column: write "sum" or "mean".')
    if table.max_rows and table.max_rows < recipe.embedding.buckets:
        raise RecipeError(f"{key}.max_rows = {table.max_rows} must be at least embedding.buckets = "
                          f"{recipe.embedding.buckets}, each of which holds its share of the rows, or 0 for no limit.")


def keys_of(tables: Any) -> dict[str, Any]:
    """{"tables.NAME.key": value} of a recipe's dumped tables, but for what may change when a run is resumed."""
    return {f"tables.{name}.{key}": value for name, table in tables.items() for key, value in table.items()
            if key not in CHANGEABLE}
