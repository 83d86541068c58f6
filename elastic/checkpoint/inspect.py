"""A look into checkpoints: what one consists of, and how two differ. Pure but for reading; `tables` and `diff_tables` show it."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from elastic.buffers import wide
from elastic.checkpoint.manager import read_sound
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.reader import Reader, read_arrays
from elastic.humanize import count, numbers, size
from elastic.storage.store import Store

BLOCK = 1 << 20  # elements that are compared at a time: the wide copies of a block are small


@dataclass(frozen=True)
class ArrayRow:
    """One array, whole; the numbers of the files that hold its pieces, from 1 in the manifest's order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    files: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """An array of two checkpoints that is not the same in both. `reason` is "" where only values differ."""

    name: str
    reason: str
    num_elements: int = 0
    num_different: int = 0
    max_abs: float = 0.0


def facts(manifest: Manifest) -> dict[str, str]:
    """What a checkpoint says of itself, as words."""
    return {"step": str(manifest.step), "generation": str(manifest.generation), "cursor": f"{manifest.cursor} samples",
            "seed": str(manifest.seed), "evaluation": numbers(dict(manifest.eval)) or "none",
            "recipe": recipe_name(manifest.recipe),
            "arrays": str(len({piece.name for file in manifest.files for piece in file.pieces})),
            **({"tables": ", ".join(sorted({entry.table for entry in manifest.tables}))} if manifest.tables else {}),
            "files": str(len(manifest.sizes)), "size": f"{size(manifest.bytes)} ({manifest.bytes} bytes)"}


def recipe_name(text: str) -> str:
    """run.name of a recipe, whether this version could train it or not."""
    try:
        return str(tomllib.loads(text).get("run", {}).get("name", "")) or "unnamed"
    except (tomllib.TOMLDecodeError, AttributeError):
        return "not readable"


def array_rows(manifest: Manifest) -> list[ArrayRow]:
    """Every array once, by name."""
    found: dict[str, ArrayRow] = {}
    for number, file in enumerate(manifest.files, 1):
        for piece in file.pieces:
            old = found.get(piece.name, ArrayRow(piece.name, piece.dtype, piece.shape, 0, ()))
            found[piece.name] = ArrayRow(piece.name, piece.dtype, piece.shape, old.bytes + piece.bytes,
                                         (*old.files, number))
    return [found[name] for name in sorted(found)]


def differences(one: tuple[Store, str], other: tuple[Store, str]) -> tuple[list[Difference], int]:
    """Arrays that are not the same in both checkpoints, by name, and how many are the same to the bit. One pair is in
    memory at a time."""
    readers = [Reader(*place, read_sound(*place)) for place in (one, other)]
    a, b = ({row.name: row for row in array_rows(reader.manifest)} for reader in readers)
    found, num_same = [], 0
    for name in sorted({*a, *b}):
        difference = kinds_apart(name, a, b) or values_differ(name,
                                                              *(read_arrays(reader, [name])[name]
                                                                for reader in readers))
        num_same += difference is None
        found += [difference] if difference else []
    return found, num_same


def kinds_apart(name: str, a: Mapping[str, ArrayRow], b: Mapping[str, ArrayRow]) -> Difference | None:
    """What keeps two arrays from being compared."""
    if name not in a or name not in b:
        return Difference(name, f"only in {'A' if name in a else 'B'}", math.prod((a if name in a else b)[name].shape))
    left, right = a[name], b[name]
    if left.dtype != right.dtype:
        return Difference(name, f"{left.dtype} in A, {right.dtype} in B", math.prod(left.shape))
    if left.shape != right.shape:
        return Difference(name, f"shape {list(left.shape)} in A, {list(right.shape)} in B", math.prod(left.shape))
    return None


def values_differ(name: str, left: np.ndarray, right: np.ndarray) -> Difference | None:
    num_different, largest = values_apart(left.reshape(-1), right.reshape(-1))
    return Difference(name, "", left.size, num_different, largest) if num_different else None


def values_apart(left: np.ndarray, right: np.ndarray) -> tuple[int, float]:
    """How many elements differ in any bit (-0 is not 0), and the largest distance; NaN where a number stands against a
    NaN."""
    num_different, largest = 0, 0.0
    bits = f"u{min(left.dtype.itemsize, 8)}"  # a wider number is two
    for low in range(0, len(left), BLOCK):
        x, y = left[low:low + BLOCK], right[low:low + BLOCK]
        apart = (x.view(bits) != y.view(bits)).reshape(len(x), -1).any(1)
        if apart.any():
            num_different += int(np.count_nonzero(apart))
            largest = float(np.maximum(largest, distance(x[apart], y[apart])))  # np.maximum passes NaN on
    return num_different, largest


def distance(x: np.ndarray, y: np.ndarray) -> float:
    if x.dtype.kind in "fcV":
        with np.errstate(invalid="ignore"):  # of two infinities
            return float(np.abs(wide(x) - wide(y)).max())
    low, high = np.minimum(x, y), np.maximum(x, y)
    # modulo 2^64, which a difference never reaches
    return float((high.astype(np.uint64) - low.astype(np.uint64)).max())


def tables(store: Store, name: str, manifest: Manifest) -> tuple[list[Table], bool]:
    """The tables of one checkpoint, and whether every file is there in full length. The bytes themselves are not read.
    """
    head = table("", "")
    for key, value in facts(manifest).items():
        head.add_row(key, Text(value))
    parts, whole = table(">", "file", ">bytes", ">arrays", "hash", ""), True
    for number, file in enumerate(manifest.files, 1):
        found = store.size(f"{name}/{file.name}")
        problem = "missing" if found is None else "" if found == file.bytes else f"has {found} bytes"
        whole = whole and not problem
        parts.add_row(str(number), Text(file.name), str(file.bytes), str(len(file.pieces)), file.hash,
                      Text(problem, "bold red"))
    arrays = table("array", "dtype", "shape", ">bytes", "file")
    for row in array_rows(manifest):
        shape = Text(" x ".join(map(str, row.shape)) or "scalar")
        arrays.add_row(Text(row.name), row.dtype, shape, str(row.bytes), ", ".join(map(str, row.files)))
    return [head, parts, arrays], whole


def diff_tables(manifests: tuple[Manifest, Manifest], found: list[Difference],
                num_same: int) -> tuple[list[Table], str]:
    """Both heads side by side, what differs, and one sentence that sums it up."""
    head = table("", "A", "B")
    for key, (a, b) in {key: (a, facts(manifests[1])[key]) for key, a in facts(manifests[0]).items()}.items():
        head.add_row(key, Text(a), Text(b, "" if a == b else "yellow"))
    rows = table("array", ">elements", ">different", ">largest difference", "")
    for d in found:
        numbers_ = ("", "") if d.reason else (str(d.num_different), f"{d.max_abs:.6g}")
        rows.add_row(Text(d.name), str(d.num_elements), *numbers_, Text(d.reason, "yellow"))
    same = f"{count(num_same, 'array')} the same to the bit"
    return [head, *([rows] if found else [])], f"{count(len(found), 'array')} differ{'s' if len(found) == 1 else ''}, {same}"


def table(*columns: str) -> Table:
    """Without lines; ">" before a heading puts its column to the right."""
    out = Table(box=None, pad_edge=False)
    for heading in columns:
        out.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left",
                       overflow="fold")
    return out
