"""What `prepare` finds out about tables: their columns, their blocks, and where their rows are read from. Kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

from elastic.data.cache import FACTS, once
from elastic.data.columns import Column, check_same, choose, column_of, field_of
from elastic.data.convert import arrays_of, write
from elastic.data.files import File, find
from elastic.data.formats import Contents, TooNarrow, contents, schema_of
from elastic.data.ids import column_of_ids, lies_as_ids
from elastic.errors import UserError
from elastic.storage.atomic import write_atomically

VERSION = 3
NO_IDS: Mapping[str, str] = MappingProxyType({})
CONVERT_BYTES = 1 << 30  # tables up to this size are converted where the recipe leaves the choice
REMOTE_READERS = 16  # remote files looked at together


@dataclass(frozen=True)
class Part:
    """One source's files. A block is (file, unit, first row of it in the file, rows); there are none before the files
    are looked at."""

    files: tuple[File, ...]
    blocks: tuple[tuple[int, int, int, int], ...] = ()
    is_mapped: bool = False  # its values are used where they lie
    is_eval: bool = False

    @property
    def key(self) -> str:
        return "data.eval_path" if self.is_eval else "data.path"

    @property
    def num_rows(self) -> int:
        return sum(rows for *_, rows in self.blocks)


@dataclass(frozen=True)
class Facts:
    """Everything that opening the tables needs."""

    format: str
    key: str
    shuffle_by: str  # "rows" | "blocks"
    columns: tuple[Column, ...]
    parts: tuple[Part, ...]
    unused: tuple[str, ...] = ()  # other columns of the first file, with their types


FORM = TypeAdapter(Facts)


def find_facts(data: Any, cache_dir: Path, ids: Mapping[str, str] = NO_IDS) -> tuple[Path, Facts]:
    """The facts and the folder that keeps them; made there if the same files, as dated, were not looked at before.
    `ids`: the columns that embedding tables are looked up by, each with the recipe's key that names it."""
    sources = sources_of(data)
    asked = json.dumps([VERSION, data.format, data.columns, data.shuffle_by, data.shuffle,
                        [[source.key, [[f.where, f.size, f.mtime_ns] for f in source.files]] for source in sources],
                        *([list(ids)] if ids else [])])
    folder = cache_dir / f"table-{hashlib.sha256(asked.encode()).hexdigest()[:32]}"
    return folder, once(folder, lambda: kept_facts(folder), lambda: look(data, sources, folder, ids))


def kept_facts(folder: Path) -> Facts | None:
    """None where there are none, or where a file that is to be mapped is gone or has another length: mapped, it would
    end the process."""
    try:
        facts = FORM.validate_json((folder / FACTS).read_bytes())
        mapped = [file for part in facts.parts if part.is_mapped for file in part.files]
        return facts if all(Path(file.where).stat().st_size == file.size for file in mapped) else None
    except (OSError, ValueError):
        return None


def sources_of(data: Any) -> list[Part]:
    """With weights, one source an entry of data.path; else all of it is one."""
    entries = [(path,) for path in data.path] if data.weights else [data.path]
    sources = [Part(tuple(find("data.path", entry))) for entry in entries]
    return sources + ([Part(tuple(find("data.eval_path", data.eval_path)), is_eval=True)] if data.eval_path else [])


def look(data: Any, sources: Sequence[Part], folder: Path, ids: Mapping[str, str] = NO_IDS) -> Facts:
    """Every file is looked at, and converted where that is the way; then the facts are kept."""
    first = sources[0].files[0]
    schema = schema_of(data.format, first)
    columns = choose("data.path", first.name, schema, data.columns, tuple(ids))
    columns += [column_of_ids(key, first.name, field_of(key, first.name, schema, name)) for name, key in ids.items()]
    names = [column.name for column in columns]
    found = [all_contents(data.format, source.files, names) for source in sources]
    if not all(lies_as_ids(schema.field(name).type) for name in ids):
        found = [[replace(content, is_plain=False) for content in of_source] for of_source in found]
    for source, of_source in zip(sources, found):
        for file, content in zip(source.files, of_source):
            if data.format == "csv":  # its types are guesses; the conversion says what does not fit
                content = replace(content, schema=guessed_alike(content.schema, schema))
            check_same(source.key, first.name, schema, file.name, content.schema, names, not data.columns)
    shuffle_by = way(data, [content for of_source in found for content in of_source],
                     [file for source in sources for file in source.files])
    is_plain = data.format == "arrow" and all(content.is_plain for of_source in found for content in of_source)
    if data.format == "csv" or (shuffle_by == "rows" and data.shuffle and not is_plain):
        columns, parts, digests = converted(data.format, sources, columns, schema, folder, ids)
    else:
        parts = [replace(source, blocks=blocks_of(of_source), is_mapped=is_plain)
                 for source, of_source in zip(sources, found)]
        digests = []
    for part, source in zip(parts, sources):
        if not part.num_rows:
            names_of = ", ".join(file.name for file in source.files[:3])
            raise UserError(f"{source.key}: {names_of} has no rows; give a table with at least one.")
    if data.format != "csv":
        digests = [content.digest for of_source in found for content in of_source]
    said = json.dumps([data.format, shuffle_by, [told_of(column) for column in columns],
                       [len(part.files) for part in parts], digests])
    unused = tuple(f"{field.name} ({field.type})" for field in schema if field.name not in names)
    facts = Facts(data.format, hashlib.sha256(said.encode()).hexdigest()[:32], shuffle_by, tuple(columns), tuple(parts),
                  unused)
    write_atomically(folder / FACTS, FORM.dump_json(facts))
    return facts


def told_of(column: Column) -> dict[str, Any]:
    return {key: value for key, value in asdict(column).items() if key in ("name", "dtype", "width") or value}


def all_contents(kind: str, files: Sequence[File], names: Sequence[str]) -> list[Contents]:
    if all(file.is_local for file in files):
        return [contents(kind, file, names) for file in files]
    with ThreadPoolExecutor(REMOTE_READERS) as pool:
        return list(pool.map(lambda file: contents(kind, file, names), files))


def guessed_alike(guessed: pa.Schema, schema: pa.Schema) -> pa.Schema:
    """A CSV's guess, numbers of another kind taken for those of the first file."""
    def alike(field: pa.Field) -> pa.Field:
        was = schema.field(field.name) if schema.names.count(field.name) == 1 else field
        both = column_of(was) and (column_of(field) or pa.types.is_null(field.type))
        return was if both else field

    return pa.schema([alike(field) for field in guessed])


def way(data: Any, found: Sequence[Contents], files: Sequence[File]) -> str:
    """How rows are shuffled: as the recipe says, else together where any row is cheap to read or can be made so."""
    if data.shuffle_by != "auto":
        return data.shuffle_by
    if data.format == "csv" or all(content.is_plain for content in found):
        return "rows"
    return "rows" if data.shuffle and sum(file.size for file in files) <= CONVERT_BYTES else "blocks"


def blocks_of(found: Sequence[Contents]) -> tuple[tuple[int, int, int, int], ...]:
    blocks = []
    for file, content in enumerate(found):
        first_row = 0
        for unit, rows in enumerate(content.rows):
            if rows:
                blocks.append((file, unit, first_row, rows))
            first_row += rows
    return tuple(blocks)


def converted(kind: str, sources: Sequence[Part], columns: Sequence[Column], schema: pa.Schema, folder: Path,
              ids: Mapping[str, str]) -> tuple[list[Column], list[Part], list[str]]:
    """Every source as one mapped file. A CSV's column of whole numbers becomes one of fractions if a later row has any.
    """
    types = {column.name: schema.field(column.name).type for column in columns}
    while True:
        try:
            parts, digests = [], []
            for number, source in enumerate(sources):
                target = folder / f"part-{number}.arrow"
                rows, digest = write(arrays_of(kind, source.files, columns, types), columns, target)
                blocks = tuple((0, unit, 0, num) for unit, num in enumerate(rows))
                parts.append(Part((File(str(target), target.stat().st_size, 0),), blocks, True, source.is_eval))
                digests.append(digest)
            return list(columns), parts, digests
        except TooNarrow as narrow:
            name = narrow.args[0]
            if name in ids:
                raise narrow.of_ids(ids[name]) from narrow
            types[name] = pa.float64()
            columns = [replace(column, dtype="float64") if column.name == name else column for column in columns]
