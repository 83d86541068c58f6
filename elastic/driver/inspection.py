"""`elastic inspect`: one checkpoint, one of its embedding tables or rows, or two checkpoints side by side."""

from __future__ import annotations

from rich.table import Table

from elastic.checkpoint import inspect, inspect_tables
from elastic.checkpoint.hashing import hashes
from elastic.checkpoint.manager import open_tables, read_manifest
from elastic.checkpoint.manifest import Manifest
from elastic.errors import BadCheckpoint
from elastic.storage.store import Store

Place = tuple[Store, str]
Look = tuple[list[Table], str, bool]  # what is to be shown, a sentence, and whether all is well


def looked_into(place: Place, table: str = "", id: int | None = None) -> Look:
    """Without a table only names and lengths are looked at, and where there are tables all bytes, for the hashes."""
    manifest = read_manifest(*place)
    if table:
        reader, spec = inspect_tables.chosen(*place, manifest, table)
        found = inspect_tables.table_facts(reader, spec) if id is None else inspect_tables.row_facts(reader, spec, id)
        return [inspect_tables.shown(found)], "every byte of it has the hash that the manifest states", True
    tables, whole = inspect.tables(*place, manifest)
    more, too = inspect_tables.file_table(*place, manifest)
    whole = whole and too
    if whole and manifest.tables:
        found, whole = hashed(place, manifest)
        more.append(inspect_tables.shown(found))
    return [*tables, *more], "every file is there in full length" if whole else "not whole", whole


def hashed(place: Place, manifest: Manifest) -> tuple[dict[str, str], bool]:
    try:
        return dict(zip(("parameters_sha256", "state_sha256"), hashes(*place, manifest))), True
    except BadCheckpoint as error:
        return {"not whole": str(error)}, False


def compared(one: Place, other: Place) -> Look:
    """What differs in arrays and tables. BadCheckpoint where one of them is not whole."""
    manifests = read_manifest(*one), read_manifest(*other)
    found, num_same = inspect.differences(one, other)
    readers = open_tables(*one, manifests[0]), open_tables(*other, manifests[1])
    more, same = inspect_tables.table_differences(readers)
    tables, verdict = inspect.diff_tables(manifests, [*found, *more], num_same + same)
    return tables, verdict, True
