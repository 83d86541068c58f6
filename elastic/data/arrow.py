"""Tokens in an Arrow IPC file: one column, one record batch, memory-mapped, so that a window is a slice and costs no copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from elastic.errors import UserError
from elastic.storage.atomic import write_atomically

FORMAT = "1"


def write_tokens(path: Path, tokens: np.ndarray) -> None:
    """Writes a one-dimensional integer array; it must fit into memory."""
    schema = pa.schema([pa.field("token", pa.from_numpy_dtype(tokens.dtype), nullable=False)],
                       metadata={"format": FORMAT})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(tokens)], schema=schema))
    write_atomically(path, sink.getvalue())


def read_tokens(path: str | Path) -> np.ndarray:
    """The tokens as a read-only view of the mapped file."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        column = reader.get_batch(0).column(0)
    except (OSError, pa.ArrowInvalid, IndexError) as error:
        raise UserError(f"The token file {path} cannot be read ({error}); delete its folder, it is made again.") from error
    return column.to_numpy(zero_copy_only=True)
