"""What the rows of embedding tables take of their owners' memory and disk. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from elastic.humanize import count, size
from elastic.planning.costs import FLOAT, owned_bytes
from elastic.tables.features import Tables
from elastic.tables.spec import TableSpec

HEAD_BYTES, INDEX_BYTES = 16, 17  # of a row: id, count and last step; and its share of the index, about


def row_bytes(spec: TableSpec) -> int:
    """Of one row with its optimizer's slots, once."""
    return HEAD_BYTES + FLOAT * (spec.width + spec.num_slots) + INDEX_BYTES


def disk_bytes(tables: Tables, spec: TableSpec) -> int:
    """Of one row's, what may lie on disk, once."""
    return FLOAT * (spec.width + spec.num_slots) if tables.disk_path and not spec.vocabulary else 0


def most_rows(spec: TableSpec) -> int:
    """That a table can have; 0 where nothing bounds it."""
    if spec.vocabulary and spec.max_rows:
        return min(spec.vocabulary, spec.max_rows)
    return spec.vocabulary or spec.max_rows


def bounded_bytes(tables: Tables | None) -> int:
    """Of all rows that tables of bounded size can have, each once."""
    return sum(most_rows(spec) * row_bytes(spec) for spec in tables.specs) if tables else 0


def lines(tables: Tables | None, least: int, most: int) -> Iterator[str]:
    """A line for every table, by the fewest and the most owners that there will be, and one for the disk."""
    if tables is None:
        return
    for spec in tables.specs:
        each, rows = row_bytes(spec), most_rows(spec)
        cold = disk_bytes(tables, spec)
        places = f", {cold} of them in memory or on disk" if cold else ""
        copies = ", and as many again with its twin" if tables.twin and most > 1 else ""
        about = f"table {spec.name}: a row of width {spec.width} takes {each} bytes{places}{copies}"
        if not rows:
            what = "1 GB of memory, for the index," if cold else "1 GB"
            yield (f"{about}; it grows as ids appear: {what} on each of {count(most, 'owner')} holds "
                   f"{1e3 / owned_bytes(each - cold, most, tables.twin):.1f} million.")
            continue
        shares = [f"{share(tables, rows, each, cold, members)} an owner of {members}" for members in sorted({least, most})]
        yield f"{about}; at most {count(rows, 'row')}, {', '.join(shares)}."
    if tables.disk_path:
        yield (f"tables: {size(tables.memory_bytes)} of a worker's memory for rows and index, the longest unused rows "
               f"beyond it in {tables.disk_path}.")


def share(tables: Tables, rows: int, each: int, cold: int, members: int) -> str:
    """What an owner holds of so many rows: all of it, and how much of that at least in memory, at most on disk."""
    total, away = (owned_bytes(rows * part, members, tables.twin) for part in (each, cold))
    away = min(away, max(0.0, total - tables.memory_bytes))
    return f"{size(total - away)} in memory and {size(away)} on disk for" if away else size(total)
