"""Columns that embedding tables are looked up by: whole numbers as they are, texts by their hash; one a row, or a list.

An id is an int64: the number itself (of unsigned 64 bits, the int64 of the same bits), or xxh3-64 of a text's UTF-8. So
a table needs no vocabulary, and the same value is the same id in every file and in every column.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as t
import xxhash

from elastic.data.columns import Column, lists_of, refuse_nulls, values, view
from elastic.data.jagged import Jagged, offsets_of
from elastic.errors import UserError


def is_text(kind: pa.DataType) -> bool:
    return bool(t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind))


def inner(kind: pa.DataType) -> pa.DataType:
    """Of a list what it is of, of a dictionary what it stands for."""
    while t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind) or t.is_dictionary(kind):
        kind = kind.value_type
    return kind


def lies_as_ids(kind: pa.DataType) -> bool:
    """Whether its ids are the numbers that lie in the file."""
    kind = kind if t.is_dictionary(kind) or not t.is_nested(kind) else kind.value_type
    return bool(t.is_integer(kind))


def column_of_ids(key: str, where: str, field: pa.Field) -> Column:
    """UserError where the column holds neither whole numbers nor texts, nor lists of them."""
    kind = field.type
    is_list, width = t.is_list(kind) or t.is_large_list(kind), kind.list_size if t.is_fixed_size_list(kind) else 0
    one = kind.value_type if is_list or width else kind
    found = inner(one)
    if t.is_nested(one) or not (t.is_integer(found) or t.is_boolean(found) or is_text(found)):
        raise UserError(f'{key}: the column "{field.name}" of {where} is {kind}, and an embedding table is looked up by '
                        "whole numbers, texts or lists of them; convert it or leave it out.")
    return Column(field.name, str(one) if t.is_integer(one) else "int64", width, True, is_list)


def ids_of(array: pa.Array, column: Column, where: str, first_row: int, fill: str | None = None) -> np.ndarray | Jagged:
    """The ids of an Arrow array, without a copy where numbers lie as they are. UserError names the row of a missing
    one; `fill` is a text in its place, and a list that is missing has no ids then."""
    if fill is not None and not column.width and array.null_count:
        if not column.is_list:
            return filled(array, column, fill)
        array = without_nulls(array)
    refuse_nulls(array, column.name, where, first_row)
    if column.width:
        return numbered(array.flatten(), column).reshape(-1, column.width)
    if not column.is_list:
        return numbered(array, column)
    offsets, flat = lists_of(array)
    return Jagged(numbered(flat, column), offsets)


def filled(array: pa.Array, column: Column, fill: str) -> np.ndarray:
    if is_text(inner(array.type)):
        return numbered(array.cast(inner(array.type)).fill_null(fill), column)
    found = numbered(array.cast(inner(array.type)).fill_null(0), column).astype(np.int64)
    found[array.is_null().to_numpy(zero_copy_only=False)] = hash_of(fill.encode())
    return found


def without_nulls(array: pa.Array) -> pa.Array:
    """The same lists, none where one is missing."""
    lengths = view(pc.list_value_length(array).fill_null(0).cast(pa.int64()), Column("", "int64"))
    return pa.LargeListArray.from_arrays(pa.array(offsets_of(lengths)), array.flatten())


def read(array: pa.Array | pa.ChunkedArray, column: Column, where: str, first_row: int) -> np.ndarray | Jagged:
    """A column's values, whichever kind it is of."""
    if not column.is_ids:
        return values(array, column, where, first_row)
    return ids_of(array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array, column, where, first_row)


def numbered(array: pa.Array, column: Column) -> np.ndarray:
    """One id for each value, of which none is missing."""
    kind = inner(array.type)
    if t.is_dictionary(array.type):
        array = array.cast(kind)
    if is_text(kind):
        return hashed(array)
    if t.is_boolean(kind):
        array = array.cast(pa.uint8())
    return view(array, Column("", str(array.type))).astype(column.dtype, copy=False)


def hash_of(text: bytes) -> int:
    found = xxhash.xxh3_64_intdigest(text)
    return found - (1 << 64) if found >> 63 else found


def hashed(array: pa.Array) -> np.ndarray:
    """int64 of texts, of which each different one is looked at once."""
    found = array.dictionary_encode()
    words = found.dictionary.cast(pa.large_binary()).to_pylist()
    return np.array([hash_of(word) for word in words], np.int64)[view(found.indices, Column("", "int32"))]
