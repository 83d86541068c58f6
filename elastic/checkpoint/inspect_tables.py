"""A look into the embedding tables of checkpoints: what one consists of, one row, and how two differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
from rich.table import Table
from rich.text import Text

from elastic.checkpoint.hashing import table_digests
from elastic.checkpoint.inspect import Difference, table, values_apart
from elastic.checkpoint.manager import check_sizes, folder_of, open_tables
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.state_hash import add_table
from elastic.checkpoint.table_reader import TableReader
from elastic.errors import BadCheckpoint, UserError
from elastic.humanize import size
from elastic.storage.store import Store
from elastic.tables.bags import check_ids
from elastic.tables.buckets import buckets_of
from elastic.tables.rows import Rows
from elastic.tables.spec import TableSpec


def chosen(store: Store, name: str, manifest: Manifest, wanted: str) -> tuple[TableReader, TableSpec]:
    """UserError where the checkpoint has no such table; BadCheckpoint where it is not whole."""
    check_sizes(store, name, manifest)
    reader = open_tables(store, name, manifest)
    specs = reader.specs()
    if wanted not in specs:
        there = f"it has {', '.join(specs)}" if specs else "it has none"
        raise UserError(f"--table {wanted}: {name} has no embedding table of this name; {there}.")
    return reader, specs[wanted]


def shown(facts: Mapping[str, str]) -> Table:
    out = table("", "")
    for key, value in facts.items():
        out.add_row(key, Text(value))
    return out


def table_facts(reader: TableReader, spec: TableSpec) -> dict[str, str]:
    """What a table holds, as words. All of its rows are read."""
    stored, waiting, lasts, num_bytes = 0, 0, list[int](), 0
    steps = set[int]()
    for bucket, rows in reader.rows(spec.name):
        steps.update(reader.chain(spec.name, bucket))
        stored, waiting, num_bytes = stored + rows.ids.size, waiting + rows.waiting_ids.size, num_bytes + rows.nbytes
        for ages in (rows.lasts, rows.waiting_lasts):
            lasts += [int(ages.min()), int(ages.max())] if ages.size else []
    digests, parameters, state = table_digests(reader, spec.name), hashlib.sha256(), hashlib.sha256()
    add_table(parameters, digests, digests.parameters)
    add_table(state, digests, digests.state)
    files = sum(entry.bytes for entry in reader.manifest.tables if entry.table == spec.name)
    return {"table": spec.name, "step": str(reader.manifest.step), "width": str(spec.width),
            "optimizer": f"{spec.optimizer}, {spec.num_slots} numbers a row",
            "ids": f"0 to {spec.vocabulary - 1}" if spec.vocabulary else "any",
            "rows": str(stored), "waiting": f"{waiting} ids not yet admitted",
            "bytes of rows": f"{size(num_bytes)} ({num_bytes} bytes)",
            "bytes of files": f"{size(files)} ({files} bytes)", "buckets": str(spec.num_buckets),
            "last updates": f"steps {min(lasts)} to {max(lasts)}" if lasts else "none",
            "made of": ", ".join(map(folder_of, sorted(steps))),
            "sha256 of ids and values": parameters.hexdigest(), "sha256 of all": state.hexdigest()}


def row_facts(reader: TableReader, spec: TableSpec, id: int) -> dict[str, str]:
    """What a table holds of one id, as words. Its bucket alone is read."""
    if not -1 << 63 <= id < 1 << 63:
        raise UserError(f"--id {id} is not in the range of 64-bit integers, -2^63 to 2^63 - 1.")
    wanted = np.array([id], np.int64)
    check_ids(spec, wanted)
    bucket = int(buckets_of(spec, wanted)[0])
    (_, rows), = reader.rows(spec.name, [bucket])
    found = {"table": spec.name, "step": str(reader.manifest.step), "id": str(id), "bucket": str(bucket)}
    for ids, counts, lasts in ((rows.ids, rows.counts, rows.lasts),
                               (rows.waiting_ids, rows.waiting_counts, rows.waiting_lasts)):
        at = int(np.searchsorted(ids, id))
        if at < ids.size and ids[at] == id:
            is_stored = ids is rows.ids
            values = {"vector": listed(rows.values[at]), "slots": listed(rows.slots[at])} if is_stored else {}
            return found | {"state": "stored" if is_stored else "waiting to be admitted", "count": str(counts[at]),
                            "last update": f"step {lasts[at]}", **values}
    return found | {"state": "not stored: it has its starting row"}


def listed(values: np.ndarray) -> str:
    return " ".join(f"{value:.9g}" for value in values.tolist()) or "none"


def file_table(store: Store, name: str, manifest: Manifest) -> tuple[list[Table], bool]:
    """A checkpoint's files of tables, and whether each, and all that they build on, is there in full length."""
    if not manifest.tables:
        return [], True
    out, whole = table("file of rows", ">bytes", "table", ">buckets", "builds on", "hash", ""), True
    for entry in manifest.tables:
        found = store.size(f"{name}/{entry.name}")
        problem = "missing" if found is None else "" if found == entry.bytes else f"has {found} bytes"
        bases = sorted({base for base in entry.bases if base >= 0})
        whole = whole and not problem
        out.add_row(Text(entry.name), str(entry.bytes), Text(entry.table), str(len(entry.buckets)),
                    ", ".join(map(folder_of, bases)) or "nothing", entry.hash, Text(problem, "bold red"))
    try:
        open_tables(store, name, manifest)
    except BadCheckpoint as error:
        return [out, shown({"not whole": str(error)})], False
    return [out], whole


def table_differences(readers: tuple[TableReader, TableReader]) -> tuple[list[Difference], int]:
    """Tables that are not the same in both checkpoints, named table/NAME, and how many are the same to the bit."""
    a, b = (reader.specs() for reader in readers)
    found, num_same = [], 0
    for name in sorted({*a, *b}):
        if name not in a or name not in b:
            found.append(Difference(f"table/{name}", f"only in {'A' if name in a else 'B'}"))
        elif a[name] != b[name]:
            kinds = [f"width {spec.width}, {spec.optimizer}, {spec.num_buckets} buckets" for spec in (a[name], b[name])]
            found.append(Difference(f"table/{name}", f"{kinds[0]} in A, {kinds[1]} in B"))
        elif difference := rows_differ(readers, name):
            found.append(difference)
        else:
            num_same += 1
    return found, num_same


def rows_differ(readers: tuple[TableReader, TableReader], name: str) -> Difference | None:
    """None where all is the same. Elements are ids; the largest distance is between values of ids that both store."""
    total, apart, largest = 0, 0, 0.0
    for (_, left), (_, right) in zip(readers[0].rows(name), readers[1].rows(name), strict=True):
        one, other = dict(by_id(left)), dict(by_id(right))
        total += len({*one, *other})
        apart += sum(one.get(id) != other.get(id) for id in {*one, *other})
        ids, mine, theirs = np.intersect1d(left.ids, right.ids, return_indices=True)
        if ids.size:
            largest = float(np.maximum(largest, values_apart(left.values[mine].reshape(-1),
                                                             right.values[theirs].reshape(-1))[1]))
    return Difference(f"table/{name}", "", total, apart, largest) if apart else None


def by_id(rows: Rows) -> Iterator[tuple[int, tuple[bytes, ...]]]:
    """All that a bucket says of each id."""
    for ids, *columns in (rows.arrays[:5], rows.arrays[5:]):
        for at, id in enumerate(ids.tolist()):
            yield id, tuple(column[at].tobytes() for column in columns)
