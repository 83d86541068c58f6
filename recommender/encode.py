"""Columns of a table as numbers, in one pass: the label as 0 and 1, categories as codes, numbers as float64.

A code is a category's place in the order in which its column's values first appear, or its hash where the column has
buckets. Which codes a model knows is decided afterwards, when it is known which rows it trains on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as t
import xxhash

from elastic.data.columns import Column, field_of, first_null, view
from elastic.data.files import File
from elastic.data.formats import Arrays, Dialect, TooNarrow, batches, reading, schema_of
from elastic.data.ids import column_of_ids, ids_of, inner, is_text
from elastic.data.index import NO_IDS
from elastic.data.jagged import Jagged
from elastic.errors import UserError

TEXT = pa.large_string()
LABEL, NUMERIC, CATEGORICAL, GROUP = "label", "numeric", "categorical", "group"  # the columns of what is written
IDS = "ids/"  # and the name of a column without a vocabulary
FINITE = "a finite number below 3.4e38, as float32 holds it"
MISSING = "\0missing"  # a missing category is one of its own


class Codes:
    """A categorical column's values as numbers, growing batch by batch. `buckets` 0 is a vocabulary."""

    def __init__(self, buckets: int = 0):
        self.buckets = buckets
        self.known: dict[str, int] = {}

    def encode(self, array: pa.Array) -> np.ndarray:
        """int32, of an array of texts without nulls."""
        found = array.dictionary_encode()
        values = found.dictionary.to_pylist()
        codes = [hashed(v, self.buckets) for v in values] if self.buckets else [self.known.setdefault(v, len(self.known)) for v in values]
        return np.array(codes, np.int32)[view(found.indices, Column("", "int32"))]

    def __len__(self) -> int:
        return self.buckets or len(self.known)


def hashed(value: str, buckets: int) -> int:
    """Which of `buckets` rows a value takes, the same everywhere: xxh3."""
    return xxhash.xxh3_64_intdigest(value.encode()) % buckets


def columns_of(num_numeric: int, num_categorical: int, is_grouped: bool,
               growing: Sequence[tuple[str, bool]] = ()) -> list[Column]:
    """What is written of every row. `growing`: columns without a vocabulary, and whether each holds lists."""
    wide = ((NUMERIC, "float64", num_numeric), (CATEGORICAL, "int32", num_categorical))
    return [Column(LABEL, "float32"), *(Column(*column) for column in wide if column[2]),
            *([Column(GROUP, "int32")] if is_grouped else []),
            *(Column(IDS + name, "int64", 0, True, is_list) for name, is_list in growing)]


class Encoder:
    """The declared columns of the recipe's `[data]`, and those without a vocabulary, `growing`, each with the recipe's
    key that names it. `is_binary`: labels must be 0 or 1."""

    def __init__(self, data: Any, is_binary: bool, growing: Mapping[str, str] = NO_IDS):
        self.data, self.is_binary, self.growing = data, is_binary, growing
        self.ids: dict[str, Column] = {}  # of each growing column, as the last file has it
        self.first: dict[str, str] = {}  # and what it holds in the first
        self.dialect = Dialect(data.delimiter, data.names, data.comment) if data.format == "csv" else Dialect()
        self.codes = {name: Codes(data.buckets.get(name, 0)) for name in data.categorical}
        self.groups = Codes()
        self.rows_of: list[tuple[str, int]] = []  # of each file, in order
        self.unused: list[str] = []  # columns of the first file that nothing reads
        self.apart: list[np.ndarray] = []  # of each batch: what data.split_column says

    def wanted(self, file: File) -> dict[str, pa.DataType]:
        """The columns to read and their types. UserError names one that is missing or of no use."""
        data = self.data
        schema = schema_of(data.format, file, self.dialect)
        texts = {*data.categorical, data.group, *([data.label] if data.positive else []),
                 *([data.split_column] if data.split == "column" else [])}
        out = {}
        for name in dict.fromkeys((data.label, *data.categorical, *data.numeric,
                                   *filter(None, (data.split_column, data.group)))):
            if name in self.growing:
                continue
            kind = field_of(f"data.{role(data, name)}", file.name, schema, name).type
            kind = kind.value_type if t.is_dictionary(kind) else kind
            number = t.is_boolean(kind) or t.is_integer(kind) or t.is_floating(kind) or t.is_decimal(kind)
            timed = data.split == "time" and name == data.split_column and (t.is_timestamp(kind) or t.is_date(kind))
            text = t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)
            if data.format != "csv" and not (number or timed or (text and name in texts)):
                raise UserError(f'data.{role(data, name)}: the column "{name}" of {file.name} is {kind}, which is no '
                                f'{"category" if name in texts else "number"}; convert it or leave it out.')
            if data.format == "csv" and text and name in (data.label, data.split_column) and name not in texts:
                remedy = "list them in data.negative and data.positive" if name == data.label else "write times as 2030-12-31 23:59:59, or as numbers"
                raise UserError(f'data.{role(data, name)}: the column "{name}" of {file.name} holds texts; {remedy}, '
                                'or mend the rows that are none.')
            out[name] = TEXT if name in texts else kind if timed or t.is_boolean(kind) else pa.float64()
        out |= {name: self.wanted_ids(file, schema, name) for name in self.growing}
        if not self.rows_of:
            self.unused = [name for name in schema.names if name not in out]
        return out

    def wanted_ids(self, file: File, schema: pa.Schema, name: str) -> pa.DataType:
        """The type of a growing column, which all files must hold alike."""
        key = self.growing[name]
        field = field_of(key, file.name, schema, name)
        column = self.ids[name] = column_of_ids(key, file.name, field)
        holds = "texts" if is_text(inner(field.type)) else "whole numbers"
        holds = f"lists of {holds}" if column.is_list or column.width else holds
        if self.first.setdefault(name, holds) != holds:
            raise UserError(f'{key}: the column "{name}" holds {holds} in {file.name} and {self.first[name]} in the '
                            "file before; write the file anew with one type.")
        return field.type

    def is_listed(self) -> list[tuple[str, bool]]:
        """Of each growing column whether it holds lists."""
        return [(name, self.first[name].startswith("lists")) for name in self.growing]

    def encoded(self, files: Sequence[File]) -> Iterator[Arrays]:
        """All rows of `files`, batch by batch."""
        for file in files:
            types, row = self.wanted(file), 0
            try:
                for batch in batches(self.data.format, file, types, self.dialect):
                    yield self.encode(batch, types, file.name, row)
                    row += batch.num_rows
            except TooNarrow as narrow:
                raise narrow.of_ids(self.growing[narrow.args[0]]) from narrow
            self.rows_of.append((file.name, row))

    def encode(self, batch: pa.RecordBatch, types: dict[str, pa.DataType], where: str, row: int) -> Arrays:
        data = self.data

        def column(name: str, is_group: bool = False) -> pa.Array:
            with reading(where):  # a column of texts may hold bytes that are none
                if types[name] == TEXT or is_group:
                    return texts(batch.column(name), data.format)
                return numbers(batch.column(name))

        out = {LABEL: self.labels(column(data.label), where, row)}
        if data.numeric:
            out[NUMERIC] = np.stack([self.numbers(column(name), name, where, row) for name in data.numeric], 1)
        if data.categorical:
            out[CATEGORICAL] = np.stack([self.categories(column(name), name, where, row) for name in data.categorical],
                                        1)
        if data.group:
            lists = column(data.group, True)
            refuse(lists, data.group, where, row)
            out[GROUP] = self.groups.encode(lists)
        if data.split_column:
            refuse(column(data.split_column), data.split_column, where, row)
            self.apart.append(self.sides(column(data.split_column)))
        return out | {IDS + name: self.looked_up(batch.column(name), name, where, row) for name in self.growing}

    def labels(self, array: pa.Array, where: str, row: int) -> np.ndarray:
        data = self.data
        refuse(array, data.label, where, row)
        if data.positive:
            listed = pa.array([*data.negative, *data.positive], TEXT)
            places = pc.index_in(array, listed)
            remedy = "add it to data.negative or data.positive, or mend the row"
            unlisted = first_null(places)
            found = np.zeros(0) if unlisted is not None else view(places, Column("", "int32")) >= len(data.negative)
        else:
            found = view(array, Column("", "float64"))
            wrong = np.flatnonzero(~np.isin(found, (0.0, 1.0)) if self.is_binary else ~np.isfinite(narrow(found)))
            unlisted = int(wrong[0]) if len(wrong) else None
            remedy = ('it must be 0 or 1: mend the row, list what the column holds in data.negative and data.positive, '
                      'or write model.loss = "squared"' if self.is_binary else f"it must be {FINITE}: mend the row")
        if unlisted is not None:
            raise UserError(f'data.label: the column "{data.label}" of {where} holds {array[unlisted].as_py()!r} in '
                            f'row {row + unlisted} '
                            f"(counted from 0); {remedy}.")
        return found.astype(np.float32)

    def numbers(self, array: pa.Array, name: str, where: str, row: int) -> np.ndarray:
        """A missing one is NaN."""
        if self.data.nulls == "error":
            refuse(array, name, where, row)
        found = view(array.fill_null(np.nan), Column("", "float64"))
        out = np.sign(found) * np.log1p(np.abs(found)) if name in self.data.log else found
        endless = np.flatnonzero(np.isinf(narrow(out)) if self.data.nulls == "fill" else ~np.isfinite(narrow(out)))
        if len(endless):
            raise UserError(f'data.numeric: the column "{name}" of {where} holds {found[endless[0]]} in row '
                            f'{row + int(endless[0])} '
                            f"(counted from 0); it must be {FINITE}: mend the row or leave it out.")
        return out

    def categories(self, array: pa.Array, name: str, where: str, row: int) -> np.ndarray:
        if self.data.nulls == "error":
            refuse(array, name, where, row)
        return self.codes[name].encode(array.fill_null(MISSING))

    def looked_up(self, array: pa.Array, name: str, where: str, row: int) -> np.ndarray | Jagged:
        """The ids of a growing column, int64."""
        data, column = self.data, self.ids[name]
        if data.format == "csv" and is_text(array.type):
            with reading(where):
                array = texts(array, data.format)
        found = ids_of(array, column, where, row, MISSING if data.nulls == "fill" else None)
        if isinstance(found, Jagged):
            return Jagged(found.values.astype(np.int64, copy=False), found.offsets)
        found = found.astype(np.int64, copy=False)
        return Jagged(found.reshape(-1), np.arange(len(array) + 1) * column.width) if column.width else found

    def sides(self, array: pa.Array) -> np.ndarray:
        """Of a split by column, whether a row is to be evaluated on; of one by time, the time."""
        if self.data.split == "time":
            return np.array(view(array, Column("", "float64")))
        return np.array(pc.is_in(array, pa.array(self.data.eval_values, TEXT)).to_pylist(), bool)

    def place(self, row: int) -> tuple[str, int]:
        """The file of a row and its number there."""
        for where, rows in self.rows_of:
            if row < rows:
                return where, row
            row -= rows
        raise IndexError(row)


def role(data: Any, name: str) -> str:
    return next(key for key in ("label", "categorical", "numeric", "split_column", "group")
                if name == getattr(data, key) or
                (key in ("categorical", "numeric") and name in getattr(data, key)))


def texts(array: pa.Array, kind: str) -> pa.Array:
    """Without surrounding spaces, which CSV puts anywhere; there, an empty text is a missing one."""
    array = array.cast(TEXT)
    array.validate(full=True)
    if kind != "csv":
        return array
    array = pc.utf8_trim_whitespace(array)
    return pc.if_else(pc.equal(array, ""), pa.scalar(None, TEXT), array)


def numbers(array: pa.Array) -> pa.Array:
    """As float64; a time in microseconds, whatever the unit of its file."""
    kind = array.type.value_type if t.is_dictionary(array.type) else array.type
    if t.is_timestamp(kind) or t.is_date(kind):
        array = array.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
    return array.cast(pa.float64(), safe=False)


def narrow(found: np.ndarray) -> np.ndarray:
    """As float32; infinite where that is too small."""
    with np.errstate(over="ignore"):
        return found.astype(np.float32)


def refuse(array: pa.Array, name: str, where: str, row: int) -> None:
    """UserError where a value is missing."""
    place = first_null(array)
    if place is not None:
        raise UserError(f'data.path: the column "{name}" of {where} has no value in row {row + place} (counted from '
                        '0); fill it in, leave the row out, or, if it is no label, write data.nulls = "fill".')
