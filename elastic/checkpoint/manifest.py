"""The manifest: what a checkpoint consists of, and by its presence that it is whole. Read with suspicion: nothing in it is used,
and nothing is allocated by it, before all of it is checked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from elastic.boxes import Box
from elastic.errors import BadCheckpoint, UserError

FORMAT, PLAIN = 3, 2  # of manifests with tables, and without: those are as they were before there were tables
CHUNK = 4 * 1024 * 1024  # bytes: what is hashed, read and checked in one piece
MAX_CHUNK = 1 << 30
MAX_BYTES = 1 << 26  # of a manifest; a million arrays need less
MAX_BUCKETS = 1 << 24  # of one table
MAX_PIECES = 10_000  # of one array that is not cut into runs; each is compared with each
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8,
              "uint32": 4,
              "uint16": 2, "uint8": 1, "bool": 1, "bfloat16": 2, "complex64": 8, "complex128": 16}


@dataclass(frozen=True)
class Piece:
    """A box of one named array, as it lies in one file. The whole array is the box that starts at 0 and counts `shape`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]  # of the whole array
    start: tuple[int, ...]
    count: tuple[int, ...]
    offset: int = 0  # bytes from the file's start; a multiple of an element's size

    @property
    def bytes(self) -> int:
        return math.prod(self.count) * ITEM_BYTES[self.dtype]

    @property
    def box(self) -> Box:
        return Box(self.shape, self.start, self.count)


@dataclass(frozen=True)
class FileEntry:
    """One part file. `hash` is the xxh3-128 of all of it, `chunks` those of its pieces of `Manifest.chunk_bytes`, in
    hex."""

    name: str
    bytes: int
    hash: str
    chunks: tuple[str, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class TableEntry:
    """One owner's file of one table (`table_file` says what is in it). `hash` is of all of it. Of bucket `buckets[i]` are
    `sizes[i]` bytes from `offsets[i]` on, which have the hash `hashes[i]`, and build on the checkpoint of step `bases[i]`;
    -1: they are all of the bucket."""

    name: str
    bytes: int
    hash: str
    table: str
    width: int
    optimizer: str
    vocabulary: int
    num_buckets: int
    buckets: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    hashes: tuple[str, ...]
    bases: tuple[int, ...]

    @property
    def kind(self) -> tuple[int, str, int, int]:
        """What all files of a table have in common."""
        return self.width, self.optimizer, self.vocabulary, self.num_buckets


LISTS = ("buckets", "offsets", "sizes", "hashes", "bases")


@dataclass(frozen=True)
class Manifest:
    """`cursor` is the next sample position; all that is random follows from it and `seed`. `eval`: the last evaluation.

    `extra`: plain values of whoever saves; "lines" are lines of metrics.jsonl that may not be on disk.
    """

    step: int
    generation: int
    cursor: int
    seed: int
    recipe: str
    files: tuple[FileEntry, ...] = ()
    chunk_bytes: int = CHUNK
    eval: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[TableEntry, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of every file by its name."""
        return {file.name: file.bytes for file in self.files} | {file.name: file.bytes for file in self.tables}

    @property
    def bases(self) -> set[int]:
        """The steps of the checkpoints that this one builds on."""
        return {base for entry in self.tables for base in entry.bases if base >= 0}

    def dumps(self) -> str:
        """Its text, which `parse` reads back; the last word is the hash of all others in canonical JSON."""
        body = {"format": FORMAT if self.tables else PLAIN, **asdict(self)}
        if not self.tables:
            del body["tables"]
        body["eval"] = {name: value for name, value in self.eval.items() if math.isfinite(value)}  # JSON has no others
        return render(body | {"sha256": body_sha256(body)})


def render(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def body_sha256(body: Mapping[str, Any]) -> str:
    """Over the JSON with sorted keys and no spaces, without "sha256" itself."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def parse(text: str | bytes) -> Manifest:
    """The manifest of a text. BadCheckpoint with one sentence for anything that is not exactly what `dumps` writes.

    UserError for a whole one of a newer format.
    """
    need(len(text) <= MAX_BYTES, f"the manifest has {len(text)} bytes, more than {MAX_BYTES}")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"The manifest is not JSON ({str(error)[:80]}).") from error
    need(isinstance(body, dict), "the manifest is not a JSON object")
    found = body.get("format")
    need(type(found) is int, f"the manifest's format {found!r} is not a number")
    try:
        same = body.get("sha256") == body_sha256(body) and text == render(body)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"The manifest holds values that JSON has not ({str(error)[:80]}).") from error
    if found > FORMAT and same:  # whole, and not for this version: to take an older one would throw its steps away
        raise UserError(f"The checkpoint has format {found}, newer than {FORMAT}, the newest that this version reads; "
                        "install the version of this package that wrote it.")
    need(same, "the manifest does not have the hash that it states")
    need(found in (FORMAT, PLAIN), f"the checkpoint has format {found}, which this version does not know")
    manifest = build(body if found == FORMAT else {**body, "tables": []})
    check_pieces(manifest)
    check_tables(manifest)
    return manifest


def folder_of(step: int) -> str:
    """The name of a checkpoint."""
    return f"step-{step:08d}"


def need(truth: bool, otherwise: str) -> None:
    if not truth:
        raise BadCheckpoint(otherwise[0].upper() + otherwise[1:] + ".")


def build(body: Mapping[str, Any]) -> Manifest:
    """From JSON values of the right types, nothing missing and nothing more."""
    check_keys(body, Manifest, "the manifest", ("format", "sha256"))
    for key in ("step", "generation", "cursor", "seed"):
        check_count(body[key], key)
    need(isinstance(body["recipe"], str), "the manifest's recipe is not a text")
    for key in ("eval", "extra"):
        need(isinstance(body[key], dict), f"the manifest's {key} is not a JSON object")
    need(all(type(value) in (int, float) for value in body["eval"].values()),
         "the manifest's eval holds something that is no number")
    for key in ("files", "tables"):
        need(isinstance(body[key], list), f"the manifest's {key} are not a list")
    check_count(body["chunk_bytes"], "chunk_bytes")
    need(0 < body["chunk_bytes"] <= MAX_CHUNK and body["chunk_bytes"] % 8 == 0,
         "the manifest's chunk_bytes is no multiple of 8 up to 1 GiB")
    values = {f.name: body[f.name] for f in fields(Manifest)}
    return Manifest(**{**values, "files": tuple(build_file(entry, body["chunk_bytes"]) for entry in body["files"]),
                       "tables": tuple(build_table(entry) for entry in body["tables"])})


def build_file(value: Any, chunk_bytes: int) -> FileEntry:
    """One file's entry from JSON values."""
    check_keys(value, FileEntry, "a file's entry")
    name = checked_name(value)
    need(isinstance(value["chunks"], list) and all(is_hash(h) for h in (value["hash"], *value["chunks"])),
         f"a hash of {name} is not an xxh3-128")
    need(len(value["chunks"]) == -(-value["bytes"] // chunk_bytes),
         f"{name} has another number of chunk hashes than chunks")
    need(isinstance(value["pieces"], list), f"the arrays of {name} are not a list")
    pieces = tuple(build_piece(piece, name) for piece in value["pieces"])
    need(sum(piece.bytes for piece in pieces) <= value["bytes"],
         f"the arrays of {name} are larger than its {value['bytes']} bytes")
    ends = [0]
    for piece in sorted(pieces, key=lambda piece: (piece.offset, piece.bytes)):
        need(ends[-1] <= piece.offset and piece.offset + piece.bytes <= value["bytes"],
             f"{piece.name} lies outside of {name} or on another array")
        ends.append(piece.offset + piece.bytes)
    return FileEntry(name, value["bytes"], value["hash"], tuple(value["chunks"]), pieces)


def checked_name(value: Mapping[str, Any]) -> str:
    """Of a file, whose size is a number."""
    name = value["name"]
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
    need(plain, f"the manifest names the file {name!r}, which is not a plain name inside the checkpoint")
    check_count(value["bytes"], f"size of {name}")
    return name


def build_table(value: Any) -> TableEntry:
    """One table file's entry from JSON values."""
    check_keys(value, TableEntry, "a table file's entry")
    name = checked_name(value)
    need(all(isinstance(value[key], str) and value[key] for key in ("table", "optimizer")),
         f"the table or the optimizer of {name} is no text")
    for key in ("width", "vocabulary", "num_buckets"):
        check_count(value[key], f"{key} of {name}")
    need(0 < value["num_buckets"] <= MAX_BUCKETS, f"the table of {name} has {value['num_buckets']} buckets")
    lists = {key: value[key] for key in LISTS}
    need(all(isinstance(found, list) for found in lists.values()), f"the buckets of {name} are not a list")
    buckets, offsets, sizes, hashes, bases = lists.values()
    need(len({*map(len, lists.values())}) == 1, f"the lists of buckets of {name} differ in length")
    need(all(type(n) is int for n in (*buckets, *offsets, *sizes, *bases)), f"a bucket's place in {name} is not a number")
    ends = [low + size for low, size in zip(offsets, sizes)]
    need(all(size > 0 for size in sizes) and all(end <= low for end, low in zip([0, *ends], [*offsets, value["bytes"]])),
         f"the buckets of {name} do not lie one behind the other within its {value['bytes']} bytes")
    need(all(low < high for low, high in zip([-1, *buckets], [*buckets, value["num_buckets"]])),
         f"the buckets of {name} do not rise from 0 to {value['num_buckets'] - 1}")
    need(all(is_hash(h) for h in (value["hash"], *hashes)), f"a hash of {name} is not an xxh3-128")
    need(all(base >= -1 for base in bases), f"{name} builds on a step below 0")
    return TableEntry(**{**value, **{key: tuple(found) for key, found in lists.items()}})


def is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 32 and not set(value) - set("0123456789abcdef")


def build_piece(value: Any, file: str) -> Piece:
    check_keys(value, Piece, f"an array's entry in {file}")
    name, dtype = value["name"], value["dtype"]
    need(isinstance(name, str) and bool(name), f"an array in {file} has the name {name!r}")
    need(isinstance(dtype, str) and dtype in ITEM_BYTES, f"the array {name} has the unknown dtype {dtype!r}")
    shape, start, count = (value[key] for key in ("shape", "start", "count"))
    for sizes in (shape, start, count):
        need(isinstance(sizes, list) and len(sizes) <= 32, f"the shape of {name} is not a list of at most 32 numbers")
        for size in sizes:
            check_count(size, f"shape of {name}")
    sizes = math.prod(n or 1 for n in shape) if 0 in shape else 0  # NumPy refuses them although the array is empty
    need(sizes < 1 << 60, f"the empty array {name} has the shape {shape}, which is larger than any memory")
    need(len(shape) == len(start) == len(count),
         f"the box of {name} in {file} has another number of dims than the array")
    need(all(s + c <= n for s, c, n in zip(start, count, shape, strict=True)),
         f"the box of {name} in {file} reaches out of the array")
    check_count(value["offset"], f"offset of {name}")
    need(value["offset"] % ITEM_BYTES[dtype] == 0,
         f"the offset of {name} in {file} is not a multiple of its element's size")
    return Piece(name, dtype, tuple(shape), tuple(start), tuple(count), value["offset"])


def check_keys(value: Any, kind: type, what: str, more: tuple[str, ...] = ()) -> None:
    keys = {f.name for f in fields(kind)} | set(more)
    need(isinstance(value, dict) and set(value) == keys, f"{what} does not have the keys {', '.join(sorted(keys))}")


def check_count(value: Any, what: str) -> None:
    need(type(value) is int and 0 <= value < 1 << 63,
         f"the manifest's {what} is {str(value)[:40]}, not a number from 0 to 2^63 - 1")


def check_pieces(manifest: Manifest) -> None:
    """Every file once; every array of one dtype and shape, and its pieces cover it, none of it twice."""
    need(len(manifest.sizes) == len(manifest.files) + len(manifest.tables), "the manifest names a file twice")
    arrays: dict[str, list[Piece]] = {}
    for file in manifest.files:
        for piece in file.pieces:
            arrays.setdefault(piece.name, []).append(piece)
    for name, pieces in arrays.items():
        first = pieces[0]
        need(all((p.dtype, p.shape) == (first.dtype, first.shape) for p in pieces),
             f"the array {name} has two dtypes or shapes")
        need(sum(math.prod(p.count) for p in pieces) == math.prod(first.shape),
             f"the pieces of {name} do not make up the whole array")
        need(are_apart(pieces), f"two pieces of {name} overlap")


def check_tables(manifest: Manifest) -> None:
    """Every bucket of every table is in one file, and builds on older checkpoints alone."""
    tables: dict[str, list[TableEntry]] = {}
    for entry in manifest.tables:
        tables.setdefault(entry.table, []).append(entry)
    for name, entries in tables.items():
        first = entries[0]
        need(all(entry.kind == first.kind for entry in entries), f"the files of table {name} are of two tables")
        buckets = [bucket for entry in entries for bucket in entry.buckets]
        need(len(set(buckets)) == len(buckets), f"a bucket of table {name} is in two files")
        missing = sorted(set(range(first.num_buckets)).difference(buckets))[:1] if len(buckets) < first.num_buckets else []
        need(not missing, f"bucket {missing} of table {name} is in no file")
    need(all(base < manifest.step for base in manifest.bases), f"step {manifest.step} builds on a later one")


def without(entry: TableEntry, buckets: Container[int]) -> TableEntry:
    """The entry as if these were not in its file."""
    kept = [number for number, bucket in enumerate(entry.buckets) if bucket not in buckets]
    lists: dict[str, Any] = {key: tuple(getattr(entry, key)[number] for number in kept) for key in LISTS}
    return replace(entry, **lists)


def are_apart(pieces: list[Piece]) -> bool:
    """No element is in two of them."""
    boxes = [piece.box for piece in pieces if piece.bytes]
    runs = [box.run for box in boxes]
    if None not in runs:
        ordered = sorted(run for run in runs if run)
        return all(one[1] <= two[0] for one, two in zip(ordered, ordered[1:], strict=False))
    need(len(pieces) <= MAX_PIECES, f"{pieces[0].name} has {len(pieces)} pieces, more than {MAX_PIECES}")
    return all(not p.meet(q) for n, p in enumerate(boxes) for q in boxes[:n])
