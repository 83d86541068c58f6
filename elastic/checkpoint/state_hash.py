"""The two hashes by which runs are compared (a file's own: `part`), over arrays named as in a checkpoint.

The names are parameter/NAME, optimizer/SLOT/NAME, buffer/NAME.
Each array is one line of JSON, [name, dtype, shape], and then its C-order little-endian bytes. `parameters_sha256`
takes the parameters, by NAME alone and in sorted order. `state_sha256` goes on from there with "optimizer/SLOT/NAME" in
sorted order (moving averages are the slot "ema"), with "buffer/NAME" in sorted order, and ends with the line ["cursor",
CURSOR].

Where there are embedding tables, both have behind the arrays, for each table by name, the line ["table/NAME", width,
BUCKETS] and the digests of its buckets (`elastic.tables.rows`), 32 bytes each: `parameters_sha256` those of ids and
values, `state_sha256`, which goes on from the arrays of parameters alone, those of all that a row has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.tables.held import HeldTables
from elastic.tables.rows import Rows, digests
from elastic.tables.spec import TableSpec

AVERAGE = "optimizer/ema/"  # moving averages, of parameters and buffers
PARAMETER, OPTIMIZER, BUFFER = "parameter/", "optimizer/", "buffer/"
DIGEST = 32  # bytes of a bucket's


@dataclass(frozen=True)
class TableDigests:
    """One table's: (buckets, 32) bytes each, of the parameters and of the state."""

    name: str
    width: int
    parameters: np.ndarray
    state: np.ndarray


def bucket_digests(rows: Rows) -> np.ndarray:
    """(2, 32) bytes: of one whole bucket's parameters, and of its state."""
    return np.frombuffer(bytes.fromhex("".join(digests(rows))), np.uint8).reshape(2, DIGEST)


def owned_digests(held: HeldTables) -> np.ndarray:
    """(tables, buckets, 2, 32) bytes of the buckets that a worker owns, zeros for all others: the sum over all owners has
    every bucket's."""
    found = np.zeros((len(held.specs), held.tables.num_buckets, 2, DIGEST), np.uint8)
    found[:, list(held.owned)] = digests_of(held, held.owned)
    return found


def digests_of(held: HeldTables, buckets: Iterable[int]) -> np.ndarray:
    """(tables, buckets, 2, 32) bytes of some of the buckets that a worker holds."""
    chosen = list(buckets)
    found = [bucket_digests(held.stores[spec.name].export(bucket)) for spec in held.specs for bucket in chosen]
    return np.array(found, np.uint8).reshape(len(held.specs), len(chosen), 2, DIGEST)


def gathered(specs: Sequence[TableSpec], found: np.ndarray) -> list[TableDigests]:
    """The digests of tables, by name, out of the sum of what all owners have."""
    return [TableDigests(spec.name, spec.width, found[number, :, 0], found[number, :, 1])
            for number, spec in enumerate(specs)]


def hashes_of(arrays: Iterable[tuple[str, np.ndarray]], cursor: int, tables: Sequence[TableDigests] = ()
              ) -> tuple[str, str]:
    """(parameters_sha256, state_sha256) in one pass over arrays that come one by one, as `in_order` says, and of tables
    by name."""
    digest, parameters = hashlib.sha256(), ""
    for name, array in arrays:
        is_parameter = name.startswith(PARAMETER)
        if not is_parameter and not parameters:
            parameters = of_parameters(digest, tables)
        head = [name.removeprefix(PARAMETER) if is_parameter else name, array.dtype.name, list(array.shape)]
        digest.update((json.dumps(head) + "\n").encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data)
    parameters = parameters or of_parameters(digest, tables)
    for table in tables:
        add_table(digest, table, table.state)
    digest.update((json.dumps(["cursor", cursor]) + "\n").encode())
    return parameters, digest.hexdigest()


def of_parameters(arrays: Any, tables: Sequence[TableDigests]) -> str:
    """Of the digest of all parameters that are arrays, which stays as it is."""
    digest = arrays.copy()
    for table in tables:
        add_table(digest, table, table.parameters)
    return str(digest.hexdigest())


def add_table(digest: Any, table: TableDigests, buckets: np.ndarray) -> None:
    digest.update((json.dumps([f"table/{table.name}", table.width, len(buckets)]) + "\n").encode())
    digest.update(np.ascontiguousarray(buckets).tobytes())


def in_order(names: Iterable[str]) -> list[str]:
    """Parameters, then optimizer state, then buffers, each sorted."""
    listed = sorted(names)
    return [name for prefix in (PARAMETER, OPTIMIZER, BUFFER) for name in listed if name.startswith(prefix)]
