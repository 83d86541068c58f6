"""Parquet, Arrow IPC and CSV, each behind the same few calls: what a file holds, one unit of it, all of it in order.

A unit is what is read whole: a row group, a record batch. Whatever a file has against being read becomes a `UserError`
of one sentence that names the file and the place in it.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from elastic.data.columns import Column, refuse_nulls
from elastic.data.files import File, describe
from elastic.data.ids import read
from elastic.errors import UserError

Arrays = dict[str, Any]  # columns by name: NumPy arrays, or `Jagged` lists
LOOK_BYTES = 1 << 20  # of a CSV, before it is taken for one
# of a CSV that Arrow parses together: at first, and where a row is longer
BLOCK_BYTES, MOST_BLOCK = 1 << 20, (1 << 31) - 1


@dataclass(frozen=True)
class Contents:
    """What a file says about itself. `rows` per unit; `digest` changes with what the file holds, as far as its own
    index tells."""

    schema: pa.Schema
    rows: tuple[int, ...]
    digest: str
    is_plain: bool = False  # its values can be used where they lie


@dataclass(frozen=True)
class Dialect:
    """How a CSV is written. `names` where it has no line of names; a line that begins with `comment` and has another
    number of columns is left out."""

    delimiter: str = ","
    names: tuple[str, ...] = ()
    comment: str = ""

    def is_comment(self, row: pc.InvalidRow) -> str:
        return "skip" if row.text.startswith(self.comment) else "error"


PLAIN = Dialect()


@contextmanager
def reading(where: str, place: str = "") -> Iterator[None]:
    """What goes wrong inside is the file's fault."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"data.path: the file {where} is missing; put it back or leave it out.") from error
    except UserError:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"data.path: {place}{where} cannot be read ({describe(error)}); the file is damaged or not of "
                        "this format: restore it or leave it out.") from error


# Parquet.


def parquet_contents(file: File, wanted: Sequence[str]) -> Contents:
    """From the footer alone. A missing value that its statistics tell of is refused here already."""
    with reading(file.name), file.open() as raw, pq.ParquetFile(raw) as parquet:
        about, schema, rows = parquet.metadata, parquet.schema_arrow, tuple[int, ...]()
        leaves = {about.schema.column(place).path.partition(".")[0]: place for place in range(len(about.schema))}
        for unit in range(about.num_row_groups):
            group = about.row_group(unit)
            for name in wanted:
                statistics = group.column(leaves[name]).statistics if name in leaves else None
                if statistics is not None and statistics.has_null_count and statistics.null_count:
                    refuse_nulls(parquet.read_row_group(unit, [name])[name].combine_chunks(), name, file.name,
                                 sum(rows))
            rows += (group.num_rows,)
        size = about.serialized_size + 8
        footer = raw.read_at(size, file.size - size)
    return Contents(schema, rows, hashlib.sha256(b"%d/" % file.size + footer).hexdigest())


# Arrow IPC files.


def open_arrow(source: pa.NativeFile | pa.Buffer, wanted: Sequence[str] = ()) -> pa.ipc.RecordBatchFileReader:
    names = pa.ipc.open_file(source).schema.names
    fields = [names.index(name) for name in wanted if name in names]
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields or None, use_threads=False))


def arrow_contents(file: File, wanted: Sequence[str]) -> Contents:
    """From the messages' own headers; a local file whose values lie there uncompressed can be used as it is."""
    with reading(file.name):
        if file.is_local:
            buffer = pa.memory_map(file.where).read_buffer()
            reader = pa.ipc.open_file(buffer)  # naming fields would copy them
            schema, num = reader.schema, reader.num_record_batches
            wanted = [name for name in wanted if name in schema.names]
            is_plain = all(lies_in(reader.get_batch(unit).select(wanted), buffer) for unit in {0, num - 1} if num)
            batches = [(reader if is_plain else open_arrow(buffer, wanted)).get_batch(unit) for unit in range(num)]
            rows = tuple(batch.num_rows for batch in batches)
            first_rows = list(accumulate(rows, initial=0))
            for name in wanted:
                for unit, batch in enumerate(batches):
                    refuse_nulls(batch.column(name), name, file.name, first_rows[unit])
        else:
            with file.open() as raw:
                schema = pa.ipc.open_file(raw).schema
                reader = open_arrow(raw, wanted[:1])
                rows, is_plain = tuple(reader.get_batch(unit).num_rows
                                       for unit in range(reader.num_record_batches)), False
    said = f"{file.size}/{schema}/{rows}"
    return Contents(schema, rows, hashlib.sha256(said.encode()).hexdigest(), is_plain)


def lies_in(batch: pa.RecordBatch, mapped: pa.Buffer) -> bool:
    """Whether a batch's values are the file's own bytes, as NumPy wants them: neither compressed nor packed into bits.
    """
    found = [buffer for column in batch.columns for buffer in column.buffers() if buffer is not None and buffer.size]
    packed = any(pa.types.is_boolean(column.type.value_type if pa.types.is_fixed_size_list(column.type)
                                     else column.type) for column in batch.columns)
    return not packed and all(mapped.address <= buffer.address < mapped.address + mapped.size for buffer in found)


# CSV.


def csv_schema(file: File, dialect: Dialect = PLAIN) -> pa.Schema:
    with reading(file.name):
        with file.stream() as raw:  # before Arrow, which prints a trace of its own for a bad row that is no text
            codecs.getincrementaldecoder("utf-8")().decode(raw.read(LOOK_BYTES))
        block = BLOCK_BYTES
        while True:
            try:
                with open_csv(file, {}, (), dialect, block) as reader:
                    return reader.schema
            except pa.ArrowInvalid as error:
                block = wider(error, block)


def open_csv(file: File, types: dict[str, pa.DataType], names: Sequence[str] = (), dialect: Dialect = PLAIN,
             block: int = BLOCK_BYTES) -> pc.CSVStreamingReader:
    """`block`: bytes that are looked at together, within which a row must lie."""
    read_options = pc.ReadOptions(use_threads=False, column_names=list(dialect.names) or None, block_size=block)
    return pc.open_csv(file.stream(), read_options=read_options,
                       parse_options=pc.ParseOptions(newlines_in_values=True, delimiter=dialect.delimiter,
                                                     invalid_row_handler=dialect.is_comment if dialect.comment
                                                     else None),
                       convert_options=pc.ConvertOptions(column_types=types, include_columns=list(names)))


def wider(error: pa.ArrowInvalid, block: int) -> int:
    """The next block to try where a row did not lie within one. `error` again where that is not what is wrong;
    UserError at the widest."""
    if not any(words in str(error) for words in ("straddles two block", "Empty CSV file or block")):
        raise error
    if block == MOST_BLOCK:
        raise pa.ArrowInvalid("it has no row, or one that does not end within 2 GiB, as by a quotation mark that is "
                              "not closed") from error
    return min(16 * block, MOST_BLOCK)


class TooNarrow(Exception):
    """Names a CSV column that began with whole numbers and goes on with others, and where."""

    def of_ids(self, key: str) -> UserError:
        """Where that will not do."""
        name, place = self.args
        return UserError(f'{key}: the column "{name}" of {place}, holds something else than the whole numbers that it '
                         "begins with; mend that line, or write all of the column as texts.")


def csv_batches(file: File, types: dict[str, pa.DataType], dialect: Dialect = PLAIN) -> Iterator[pa.RecordBatch]:
    """All of a CSV file. `TooNarrow` names a column of whole numbers that turns out to hold others."""
    reader, rows, block, again = None, 0, BLOCK_BYTES, 0
    while True:
        try:
            reader = reader or open_csv(file, types, list(types), dialect, block)
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except OSError as error:
            raise UserError(f"data.path: the file {file.name} cannot be read ({describe(error)}); restore it or leave "
                            "it out.") from error
        except pa.ArrowInvalid as error:
            try:
                block, reader, again = wider(error, block), None, rows
            except pa.ArrowInvalid as last:
                raise csv_fault(file, types, rows, last, dialect) from error
            continue
        known = min(again, batch.num_rows)
        again -= known
        if batch.num_rows > known:
            rows += batch.num_rows - known
            yield batch.slice(known)


def csv_fault(file: File, types: dict[str, pa.DataType], rows: int, error: Exception, dialect: Dialect) -> Exception:
    found = re.search(r"In CSV column #(\d+)", str(error))
    name = csv_schema(file, dialect).names[int(found[1])] if found else ""
    if name and pa.types.is_integer(types[name]):
        return TooNarrow(name, f"{file.name}, after row {rows}")
    column = f'the column "{name}" of ' if name else ""
    return UserError(f"data.path: {column}{file.name}, after row {rows}, cannot be read ({describe(error)}); mend that "
                     "line.")


# All formats.


def schema_of(kind: str, file: File, dialect: Dialect = PLAIN) -> pa.Schema:
    """The columns alone. UserError if the file cannot serve."""
    refuse_unfit(kind, file)
    if kind == "csv":
        return csv_schema(file, dialect)
    with reading(file.name), file.open() as raw:
        return pq.read_schema(raw) if kind == "parquet" else pa.ipc.open_file(raw).schema


def refuse_unfit(kind: str, file: File) -> None:
    """UserError for a file that is empty, or packed where one must be able to read anywhere in it."""
    if not file.size:
        raise UserError(f"data.path: the file {file.name} is empty; give one with rows or leave it out.")
    with reading(file.name):
        packer = "" if kind == "csv" else file.packed_by()
    if packer:
        raise file.is_packed(packer)


def contents(kind: str, file: File, wanted: Sequence[str]) -> Contents:
    """UserError if the file cannot serve. A CSV tells nothing but its columns before it is read."""
    if kind == "csv":
        return Contents(schema_of(kind, file), (), "")
    refuse_unfit(kind, file)
    return parquet_contents(file, wanted) if kind == "parquet" else arrow_contents(file, wanted)


def read_unit(kind: str, file: File, unit: int, first_row: int, rows: int, columns: Sequence[Column]) -> Arrays:
    """The numbers of one unit; the checksums of a row group's pages are checked where it has any."""
    names, what = [column.name for column in columns], "row group" if kind == "parquet" else "record batch"
    with reading(file.name, f"{what} {unit} of "), file.open() as raw:
        if kind == "parquet":
            with pq.ParquetFile(raw, page_checksum_verification=True, pre_buffer=not file.is_local) as parquet:
                found = parquet.read_row_group(unit, names, use_threads=False)
        else:
            found = open_arrow(raw, names).get_batch(unit)
        if found.num_rows != rows:
            raise ValueError(f"{found.num_rows} rows where {rows} were")
        return {column.name: read(found.column(column.name), column, file.name, first_row) for column in columns}


def batches(kind: str, file: File, types: dict[str, pa.DataType], dialect: Dialect = PLAIN) -> Iterator[pa.RecordBatch]:
    """All of a file's rows in order, the columns of `types` only."""
    if kind == "csv":
        yield from csv_batches(file, types, dialect)
        return
    with reading(file.name), file.open() as raw:
        if kind == "parquet":
            with pq.ParquetFile(raw, page_checksum_verification=True) as parquet:
                yield from parquet.iter_batches(columns=list(types), use_threads=False)
        else:
            reader = open_arrow(raw, list(types))
            yield from (reader.get_batch(unit) for unit in range(reader.num_record_batches))
