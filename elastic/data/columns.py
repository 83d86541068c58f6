"""Columns of numbers: which of a table's are, what they are in NumPy, and their values, which may not be missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.types as t

from elastic.errors import UserError

LIST_BYTES = 256  # what a list of any length is taken to need
DTYPES = {"halffloat": "float16", "float": "float32", "double": "float64"}  # where Arrow's name is not NumPy's


@dataclass(frozen=True)
class Column:
    """A number a row (`width` 0) or a list of `width` numbers, or with `is_list` of any. `dtype` is NumPy's name.
    `is_ids`: an embedding table is looked up by it, see `elastic.data.ids`."""

    name: str
    dtype: str
    width: int = 0
    is_ids: bool = False
    is_list: bool = False

    @property
    def row_bytes(self) -> int:
        return LIST_BYTES if self.is_list else np.dtype(self.dtype).itemsize * max(1, self.width)

    def empty(self, rows: int) -> np.ndarray:
        return np.empty((rows, self.width) if self.width else (rows,), self.dtype)


def column_of(field: pa.Field) -> Column | None:
    """The column of numbers that an Arrow field is; None if it is none."""
    kind, width = field.type, 0
    if t.is_fixed_size_list(kind) and kind.list_size > 0:
        kind, width = kind.value_type, kind.list_size
    if t.is_boolean(kind) or t.is_integer(kind) or t.is_floating(kind):
        return Column(field.name, DTYPES.get(str(kind), str(kind)), width)
    return None


def field_of(key: str, where: str, schema: pa.Schema, name: str) -> pa.Field:
    """The column of this name. UserError if there is none, or more than one."""
    places = schema.get_all_field_indices(name)
    if not places:
        raise UserError(f'{key}: {where} has no column "{name}"; it has {shown(schema)}.')
    if len(places) > 1:
        raise UserError(f'{key}: {where} has two columns named "{name}"; rename one of them.')
    return schema.field(places[0])


def choose(key: str, where: str, schema: pa.Schema, wanted: Sequence[str], ids: Sequence[str] = ()) -> list[Column]:
    """The columns of a file that are asked for, or all of numbers if none is, those of `ids` left aside. UserError
    names the column and the remedy."""
    known = [column for field in schema if field.name not in ids and (column := column_of(field))]
    if not wanted:
        for column in known:
            field_of(key, where, schema, column.name)
        if not known and not ids:
            raise UserError(f"{key}: {where} has no column of numbers ({shown(schema)}); convert the columns to train on.")
        return known
    by_name = {column.name: column for column in known}
    for name in wanted:
        kind = field_of("data.columns", where, schema, name).type
        if name not in by_name:
            raise UserError(f'data.columns: the column "{name}" of {where} is {kind}, which is no number nor a list of '
                            "fixed length of numbers; convert it or leave it out.")
    return [by_name[name] for name in wanted]


def shown(schema: pa.Schema) -> str:
    names = [f"{field.name}: {field.type}" for field in schema]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "no column"


def check_same(key: str, first: str, schema: pa.Schema, where: str, other: pa.Schema, columns: Sequence[str],
               all_of: bool) -> None:
    """A further file has the columns of the first, of the same types. UserError names the file and the column."""
    if other.equals(schema):
        return
    for name in columns:
        if name not in other.names:
            raise UserError(f'{key}: {where} has no column "{name}", which {first} has; leave the file out or write it '
                            'anew.')
        was, now = schema.field(name).type, field_of(key, where, other, name).type
        if was != now:
            raise UserError(f'{key}: the column "{name}" is {now} in {where} and {was} in {first}; write the file anew '
                            'with one type.')
    extra = [field.name for field in other if column_of(field) and field.name not in schema.names]
    if all_of and extra:
        raise UserError(f'{key}: {where} has a column "{extra[0]}", which {first} lacks; name the columns to use in '
                        'data.columns.')


def values(array: pa.Array | pa.ChunkedArray, column: Column, where: str, first_row: int) -> np.ndarray:
    """The numbers of an Arrow array, without a copy where its memory allows; `first_row` is its first row's place in
    `where`.

    UserError names the row of a missing value.
    """
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    refuse_nulls(array, column.name, where, first_row)
    return view(array, column)


def view(array: pa.Array, column: Column) -> np.ndarray:
    """The numbers where they lie. Not by `to_numpy`, which loads pandas: a third of a second in a process that is to
    start fast."""
    flat = array.flatten() if column.width else array
    if t.is_boolean(flat.type):
        found = flat.to_numpy(zero_copy_only=False)
    else:
        # truth values, stored in bytes
        dtype = "bool" if column.dtype == "bool" else DTYPES.get(str(flat.type), str(flat.type))
        found = np.frombuffer(flat.buffers()[1] or b"", dtype)[flat.offset:flat.offset + len(flat)]
    return found.reshape(-1, column.width) if column.width else found


def refuse_nulls(array: pa.Array, name: str, where: str, first_row: int) -> None:
    """UserError where a value is missing, or one within a list."""
    row, lacks = first_null(array), "no value"
    if row is None and t.is_fixed_size_list(array.type):
        place = first_null(array.flatten())
        row = None if place is None else place // array.type.list_size
    elif row is None and (t.is_list(array.type) or t.is_large_list(array.type)):
        refuse_offsets(array, name, where, first_row)
        offsets, flat = lists_of(array)
        place, lacks = first_null(flat), "a list that lacks a value"
        row = None if place is None else int(np.searchsorted(offsets, place, side="right")) - 1
    if row is not None:
        raise UserError(f'data.path: the column "{name}" of {where} has {lacks} in row {first_row + row} (counted '
                        'from 0); '
                        "fill it in or leave the row out.")


def lists_of(array: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Where each list begins among the values, one more at the end, and the values; of lists of which none is missing.
    """
    if not len(array):
        return np.zeros(1, np.int64), array.flatten()
    offsets = view(array.offsets, Column("", "int64" if t.is_large_list(array.type) else "int32"))
    first = int(offsets[0])
    return offsets - first if first else offsets, array.values.slice(first, int(offsets[-1]) - first)


def refuse_offsets(array: pa.Array, name: str, where: str, first_row: int) -> None:
    """UserError where lists do not lie one after the other among their values: whoever reads an Arrow file looks at no
    offset but the last."""
    offsets = view(array.offsets, Column("", "int64" if t.is_large_list(array.type) else "int32"))
    begins, ends = offsets[:-1], offsets[1:]
    wrong = np.flatnonzero((begins < 0) | (ends < begins) | (ends > len(array.values)))
    if wrong.size:
        row = int(wrong[0])
        raise UserError(f'data.path: the column "{name}" of {where} has in row {first_row + row} (counted from 0) a list '
                        f"from {begins[row]} to {ends[row]} of {len(array.values)} values; write the file anew.")


def first_null(array: pa.Array) -> int | None:
    return int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0]) if array.null_count else None
