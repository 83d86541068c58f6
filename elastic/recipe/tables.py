"""Tables of labels, categories and numbers: the keys of `[data]` that declare their columns, and what must hold between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elastic.errors import RecipeError
from elastic.recipe.fields import NAMES, Section, Texts, refuse_given, shown

TABLES = ("csv", "parquet", "arrow")


class Labelled(Section):
    """The part of `[data]` that recommenders read. The label is a number, or a text that `negative` and `positive`
    list."""

    label: str = Field("", description="a column's name")
    negative: Texts = Field((), description=f"{NAMES}: what the label column holds for 0")
    positive: Texts = Field((), description=f"{NAMES}: what the label column holds for 1")
    categorical: Texts = Field((), description=f"{NAMES}: columns whose values are names or numbers of things")
    numeric: Texts = Field((), description=f"{NAMES}: columns of numbers")
    log: Texts = Field((), description=f"{NAMES}: those of data.numeric of which the logarithm is taken, sign(x) log(1 "
                                       "+ |x|)")
    buckets: dict[str, Annotated[int, Field(ge=1, lt=2**31)]] = Field(
        {}, description="a table of column = number of rows, each from 1 to 2^31 - 1: columns that are hashed instead "
                        "of having a vocabulary")
    embedding_dim: int | None = Field(None, ge=1, description="a whole number of at least 1")
    tables: Literal["auto", "dense", "rows"] = Field("auto", exclude_if=lambda value: value == "auto")
    min_count: int = Field(1, ge=1, description="a whole number of at least 1: how often a training row must hold a "
                                                "value that is to be known")
    oov: Literal["hash", "row", "error"] = "hash"
    nulls: Literal["error", "fill"] = "error"
    group: str = Field("", description="the column that tells lists apart, as users")
    top: int = Field(10, ge=1, description="a whole number of at least 1: how many of a list recall and NDCG look at")
    names: Texts = Field((), description=f"{NAMES}: the columns of a CSV that has no line of names")
    delimiter: str = Field(",", min_length=1, max_length=1, description='one character, as "\\t"')
    comment: str = Field("", description="how the lines of a CSV begin that are to be left out")
    split: Literal["end", "random", "column", "time"] = "end"
    split_column: str = Field("", description="a column's name")
    eval_values: Texts = Field((), description=f"{NAMES}: what data.split_column holds in rows to evaluate on")


ONLY_HERE = tuple(key for key in Labelled.__annotations__ if key != "label")


def check_labelled(recipe: Any) -> None:
    """`RecipeError` in one sentence."""
    data, kind = recipe.data, recipe.model.kind
    if not kind.startswith("recommender."):
        keys = ONLY_HERE if kind.startswith("vision.") else ("label", *ONLY_HERE)
        refuse_given("data", data, keys, 'for the recommenders (model.kind = "recommender.dlrm")')
        return
    if data.format not in TABLES:
        raise RecipeError(f"data.format = {shown(data.format)} does not feed model.kind = {shown(kind)}, which reads "
                          f"tables; write one of {', '.join(map(shown, TABLES))}.")
    if not data.label:
        raise RecipeError(f"data.label is missing; model.kind = {shown(kind)} needs the name of the column to predict.")
    if not data.categorical and not data.numeric and not recipe.tables:
        raise RecipeError(f"data.categorical and data.numeric are missing; model.kind = {shown(kind)} needs at least "
                          "one column to predict from.")
    if data.tables == "rows" and not data.categorical:
        raise RecipeError('data.tables = "rows" places the columns of data.categorical, and there is none; leave it '
                          "out.")
    check_columns(data)
    check_split(data)


def check_columns(data: Any) -> None:
    used = (data.label, *data.categorical, *data.numeric)
    twice = next((name for name in used if used.count(name) > 1), None)
    if twice:
        raise RecipeError(f'the column "{twice}" stands twice among data.label, data.categorical and data.numeric; '
                          'leave it in one of them.')
    for key, part, whole in (("buckets", data.buckets, "categorical"), ("log", data.log, "numeric")):
        for name in part:
            if name not in getattr(data, whole):
                raise RecipeError(f'data.{key} names the column "{name}", which is not in data.{whole}; add it there '
                                  'or leave it out.')
    if bool(data.positive) != bool(data.negative):
        given, lacks = ("positive", "negative") if data.positive else ("negative", "positive")
        raise RecipeError(f"data.{given} = {shown(getattr(data, given))} needs data.{lacks} beside it: what the label "
                          "column holds otherwise.")
    both = [value for value in data.negative if value in data.positive]
    if both:
        raise RecipeError(f'"{both[0]}" stands in data.negative and in data.positive; leave it in one of them.')
    if data.format != "csv":
        refuse_given("data", data, ("names", "delimiter", "comment"), "for CSV")
    if data.group and data.group in (data.label, *data.numeric):
        raise RecipeError(f'data.group = "{data.group}" is the label or a number; it must be another column, which may '
                          'be among data.categorical.')
    missing = [name for name in (*used, *filter(None, (data.split_column, data.group))) if data.names
               and name not in data.names]
    if missing:
        raise RecipeError(f'the column "{missing[0]}" is not among data.names = {shown(data.names)}; add it there or '
                          'mend its name.')


def check_split(data: Any) -> None:
    by_column = data.split in ("column", "time")
    if data.eval_path and data.split != "end":
        raise RecipeError(f"data.split = {shown(data.split)} and data.eval_path exclude each other; leave one of them "
                          "out.")
    if by_column and not data.split_column:
        raise RecipeError(f"data.split_column is missing; data.split = {shown(data.split)} needs the column that tells "
                          "the rows apart.")
    if data.split_column and not by_column:
        raise RecipeError(f'data.split_column = {shown(data.split_column)} needs data.split = "column" or "time".')
    read = ("a text", (data.label, *data.numeric)) if data.split == "column" else ("a time", (data.label, *data.categorical, data.group))
    if by_column and data.split_column in read[1]:
        raise RecipeError(f'data.split_column = "{data.split_column}" is {read[0]} under data.split = "{data.split}", '
                          'and the label, a number, a '
                          "category or the group besides; write another column.")
    if bool(data.eval_values) != (data.split == "column"):
        raise RecipeError(f"data.eval_values = {shown(data.eval_values)} belongs to data.split = \"column\": what that "
                          "column holds in rows to evaluate on; write both or neither.")
