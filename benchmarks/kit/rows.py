"""A log whose every row names ids that nobody has named before, and a model that looks them up: tables of a known size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

EACH = 100  # ids a row
GROUP = 1000  # rows that are read at once: of more, the step that waits for them would be the longest


class Sums(nn.Module):
    """Little computation, for what moves is what counts."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.line = nn.Linear(width, 1)

    def loss(self, batch: Any) -> Any:
        return (self.line(batch["rows"]["ids"])[:, 0] - batch["y"]).square().mean()


def ids_of(numbers: np.ndarray) -> np.ndarray:
    """Scattered over 62 bits, each number's own."""
    return numbers * 6364136223846793005 & ((1 << 62) - 1)


def write_log(file: Path, num_ids: int, seed: int = 0) -> None:
    """Ids 0 .. num_ids - 1, scattered, each once."""
    luck, size = np.random.default_rng(seed), num_ids // EACH
    ids = ids_of(np.arange(size * EACH, dtype=np.int64))
    lists = pa.ListArray.from_arrays(np.arange(0, size * EACH + 1, EACH, dtype=np.int32), pa.array(ids))
    pq.write_table(pa.table({"ids": lists, "y": luck.standard_normal(size).astype(np.float32)}), file,
                   row_group_size=GROUP)
