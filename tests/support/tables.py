"""Tables on disk, and the recipes that train from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from elastic.recipe import Recipe, parse
from tests.support.inprocess import MODULES, merged


def rows(size: int, first: int = 0) -> pa.Table:
    """Row i is (i, a list of six numbers drawn from i, their weighted sum, its sign, a word)."""
    x = np.random.default_rng(size + first).standard_normal((size, 6)).astype(np.float32)
    y = x @ np.arange(6, dtype=np.float32)
    return pa.table({"id": np.arange(first, first + size),
                     "x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 6),
                     "y": pa.FixedSizeListArray.from_arrays(pa.array(y), 1), "up": y > 0,
                     "word": [f"row {n}" for n in range(size)]})


def write(file: Path, table: pa.Table, group: int = 700, **options: Any) -> Path:
    """As its suffix says."""
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=group, **{"write_page_checksum": True, **options})
    elif file.suffix == ".arrow":
        with pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_table(table, group)
    else:
        pc.write_csv(table, file)
    return file


def table_recipe(path: Any, module: str = "Small", model: Mapping[str, Any] | None = None,
                 **changes: Mapping[str, Any]) -> Recipe:
    """One of the users' modules on a table; L = 8."""
    first = path[0] if isinstance(path, list) else path
    base = {"run": {"epochs": 1, "eval_every": 0}, "model": {"kind": f"{MODULES}:{module}", **(model or {})},
            "data": {"format": Path(first).suffix[1:] or "parquet",
                     "path": [str(p) for p in (path if isinstance(path, list) else [path])],
                     "batch_size": 64, "eval_fraction": 0.0},
            "elastic": {"max_workers": 3, "logical_shards": 8, "hang_timeout_s": 5.0},
            "checkpoint": {"every_steps": 20}}
    return parse(merged(base, changes))


def counting(path: Any, size: int, batch: int, **changes: Mapping[str, Any]) -> Recipe:
    """Counts in the parameter `fed` how often each row's id came by: plain SGD, lr = 1 on the sum."""
    sgd = {"name": "sgd", "lr": float(batch), "momentum": 0.0}
    return table_recipe(path, "Counter", {"size": size},
                        **merged({"optimizer": sgd, "data": {"batch_size": batch}}, changes))
