"""What the rows of embedding tables take of their owners' memory. Pure."""

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


def most_rows(spec: TableSpec) -> int:
    """That a table can have; 0 where nothing bounds it."""
    if spec.vocabulary and spec.max_rows:
        return min(spec.vocabulary, spec.max_rows)
    return spec.vocabulary or spec.max_rows


def bounded_bytes(tables: Tables | None) -> int:
    """Of all rows that tables of bounded size can have, each once."""
    return sum(most_rows(spec) * row_bytes(spec) for spec in tables.specs) if tables else 0


def lines(tables: Tables | None, least: int, most: int) -> Iterator[str]:
    """A line for every table, by the fewest and the most owners that there will be."""
    for spec in tables.specs if tables else ():
        each, rows = row_bytes(spec), most_rows(spec)
        assert tables is not None
        copies = ", and as many again with its twin" if tables.twin and most > 1 else ""
        about = f"table {spec.name}: a row of width {spec.width} takes {each} bytes{copies}"
        if not rows:
            yield (f"{about}; it grows as ids appear: 1 GB on each of {count(most, 'owner')} holds "
                   f"{1e3 / owned_bytes(each, most, tables.twin):.1f} million.")
            continue
        shares = [f"{size(owned_bytes(rows * each, members, tables.twin))} an owner of {members}"
                  for members in sorted({least, most})]
        yield f"{about}; at most {count(rows, 'row')}, {', '.join(shares)}."
