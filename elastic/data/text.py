"""The text of files: plain ones, or a column of a table, one text a row."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.types as t

from elastic.data.columns import field_of, refuse_nulls
from elastic.data.files import File, describe
from elastic.data.formats import batches, reading, schema_of
from elastic.errors import RecipeError, UserError


def read_text(key: str, file: File) -> str:
    """All of a plain file, without the mark of its encoding. RecipeError names `key`, the file and the remedy."""
    try:
        with file.stream() as stream:
            content = stream.read()
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key}: the file {file.name} cannot be read ({describe(error)}); "
                          "correct the path or make the file readable.") from error
    text = content.removeprefix(codecs.BOM_UTF8)
    if not text:
        raise RecipeError(f"{key}: the file {file.name} is empty; give a file with text or leave it out.")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        place = error.start + len(content) - len(text)
        raise RecipeError(f"{key}: the file {file.name} is not UTF-8 at byte {place}; convert it to UTF-8 or leave it "
                          "out.") from error


def read_column(kind: str, file: File, column: str) -> Iterator[str]:
    """The texts of one column of a CSV, Parquet or Arrow file. UserError names the file, and the row of a missing one.
    """
    schema = schema_of(kind, file)
    kept = field_of("data.text", file.name, schema, column).type
    if kind != "csv" and not is_text(kept):
        raise UserError(f'data.text: the column "{column}" of {file.name} is {kept}, which is no text; name one of '
                        'text.')
    row = 0
    for batch in batches(kind, file, {column: pa.large_string()}):
        refuse_nulls(batch.column(column), column, file.name, row)
        with reading(file.name):  # a column of texts may hold bytes that are none
            found = batch.column(column).cast(pa.large_string()).to_pylist()
        yield from found
        row += batch.num_rows


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if t.is_dictionary(kind) else kind
    return t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)
